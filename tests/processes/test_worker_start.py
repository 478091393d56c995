"""The output of a worker when it starts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from tests.helpers import commands
from tests.helpers.fleet import Fleet, outcome, refused
from tests.helpers.servers import Valkey


def test_a_worker_with_only_a_broker_configured(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], tmp_path: Path
) -> None:
    """The default store is an SQLite file in the worker's folder, made at first use."""
    fleet = make_fleet("unused")
    for name in ("STORE_URL", "AUTO_MIGRATE"):
        del fleet.environment[f"CELERY_SINGLETON_{name}"]
    worker = fleet.start("-P", "solo")
    assert outcome(client().send_task("increment")) == 1
    assert (tmp_path / "celery-singletons.db").exists()
    assert "only among workers that open this same file" in worker.output


def test_the_default_store_with_a_remote_broker_is_a_warning(
    make_fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    fleet = make_fleet(
        f"sqlite:///{tmp_path}/store.db", CELERY_BROKER_URL="redis://broker.invalid:6379/0"
    )
    worker = fleet.start("-P", "solo", ready=False)
    fleet.wait_for_output(worker, "only among workers that open this same file")
    line = next(line for line in worker.output.splitlines() if "only among" in line)
    assert "WARNING" in line


def test_a_store_in_memory_is_refused_for_several_processes(
    make_fleet: Callable[..., Fleet],
) -> None:
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
def test_a_wrong_setting_ends_the_worker_with_a_clear_error(
    make_fleet: Callable[..., Fleet], name: str, value: str, allowed: str
) -> None:
    fleet = make_fleet("memory://", **{f"CELERY_SINGLETON_{name}": value})
    output = refused(fleet, "-P", "solo")
    assert f"singleton_{name.lower()}={value!r}" in output
    assert allowed in output
    assert "ImproperlyConfigured" in output
    assert "Traceback" not in output


CANNOT_START = {
    "an @ in the password": ("postgresql://u:p@hunter2@h/db", "%40"),
    "a driver that is not installed": ("postgresql+psycopg2://u:hunter2@h/db", "pip install"),
    "an option of another driver": ("postgresql://u:hunter2@h/db?charset=utf8", "'charset'"),
    "a file that is none of options": (
        "mysql://u:hunter2@h/d?read_default_file=/etc/passwd",
        "a file",
    ),
    "a table that is missing": ("sqlite:///store.db", "singleton migrate"),
}


@pytest.mark.parametrize("why", CANNOT_START)
def test_a_wrong_store_is_one_line_from_worker_beat_and_command(
    make_fleet: Callable[..., Fleet], tmp_path: Path, why: str
) -> None:
    """The line names the setting or the missing table, and says what to do.

    It has no traceback and no password. The program ends without another try.
    """
    url, advice = CANNOT_START[why]
    fleet = make_fleet(url, CELERY_SINGLETON_AUTO_MIGRATE="0")
    if "pip install" in advice:
        (tmp_path / "psycopg.py").write_text("raise ImportError('no psycopg')")
        fleet.environment["PYTHONPATH"] = f"{tmp_path}:{fleet.environment['PYTHONPATH']}"
    worker = fleet.start("-P", "solo", ready=False)
    beat = fleet.start_beat("tests.apps.tasks")
    started = fleet.celery("singleton", "ls")
    command = subprocess.run(started, env=fleet.environment, capture_output=True, text=True)
    assert (worker.process.wait(30), beat.process.wait(30), command.returncode) == (1, 1, 1)
    for output in (worker.output, beat.output, command.stdout + command.stderr):
        (line,) = [line for line in output.splitlines() if advice in line]
        assert "singleton_store_url" in line or "table kv_store is missing" in line
        assert "Traceback" not in output
        assert "retried" not in output
        assert "hunter2" not in output


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("redis://:hunter2@h/zero", "the database is a number"),
        ("redis://h?foo=hunter2", "the option 'foo'"),
        ("sentinel://:hunter2;x@127.0.0.1:1/mymaster/0", "%3B"),
        ("redis://127.0.0.1:{port}/99", "no database of this number"),
    ],
)
def test_a_wrong_lease_url_is_one_line(
    make_fleet: Callable[..., Fleet], valkey: Valkey, url: str, advice: str
) -> None:
    fleet = make_fleet("memory://", CELERY_SINGLETON_LEASE_URL=url.format(port=valkey.port))
    output = refused(fleet, "-P", "solo")
    (line,) = [line for line in output.splitlines() if advice in line]
    assert "singleton_lease_url" in line
    assert "Traceback" not in output
    assert "hunter2" not in output


APP = """
from celery import Celery
from celery_singleton_state import singleton_task

app = Celery("shown")
app.conf.singleton_store_url = "sqlite:///{folder}/store.db?timeout=7"
app.conf.singleton_lease_url = "redis://127.0.0.1:{port}/14?client_name=hunter2"

@singleton_task(app, name="run")
def run(self): ...
"""


def test_celerys_reports_show_no_password(
    make_fleet: Callable[..., Fleet], valkey: Valkey, tmp_path: Path
) -> None:
    """The reports are ``celery report``, ``inspect report`` and ``inspect conf`` of a running
    worker.
    """
    (tmp_path / "shown_app.py").write_text(APP.format(folder=tmp_path, port=valkey.port))
    fleet = make_fleet("unused")
    for name in ("STORE_URL", "AUTO_MIGRATE"):
        del fleet.environment[f"CELERY_SINGLETON_{name}"]
    worker = fleet.start("-P", "solo", app="shown_app")
    for arguments in (["report"], ["inspect", "report"], ["inspect", "conf"]):
        ran = commands.run(["-A", "shown_app", *arguments], fleet.environment, tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert "singleton_lease_url" in ran.stdout
        assert "hunter2" not in ran.stdout + ran.stderr
    worker.stop()
    assert "hunter2" not in worker.output
    assert "timeout=7" not in worker.output
