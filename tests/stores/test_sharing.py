"""A store among threads, forks, and holders of its rows' locks."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import create_engine

from celery_singleton_state.lease import HeldLease, clock
from celery_singleton_state.runtime import close_runtime, runtime_of
from celery_singleton_state.store.base import TAKEN_OVER, Ended, Lease
from tests.conftest import url_on
from tests.waiting import wait_until

FORK = multiprocessing.get_context("fork")
DONE = Ended("succeeded", "[]")


def app_on(url: str) -> Celery:
    app = Celery("shop", set_as_current=False)
    app.conf.update(singleton_store_url=url, singleton_auto_migrate=True)
    return app


def run_once(app: Celery, key: str) -> int:
    """Acquire and release; returns the fence."""
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


def test_a_forked_child_opens_its_own(shared_store_url: str) -> None:
    """The child uses the store, drops what it inherited, and ends: the parent goes on."""
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
    """SQLite: a child that inherits its parent's idea of the file's locks would write into a log
    which the parent deletes when it closes.
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


@pytest.mark.parametrize("server", ["postgresql", "mariadb"])
def test_a_locked_row_costs_no_other_lease_its_life(
    request: pytest.FixtureRequest, tmp_path: Path, server: str
) -> None:
    """Somebody holds one row's lock for longer than a life; the others are renewed past it."""
    url = url_on(server, request, tmp_path)
    app = app_on(url)
    app.conf.singleton_heartbeat_interval = 1
    runtime = runtime_of(app)
    interval = runtime.settings.heartbeat_interval
    held = []
    for key in ("locked", "a", "b"):
        acquired = runtime.store.acquire(key, "holder", 2, None)
        assert acquired is not None
        held.append(HeldLease(acquired.lease, clock(), interval))
    blocker = create_engine(url)
    with blocker.connect() as other:
        name = runtime.sql._sql.words.key
        other.exec_driver_sql(f"SELECT * FROM kv_store WHERE {name} = 'locked' FOR UPDATE")
        for lease in held:
            runtime.heartbeat_of(lease.lease.key).hold(lease)
        wait_until(lambda: held[0].lost, "the locked one is lost")
        assert [lease.lost for lease in held[1:]] == [None, None]
    blocker.dispose()
    close_runtime(app)


def test_the_clock_goes_on_while_a_statement_waits_for_a_lock(shared_store_url: str) -> None:
    """A acquires; B asks for the same row, whose lock a third one has; A's lease runs out in
    the meantime; the lock is given up. B is answered by the time of then: it takes the lease.
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
            wait_until(lambda: clock() > end, "a's lease has run out")
            connection.rollback()
            taken = answer.result()
    blocker.dispose()
    assert taken is not None
    assert taken.lease == Lease("k", "b", taken.lease.fence, 60)
    assert taken.lease.fence > first.lease.fence
    close_runtime(app)
