"""Statements that a client gives up in different ways: each must also end on the server.

Another session locks the table all the time, so nothing else ends the waiting statement.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import StoreUnavailable
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.pgbouncer import PgBouncer
from tests.helpers.servers import Postgres
from tests.helpers.waiting import wait_until

#: A time limit for answers, in seconds, that is longer than any test.
PATIENT = 60.0


class Server:
    """A database whose table a test can lock, and whose waiting sessions it can count."""

    def __init__(self, postgres: Postgres, url: str) -> None:
        self._postgres, self._url = postgres, url

    @contextmanager
    def locked(self) -> Iterator[None]:
        with psycopg.connect(self._url.replace("+psycopg", "")) as other:
            other.execute("LOCK TABLE kv_store IN ACCESS EXCLUSIVE MODE")
            yield

    def waiting(self) -> int:
        return len(
            self._postgres.column(
                "postgres",
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                f" AND datname = '{self._url.rpartition('/')[2]}'",
            )
        )

    def wait_for_waiting(self, count: int) -> None:
        wait_until(lambda: self.waiting() == count, f"{count} sessions wait for the lock")


@pytest.fixture
def server(postgres: Postgres, server_url: str) -> Server:
    open_store(server_url, "kv_store", PATIENT, auto_migrate=True).close()
    return Server(postgres, server_url)


@pytest.fixture(params=["direct", "pgbouncer"])
def make_store(
    request: pytest.FixtureRequest, server: Server, server_url: str
) -> Iterator[Callable[[float], SqlStore]]:
    """Return a function that opens a store whose statements must be answered within the given
    seconds.
    """
    made: list[SqlStore] = []
    url = server_url
    if request.param == "pgbouncer":
        pgbouncer: PgBouncer = request.getfixturevalue("pgbouncer")
        url = pgbouncer.url(server_url.rpartition("/")[2])

    def make(io_timeout: float) -> SqlStore:
        made.append(open_store(url, "kv_store", io_timeout))
        return made[-1]

    yield make
    for store in made:
        store.close()


class TimeLimit(Exception):
    """The error that a signal handler raises, like Celery's own soft time limit."""


@contextmanager
def interrupted(server: Server) -> Iterator[None]:
    """Raise :class:`TimeLimit` in the main thread as soon as this thread's statement waits on the
    server.
    """
    before = signal.signal(signal.SIGUSR1, _raise_time_limit)

    def interrupt() -> None:
        server.wait_for_waiting(1)
        os.kill(os.getpid(), signal.SIGUSR1)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        with pytest.raises(TimeLimit):
            yield
    finally:
        interrupter.join()
        signal.signal(signal.SIGUSR1, before)


def _raise_time_limit(*_: object) -> None:
    raise TimeLimit


def acquire(store: SqlStore) -> object:
    return store.acquire("k", "h", 60, None)


def acquire_beside_another(store: SqlStore) -> None:
    """Acquire over a connection from the pool, because the store's ready connection is in use."""
    store._connections.execute("SELECT 1", {}, lambda cursor: acquire(store))


def use_a_transaction(store: SqlStore) -> None:
    """Send a statement in a transaction, as a task's body does: the store sets no time limit for
    its answer.
    """
    with store.transaction() as transaction:
        transaction.connection.exec_driver_sql("SELECT * FROM kv_store")


def test_a_statement_that_takes_too_long_ends(
    server: Server, make_store: Callable[[float], SqlStore]
) -> None:
    store = make_store(0.5)
    with server.locked():
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match=r"no answer within 0\.5 s"):
                acquire(store)
        server.wait_for_waiting(0)
    assert acquire(store)


def test_with_an_older_libpq_no_statement_is_cancelled(
    server: Server, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store sends no cancel request with an older libpq, because such a request would block all
    threads and greenlets while the server is silent.
    """
    monkeypatch.setattr(psycopg.capabilities, "has_cancel_safe", lambda: False)
    store = open_store(server_url, "kv_store", 0.5)
    with server.locked():
        with pytest.raises(StoreUnavailable, match=r"no answer within 0\.5 s"):
            acquire(store)
        server.wait_for_waiting(1)
    server.wait_for_waiting(0)
    store.close()


@pytest.mark.parametrize("setting", ["lock_timeout", "statement_timeout"])
def test_a_statement_ended_by_the_users_server_setting_ends(
    server: Server, server_url: str, setting: str
) -> None:
    """The user's own time-out on the server raises ``StoreUnavailable``, as an outage does."""
    store = open_store(f"{server_url}?options=-c%20{setting}%3D100", "kv_store", PATIENT)
    with server.locked(), pytest.raises(StoreUnavailable, match="timeout"):
        acquire(store)
    assert acquire(store)
    store.close()


@pytest.mark.parametrize("use", [acquire, acquire_beside_another, use_a_transaction])
def test_a_statement_that_a_time_limit_interrupts_ends(
    server: Server, make_store: Callable[[float], SqlStore], use: Callable[[SqlStore], object]
) -> None:
    store = make_store(PATIENT)
    with server.locked():
        with interrupted(server):
            use(store)
        server.wait_for_waiting(0)
    assert acquire(store)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_end_its_parents_statement(
    server: Server, make_store: Callable[[float], SqlStore]
) -> None:
    """A statement of one thread waits for the lock; another thread forks; the child closes all
    connections that it inherited, and exits; the table is unlocked. The statement must get its
    answer.
    """
    store = make_store(PATIENT)
    with ThreadPoolExecutor(1) as pool:
        with server.locked():
            acquired = pool.submit(acquire, store)
            server.wait_for_waiting(1)
            child = os.fork()
            if not child:
                store.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert server.waiting() == 1
        assert acquired.result()
