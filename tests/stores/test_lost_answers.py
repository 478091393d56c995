"""Runs whose database server is behind a proxy that cuts or refuses connections, or falls silent.

Each test lets the proxy do this at the worst time for a run.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from celery_singleton_state import (
    HeartbeatFailed,
    RetryPolicy,
    SingletonTask,
    StateLoadFailed,
    StatePersistFailed,
    singleton_task,
)
from celery_singleton_state.history import decode
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.runtime import close_runtime, runtime_of
from celery_singleton_state.store.base import Row
from celery_singleton_state.store.sql.store import SqlTransaction
from tests.helpers.servers import Proxy
from tests.helpers.stores import url_on
from tests.helpers.waiting import wait_until
from tests.storm.fleet import port_of, through

AT_ONCE = RetryPolicy(max_retries=3, backoff=0, jitter=False)


@dataclass
class Counter:
    n: int = 0


@pytest.fixture(params=["postgresql", "mariadb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database on a server."""
    return url_on(request.param, request, tmp_path)


@pytest.fixture
def proxy(url: str, make_proxy: Callable[[int], Proxy]) -> Proxy:
    return make_proxy(port_of(url))


@pytest.fixture
def app(url: str, proxy: Proxy) -> Iterator[Celery]:
    migrate_url(url, "kv_store")
    with directly(url) as connection:
        connection.exec_driver_sql("CREATE TABLE written (n integer)")
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(
        singleton_store_url=through(proxy, url),
        singleton_heartbeat_interval=2,
    )
    yield app
    proxy.mode = "pass"
    close_runtime(app)


@contextmanager
def directly(url: str) -> Iterator[sa.Connection]:
    """Open a transaction on the server itself, not through the proxy."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def make(app: Celery, act: Callable[[Any], None] = lambda task: None, **options: Any) -> Any:
    """Return a task that counts its runs in its state, and calls ``act`` in each run but the first.

    The first run is done here, so that later runs find an open connection and a row.
    """
    options = {"state_schema": Counter, "name": "count", "shared": False} | options
    acts = [lambda task: None]

    def body(self: Any) -> int:
        self.state.n += 1
        acts[-1](self)
        return int(self.state.n)

    task = singleton_task(app, **options)(body)
    assert task() == 1
    acts.append(act)
    return task


def row(app: Celery) -> Row:
    found = runtime_of(app).store.peek("singleton-state:count")
    assert found is not None
    return found


def check_two_runs(app: Celery) -> None:
    """Check that there were two runs with two fences and two increments: nothing is lost or
    doubled.
    """
    found = row(app)
    assert (found.value, found.run_count) == ('{"n":2}', 2)
    assert found.holder is None
    runs = decode(found.history, "")
    assert [run.outcome for run in runs] == ["succeeded"] * 2
    assert runs[0].fence < runs[1].fence == found.fence


def test_the_answer_to_acquire_is_lost(app: Celery, proxy: Proxy) -> None:
    """The lease is acquired, but the holder does not know that. The holder repeats the request, and
    gets the same fence.
    """
    task = make(app)
    proxy.mode = "drop one answer"
    assert task() == 2
    check_two_runs(app)


def test_the_answer_to_release_is_lost(app: Celery, proxy: Proxy) -> None:
    """The run has saved and released, but does not know that. Its repeated release is refused, and
    the run finds its own end in the history.
    """

    def act(task: Any) -> None:
        proxy.mode = "drop one answer"

    assert make(app, act)() == 2
    check_two_runs(app)


def test_the_answer_to_a_checkpoint_is_lost(app: Celery, proxy: Proxy) -> None:
    def act(task: Any) -> None:
        proxy.mode = "drop one answer"
        task.checkpoint()

    assert make(app, act)() == 2
    check_two_runs(app)


def insert_line(task: Any) -> None:
    with task.transaction() as connection:
        connection.exec_driver_sql(f"INSERT INTO written VALUES ({task.state.n})")


def written(url: str) -> list[int]:
    with directly(url) as connection:
        found = connection.exec_driver_sql("SELECT n FROM written ORDER BY n").all()
    return [n for (n,) in found]


def test_the_answer_to_a_commit_is_lost(
    app: Celery, proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and state are committed, but the run does not know that. It learns this from the row's
    write number.
    """
    save = SqlTransaction.save

    def save_then_cut(self: SqlTransaction, *arguments: Any) -> Any:
        saved = save(self, *arguments)
        proxy.mode = "drop one answer"
        return saved

    task = make(app, insert_line)
    monkeypatch.setattr(SqlTransaction, "save", save_then_cut)
    assert task() == 2
    check_two_runs(app)
    assert written(url) == [2]


def test_a_connection_lost_before_the_commit(app: Celery, proxy: Proxy, url: str) -> None:
    """Neither the rows nor the state are stored. The retry starts from the state before the
    transaction.
    """
    attempts = []

    def act(task: Any) -> None:
        attempts.append(task.state.n)
        with task.transaction() as connection:
            connection.exec_driver_sql(f"INSERT INTO written VALUES ({task.state.n})")
            if len(attempts) == 1:
                proxy.cut()

    task = make(app, act, retry_policy={"StatePersistFailed": AT_ONCE})
    assert task.apply().get() == 2
    assert attempts == [2, 2]
    assert written(url) == [2]
    assert row(app).value == '{"n":2}'


