"""What a worker says when it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from tests.processes.fleet import Fleet, outcome


def refused(fleet: Fleet, *options: str) -> str:
    """The output of a worker that does not start."""
    worker = fleet.start(*options, ready=False)
    worker.process.wait(timeout=30)
    assert worker.process.returncode != 0
    return worker.output


def test_with_nothing_configured_but_a_broker(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], tmp_path: Path
) -> None:
    """The embedded default: a file in the worker's folder, made at first use."""
    fleet = make_fleet("unused")
    for name in ("STORE_URL", "AUTO_MIGRATE"):
        del fleet.environment[f"CELERY_SINGLETON_{name}"]
    worker = fleet.start("-P", "solo")
    assert outcome(client().send_task("increment")) == 1
    assert (tmp_path / "celery-singletons.db").exists()
    assert "only among workers that open this same file" in worker.output


def test_a_broker_elsewhere_makes_that_a_warning(
    make_fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    fleet = make_fleet(
        f"sqlite:///{tmp_path}/store.db", CELERY_BROKER_URL="redis://broker.invalid:6379/0"
    )
    worker = fleet.start("-P", "solo", ready=False)
    fleet.wait_for_output(worker, "only among workers that open this same file")
    line = next(line for line in worker.output.splitlines() if "only among" in line)
    assert "WARNING" in line


def test_memory_does_not_guard_processes(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet("memory://")
    assert "guards the threads of one process only" in refused(fleet, "-c", "2")
    fleet.start("-P", "threads", "-c", "2")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("STORE_URL", "no url", "is not a URL"),
        ("STORE_URL", "oracle://host/db", "postgresql, sqlite, mariadb, mysql, or memory://"),
        ("HEARTBEAT_INTERVAL", "often", "a number of seconds"),
        ("HISTORY", "0", "1 or more"),
    ],
)
def test_a_wrong_setting_ends_it_with_a_clear_error(
    make_fleet: Callable[..., Fleet], name: str, value: str, allowed: str
) -> None:
    fleet = make_fleet("memory://", **{f"CELERY_SINGLETON_{name}": value})
    output = refused(fleet, "-P", "solo")
    assert f"singleton_{name.lower()}={value!r}" in output
    assert allowed in output
    assert "ImproperlyConfigured" in output
