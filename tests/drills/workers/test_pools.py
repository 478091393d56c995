"""Custom pools, kernels that refuse a ``pidfd``, and gevent on an SQLite file that is locked.

Leases live for two minutes here, so that no lease becomes free by expiring.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from celery import Celery

from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until
from tests.helpers.worker_rows import wait_until_free

pytestmark = pytest.mark.fleet(CELERY_SINGLETON_HEARTBEAT_INTERVAL="60")


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


def kill_a_body(fleet: Fleet, app: Celery) -> None:
    """Run a body in a child and kill the child. Its lease must become free, and the next message
    must run.
    """
    app.send_task("dies", ("killed",))
    (entered,) = fleet.wait_for_notes("enter")
    os.kill(entered["pid"], signal.SIGKILL)
    wait_until_free(app, "dies")
    assert outcome(app.send_task("increment")) == 1


@pytest.mark.parametrize("how", ["ENOSYS", "EPERM", "EMFILE, once", "missing"])
def test_a_worker_starts_where_the_kernel_refuses_a_pidfd(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], store_url: str, how: str
) -> None:
    """A kernel that is old, is gVisor's or has a seccomp filter refuses every ``pidfd``. Any kernel
    refuses one if the process has too many files open.
    """
    fleet = make_fleet(TEST_PIDFD=how)
    worker = fleet.start("-c", "1", app="tests.apps.kernel_app")
    kill_a_body(fleet, client())
    worker.stop()


def test_a_subclass_of_the_prefork_pool_is_one_of_processes(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], store_url: str
) -> None:
    fleet = make_fleet(CELERY_CUSTOM_WORKER_POOL="tests.apps.pools:Prefork")
    fleet.start("--pool=custom", "-c", "1")
    kill_a_body(fleet, client())


@pytest.mark.parametrize("pool", ["Prefork", "Solo", "Gevent"])
def test_memory_guards_the_threads_of_one_process_of_any_pool(
    make_fleet: Callable[..., Fleet], pool: str
) -> None:
    fleet = make_fleet("memory://", CELERY_CUSTOM_WORKER_POOL=f"tests.apps.pools:{pool}")
    worker = fleet.start("--pool=custom", ready=pool != "Prefork")
    if pool == "Prefork":
        worker.process.wait(timeout=30)
        assert "guards the threads of one process only" in worker.output


@pytest.fixture
def green_fleet(make_fleet: Callable[..., Fleet], store_url: str) -> Fleet:
    """A worker with gevent, whose statements wait for half a minute for the lock of the SQLite
    file.
    """
    fleet = make_fleet(TEST_PREFETCH="10")
    fleet.start("-P", "gevent", "-c", "8")
    return fleet


def check_plain_tasks_run(app: Celery) -> None:
    """Check that tasks without a lease run, one after the other, while a singleton waits for the
    file's lock.
    """
    for number in range(10):
        assert outcome(app.send_task("plain_add", (number,)), deadline=15) == number


def test_gevent_goes_on_while_another_process_has_the_files_lock(
    green_fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """Another process has SQLite's write lock. A delivery waits for that lock to acquire its lease.
    Other greenlets go on.
    """
    app = client()
    assert outcome(app.send_task("increment")) == 1
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = app.send_task("waits_at_gate", (str(tmp_path), str(tmp_path)))
        green_fleet.wait_for_notes("starts")
        check_plain_tasks_run(app)
        assert green_fleet.notes("enter")[1:] == []
        other.execute("ROLLBACK")
    assert outcome(waiting) == 1


def test_gevent_goes_on_while_one_of_its_own_bodies_has_the_files_lock(
    green_fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A body is in a transaction, and so has the file's lock. A delivery waits for that lock. The
    body must be able to run and to end its transaction, or the lock would never become free.
    """
    app, until = client(), tmp_path / "until"
    has_it = app.send_task("uses_the_store", (1, str(until), False))

    def is_locked() -> bool:
        with closing(sqlite3.connect(tmp_path / "store.db", timeout=0)) as other:
            try:
                other.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return bool(green_fleet.notes("enter"))
        return False

    wait_until(is_locked, "the body is in its transaction")
    waiting = [
        app.send_task("waits_at_gate", (str(tmp_path), str(tmp_path))),
        app.send_task("increment"),
    ]
    green_fleet.wait_for_notes("starts")
    check_plain_tasks_run(app)
    until.touch()
    assert [outcome(result) for result in (has_it, *waiting)] == [1, 1, 1]