def test_a_server_unavailable_before_the_run(app: Celery, proxy: Proxy) -> None:
    task = make(app, max_retries=0)
    proxy.mode = "refuse"
    proxy.cut()
    with pytest.raises(StateLoadFailed) as caught:
        task()
    assert caught.value.singleton == "count"
    assert isinstance(caught.value.__cause__, Exception)
    proxy.mode = "pass"
    assert task() == 2
    check_two_runs(app)


def test_a_server_unavailable_in_the_body(app: Celery, proxy: Proxy) -> None:
    def act(task: Any) -> None:
        proxy.mode = "refuse"
        proxy.cut()

    with pytest.raises(StatePersistFailed):
        make(app, act)()
    proxy.mode = "pass"
    found = row(app)
    assert (found.value, found.run_count) == ('{"n":1}', 1)


@pytest.mark.parametrize("moment", ["before", "in the body"])
def test_a_silent_server_becomes_an_error(app: Celery, proxy: Proxy, moment: str) -> None:
    """The server receives every byte and answers none. TCP notices nothing, so the store's own time
    limit must raise the error.
    """

    def act(task: Any) -> None:
        proxy.mode = "mute"

    task = make(app, act)
    if moment == "before":
        proxy.mode = "mute"
        with pytest.raises(StateLoadFailed, match=r"no answer|timeout|timed out"):
            task()
    else:
        with pytest.raises((StatePersistFailed, HeartbeatFailed)):
            task()


def test_a_run_is_lost_if_the_server_stays_silent(app: Celery, proxy: Proxy) -> None:
    """No renewal is answered until the lease's life has passed. The run then fails without asking
    the store.
    """

    def act(task: Any) -> None:
        proxy.mode = "mute"
        wait_until(lambda: not task.lease_remaining, "the run no longer trusts its lease")
        wait_until(lambda: lost(task), "the run learns that it is lost")
        proxy.mode = "pass"
        task.checkpoint()

    def lost(task: Any) -> Any:
        return task._run_for("").held.lost

    with pytest.raises(HeartbeatFailed, match="not renewed before it expired"):
        make(app, act)()


def test_a_retry_finds_that_its_unanswered_save_was_committed(app: Celery, proxy: Proxy) -> None:
    """The save is committed, but no attempt gets an answer: the run fails with
    ``StatePersistFailed`` and is retried. The retry finds the run in the history, and does not
    repeat it.
    """
    bodies = []

    class Base(SingletonTask[Counter]):
        abstract = True

        def on_lose_leadership(self) -> None:
            proxy.mode = "pass"

    def act(task: Any) -> None:
        bodies.append(task.state.n)
        proxy.mode = "drop answers"

    task = make(app, act, base=Base, retry_policy={"StatePersistFailed": AT_ONCE})
    assert task.apply(task_id="once").state == "SUCCESS"
    assert bodies == [2]
    assert row(app).value == '{"n":2}'


def test_a_time_limit_in_mid_statement_leaves_the_pool_whole(app: Celery, url: str) -> None:
    """Another transaction locks the row; acquire waits for the row; the soft time limit interrupts
    acquire.
    """
    task = make(app)

    def interrupt(*_: Any) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with directly(url) as other:
            other.exec_driver_sql("SELECT * FROM kv_store FOR UPDATE")
            for _ in range(3):
                # Open the connection first: a time limit that interrupts connecting would leave a
                # socket open.
                row(app)
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(SoftTimeLimitExceeded):
                    task()
    finally:
        signal.signal(signal.SIGALRM, before)
    # An interrupted acquire may still take the lease afterwards, and then holds it for at most one
    # ordinary life. Until that has passed, runs are skipped.
    assert wait_until(task, "the lease is free") == 2


def test_a_time_limit_within_a_transaction(app: Celery, url: str) -> None:
    def interrupt(*_: Any) -> None:
        raise SoftTimeLimitExceeded

    def act(task: Any) -> None:
        with task.transaction() as connection:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            connection.exec_driver_sql(f"SELECT {sleep}(20)")

    sleep = "pg_sleep" if url.startswith("postgresql") else "sleep"
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        task = make(app, act)
        for _ in range(4):
            with pytest.raises(SoftTimeLimitExceeded):
                task()
    finally:
        signal.signal(signal.SIGALRM, before)
    found = row(app)
    assert (found.value, found.holder, found.run_count) == ('{"n":1}', None, 5)


def test_a_lost_run_does_not_wait_for_its_rollback(
    app: Celery, proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store falls silent while the body is in a transaction, and the body is interrupted
    there.
    """
    rollbacks: list[Any] = []

    def act(task: Any) -> None:
        monkeypatch.setattr(runtime_of(app).sql.engine.dialect, "do_rollback", rollbacks.append)
        with task.transaction() as connection:
            connection.exec_driver_sql("INSERT INTO written VALUES (2)")
            proxy.mode = "mute"
            wait_until(lambda: False, "the body is interrupted")

    with pytest.raises(HeartbeatFailed, match="not renewed before it expired"):
        make(app, act)()
    assert rollbacks == []
    proxy.mode = "pass"
    proxy.cut()
    wait_until(lambda: not row(app).held, "the lease is free")
    assert written(url) == []
