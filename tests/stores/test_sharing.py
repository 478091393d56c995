"""Stores that threads and forked processes share, or whose rows other transactions lock."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import create_engine

from celery_singleton_state.lease.lease import HeldLease, clock
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.runtime import close_runtime, runtime_of
from celery_singleton_state.store.base import TAKEN_OVER, Ended, Lease
from tests.helpers.stores import url_on
from tests.helpers.waiting import wait_until

FORK = multiprocessing.get_context("fork")
DONE = Ended("succeeded", "[]")


def app_on(url: str) -> Celery:
    app = Celery("shop", set_as_current=False)
    app.conf.update(singleton_store_url=url, singleton_auto_migrate=True)
    return app


def run_once(app: Celery, key: str) -> int:
    """Acquire and release a key; return the fence."""
    acquired = runtime_of(app).store.acquire(key, runtime_of(app).new_holder(), 60, None)
    assert acquired is not None
    assert runtime_of(app).store.release(acquired.lease, DONE)
    return acquired.lease.fence


def runs_of(app: Celery, key: str) -> int:
    row = runtime_of(app).store.peek(key)
    assert row is not None
    return row.run_count


def in_child(body: Callable[[], None]) -> int | None:
    child = FORK.Process(target=body)
    child.start()
    child.join(30)
    return child.exitcode


def test_a_forked_child_opens_its_own_connections(shared_store_url: str) -> None:
    """The child uses the store, drops the connections that it inherited, and exits. The parent's
    connections must still work.
    """
    app = app_on(shared_store_url)
    first = run_once(app, "k")

    def child() -> None:
        assert run_once(app, "k") > first
        gc.collect()

    assert in_child(child) == 0
    assert run_once(app, "k") > first
    assert runs_of(app, "k") == 3
    close_runtime(app)


def test_a_childs_writes_outlive_its_parents_connection(shared_store_url: str) -> None:
    """On SQLite, a child that inherited its parent's record of file locks would write into a log
    file that the parent deletes when it closes the store. So the child must open the file anew.
    """
    app = app_on(shared_store_url)
    run_once(app, "k")
    to_child, to_parent = FORK.Pipe()

    def child() -> None:
        run_once(app, "k")
        to_parent.send("opened")
        to_parent.recv()
        run_once(app, "k")

    process = FORK.Process(target=child)
    process.start()
    assert to_child.recv() == "opened"
    close_runtime(app)
    to_child.send("closed")
    process.join(30)
    assert process.exitcode == 0
    run_once(app, "k")
    assert runs_of(app, "k") == 4
    close_runtime(app)


def test_holders_of_parent_and_child_differ(shared_store_url: str) -> None:
    app = app_on(shared_store_url)
    ours = runtime_of(app).new_holder("node")
    to_child, to_parent = FORK.Pipe()
    assert in_child(lambda: to_parent.send(runtime_of(app).new_holder("node"))) == 0
    theirs = to_child.recv()
    assert ours.split(":")[1] == str(os.getpid())
    assert ours.split(":")[1:] != theirs.split(":")[1:]
    assert ours.split(":")[2] != theirs.split(":")[2]


def test_a_killed_childs_lease_is_taken_over(shared_store_url: str) -> None:
    app = app_on(shared_store_url)
    first = run_once(app, "k")
    to_child, to_parent = FORK.Pipe()

    def child() -> None:
        runtime_of(app).store.acquire("k", "child", 0.5, None)
        to_parent.send("acquired")
        to_parent.recv()

    process = FORK.Process(target=child)
    process.start()
    assert to_child.recv() == "acquired"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    taken = wait_until(lambda: runtime_of(app).store.acquire("k", "h", 60, None), "taken over")
    assert taken.lease.fence > first
    assert taken.write == TAKEN_OVER
    close_runtime(app)


@pytest.fixture(params=["postgresql", "mariadb"])
def locking_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database whose rows can be locked one by one."""
    return url_on(request.param, request, tmp_path)


