"""Pools and kernels that are not the usual ones.

Leases live for two minutes here, so that none becomes free by running out.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from tests.drills.test_deaths import wait_until_free
from tests.processes.fleet import Fleet, outcome

LONG = {"CELERY_SINGLETON_HEARTBEAT_INTERVAL": "60"}


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


def kill_its_body(fleet: Fleet, app: Celery) -> None:
    """Run a body in a child, and kill the child: the lease is free, and the next runs."""
    app.send_task("dies", ("killed",))
    (entered,) = fleet.wait_for_notes("enter")
    os.kill(entered["pid"], signal.SIGKILL)
    wait_until_free(app, "dies")
    assert outcome(app.send_task("increment")) == 1


@pytest.mark.parametrize("how", ["ENOSYS", "EPERM", "EMFILE, once", "missing"])
def test_a_worker_starts_where_the_kernel_refuses_a_pidfd(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], store_url: str, how: str
) -> None:
    """An older kernel, gVisor, a seccomp filter; a process with too many files open refuses one of
    several.
    """
    fleet = make_fleet(store_url, TEST_PIDFD=how, **LONG)
    worker = fleet.start("-c", "1", app="tests.processes.kernel_app")
    kill_its_body(fleet, client())
    worker.stop()


def test_a_subclass_of_the_prefork_pool_is_one_of_processes(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], store_url: str
) -> None:
    fleet = make_fleet(store_url, CELERY_CUSTOM_WORKER_POOL="tests.drills.pools:Prefork", **LONG)
    fleet.start("--pool=custom", "-c", "1")
    kill_its_body(fleet, client())


@pytest.mark.parametrize("pool", ["Prefork", "Solo", "Gevent"])
def test_memory_guards_the_threads_of_one_process_of_any_pool(
    make_fleet: Callable[..., Fleet], pool: str
) -> None:
    fleet = make_fleet("memory://", CELERY_CUSTOM_WORKER_POOL=f"tests.drills.pools:{pool}")
    worker = fleet.start("--pool=custom", ready=pool != "Prefork")
    if pool == "Prefork":
        worker.process.wait(timeout=30)
        assert "guards the threads of one process only" in worker.output