@contextmanager
def leases_with_locked_rows(url: str) -> Iterator[tuple[list[HeldLease], list[HeldLease], Any]]:
    """Hold eight leases; yield the leases whose rows another transaction has locked, the other
    leases, and this transaction.
    """
    app = app_on(url)
    app.conf.singleton_heartbeat_interval = 1.5
    runtime = runtime_of(app)
    leases = []
    for key in ("l1", "l2", "l3", "l4", "a", "b", "c", "d"):
        asked_at = clock()
        acquired = runtime.store.acquire(key, "holder", 3, None)
        assert acquired is not None
        leases.append(HeldLease(acquired.lease, asked_at, runtime.settings.heartbeat_interval))
    blocker = create_engine(url)
    try:
        with blocker.connect() as other:
            name = runtime.sql._sql.key
            other.exec_driver_sql(f"SELECT * FROM kv_store WHERE {name} LIKE 'l%%' FOR UPDATE")
            for held in leases:
                runtime.heartbeat_of(runtime.store).hold(held)
            yield leases[:4], leases[4:], other
    finally:
        blocker.dispose()
        close_runtime(app)


def test_locked_rows_do_not_delay_the_renewal_of_other_leases(locking_url: str) -> None:
    """Another transaction locks four rows for longer than a lease's life. One statement waits for
    each of these rows in turn, for a quarter of a life. Meanwhile the other leases must be renewed.
    """
    with leases_with_locked_rows(locking_url) as (locked, others, _):
        wait_until(lambda: all(held.lost for held in locked), "the locked leases are lost")
        lost_at = clock()
        wait_until(
            lambda: all(held.asked_at > lost_at for held in others), "the others are renewed"
        )
        assert [held.lost for held in others] == [None] * 4


def test_leases_are_renewed_if_their_rows_are_unlocked_in_time(locking_url: str) -> None:
    """Another transaction locks four rows until shortly before their leases expire, while a
    statement waits for one of them. After the unlocking the next statement for all leases must
    renew these four, too.
    """
    with leases_with_locked_rows(locking_url) as (locked, others, other):
        asked_at = [held.asked_at for held in locked]
        end = min(held.trusted_until for held in locked) - 1.0
        wait_until(lambda: clock() > end, "the locks are held until shortly before the end")
        assert [held.asked_at for held in locked] == asked_at
        other.rollback()
        wait_until(
            lambda: all(held.asked_at > end for held in locked), "the locked leases are renewed"
        )
        wait_until(lambda: all(held.asked_at > end for held in others), "and the others")
        assert [held.lost for held in (*locked, *others)] == [None] * 8


def test_opening_a_locked_sqlite_file_waits(tmp_path: Path) -> None:
    """B locks the whole file, as SQLite does for a moment while it recovers a log; A opens the
    file, and sends a new connection's first statements; B unlocks it. A must not fail with
    "database is locked".
    """
    url = f"sqlite:///{tmp_path}/store.db"
    migrate_url(url, "kv_store")
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with ThreadPoolExecutor(1) as pool:
            opening = pool.submit(open_store, url, "kv_store", 10.0)
            end = clock() + 0.3
            wait_until(lambda: clock() > end or opening.done(), "the opening has begun and waits")
            assert not opening.done()
            other.close()
            opening.result().close()


def test_a_statement_that_waits_for_a_lock_uses_the_time_after_it(shared_store_url: str) -> None:
    """A acquires; B asks for the same row, which a third transaction has locked; A's lease expires;
    the row is unlocked. The store must compare with its clock after the wait: B takes the lease
    over.
    """
    app = app_on(shared_store_url)
    store = runtime_of(app).store
    first = store.acquire("k", "a", 0.5, None)
    assert first is not None
    blocker = create_engine(shared_store_url)
    with blocker.connect() as connection:
        if store.engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.exec_driver_sql("SELECT * FROM kv_store FOR UPDATE")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(store.acquire, "k", "b", 60, None)
            end = clock() + 0.8
            wait_until(lambda: clock() > end, "a's lease has expired")
            connection.rollback()
            taken = answer.result()
    blocker.dispose()
    assert taken is not None
    assert taken.lease == Lease("k", "b", taken.lease.fence, 60)
    assert taken.lease.fence > first.lease.fence
    close_runtime(app)
