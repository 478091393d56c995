"""The connection that a store keeps ready, and the connection pool behind it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine

from celery_singleton_state.store.sql.connections import Connections, GrowingPool
from celery_singleton_state.store.sql.engine import make_engine
from celery_singleton_state.store.sql.store import SqlStore
from celery_singleton_state.store.sql.url import parse_url


@pytest.fixture
def engine(postgres_url: str) -> Iterator[Engine]:
    made = make_engine(parse_url(postgres_url), io_timeout=5.0, pool_size=2)
    yield made
    made.dispose()


@pytest.fixture
def connections(engine: Engine) -> Connections:
    return Connections(engine, keeps_one=True)


def its_process(cursor: Any) -> int:
    """Return the id of the server process behind a cursor."""
    return int(cursor.connection.info.backend_pid)


def process(connections: Connections) -> int:
    """Return the id of the server process that answers the next statement."""
    return int(connections.execute("SELECT 1", {}, its_process))


def test_one_statement_after_another_uses_one_connection(connections: Connections) -> None:
    assert len({process(connections) for _ in range(5)}) == 1


def test_statements_at_the_same_time_have_connections_of_their_own(
    connections: Connections,
) -> None:
    """While statement A is not answered yet, B is sent. B does not wait: it gets another
    connection. The store keeps A's connection ready, as before.
    """
    kept = process(connections)

    def meanwhile(cursor: Any) -> tuple[int, int]:
        return its_process(cursor), process(connections)

    first, second = connections.execute("SELECT 1", {}, meanwhile)
    assert first == kept != second
    assert process(connections) == kept


def test_a_connection_in_use_is_closed_after_its_statement(
    engine: Engine, connections: Connections
) -> None:
    """All connections are closed while statement A is not answered yet. A is answered; then its
    connection is closed.
    """

    def meanwhile(cursor: Any) -> tuple[Any, Any]:
        engine.dispose()
        return cursor.connection, cursor.fetchall()

    connection, rows = connections.execute("SELECT 1", {}, meanwhile)
    assert (connection.closed, rows) == (True, [(1,)])


def test_a_connection_that_becomes_outdated_just_before_its_return_is_closed(
    engine: Engine, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finds its connection good; B closes all connections, but finds A's in use; A returns its
    connection. No statement may use it again.
    """
    lock = connections._in_use

    class Late:
        acquire = lock.acquire
        disposed = False

        def release(self) -> None:
            if not self.disposed:
                self.disposed = True
                engine.dispose()
            lock.release()

    monkeypatch.setattr(connections, "_in_use", Late())
    kept = connections.execute("SELECT 1", {}, lambda cursor: cursor.connection)
    assert kept.closed


def test_closing_the_pool_closes_the_kept_connection(
    engine: Engine, connections: Connections
) -> None:
    kept = connections.execute("SELECT 1", {}, lambda cursor: cursor.connection)
    engine.dispose()
    assert kept.closed


def test_a_connection_that_met_an_error_is_not_used_again(connections: Connections) -> None:
    kept = connections.execute("SELECT 1", {}, lambda cursor: cursor.connection)
    with pytest.raises(psycopg.errors.UndefinedTable):
        connections.execute("SELECT * FROM nothing", {}, its_process)
    assert kept.closed
    assert process(connections)


def test_a_connection_interrupted_in_mid_statement_is_not_used_again(
    connections: Connections,
) -> None:
    """A time limit interrupts the caller after the statement was sent and before it was
    answered.
    """
    kept = connections.execute("SELECT 1", {}, lambda cursor: cursor.connection)

    def interrupt(cursor: Any) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        connections.execute("SELECT 1", {}, interrupt)
    assert kept.closed
    assert process(connections)


def test_one_dead_connection_makes_the_pool_drop_all(
    engine: Engine, connections: Connections, postgres_url: str
) -> None:
    """The server ends all sessions. The error of the first connection makes the pool drop its other
    connections.
    """
    process(connections)
    with engine.connect() as pooled:
        before = pooled.exec_driver_sql("SELECT pg_backend_pid()").scalar()
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    with pytest.raises(psycopg.OperationalError):
        process(connections)
    with engine.connect() as pooled:
        assert pooled.exec_driver_sql("SELECT pg_backend_pid()").scalar() != before


def test_a_pool_grows_up_to_its_limit_and_keeps_its_size(engine: Engine) -> None:
    """The pool grows while all its connections are in use. It keeps its size, also after all
    connections were closed.
    """
    store = SqlStore(engine, "kv_store")
    held = [engine.connect(), engine.connect()]
    store.allow(4)
    store.allow(3)
    held += [engine.connect(), engine.connect()]
    assert pool_of(engine).checkedout() == 4
    assert pool_of(engine)._inc_overflow() is False
    for connection in held:
        connection.close()
    assert pool_of(engine).checkedin() == 4
    engine.dispose()
    assert (pool_of(engine).size(), pool_of(engine).checkedin()) == (4, 0)


def test_a_connection_in_use_is_closed_when_it_returns_to_a_closed_pool(
    engine: Engine,
) -> None:
    """Statement A waits for a lock; statement B finds the server gone, and closes the pool; then
    A's connection is returned.
    """
    connection = engine.raw_connection()
    drivers: Any = connection.dbapi_connection
    engine.dispose()
    assert not drivers.closed
    connection.close()
    assert drivers.closed


def test_a_connection_that_returns_while_its_pool_is_closed_is_closed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A returns a connection and finds the pool open; B closes the pool; A puts the connection into
    the pool.
    """
    connection = engine.raw_connection()
    drivers: Any = connection.dbapi_connection
    pool = pool_of(engine)
    put = pool._pool.put

    def put_late(*arguments: Any) -> None:
        engine.dispose()
        put(*arguments)

    monkeypatch.setattr(pool._pool, "put", put_late)
    connection.close()
    assert drivers.closed


def test_a_connection_in_use_is_closed_after_its_memory_store_was_closed() -> None:
    """One thread reads while another closes the store. The connection is closed when the reading
    has ended.
    """
    engine = make_engine(parse_url("memory://"), io_timeout=5.0)
    connection = engine.raw_connection()
    drivers: Any = connection.dbapi_connection
    engine.dispose()
    assert is_open(drivers)
    connection.close()
    assert not is_open(drivers)


def is_open(connection: sqlite3.Connection) -> bool:
    try:
        connection.cursor()
    except sqlite3.ProgrammingError:
        return False
    return True


def test_a_database_in_memory_never_has_more_than_one_connection() -> None:
    engine = make_engine(parse_url("memory://"), io_timeout=5.0, pool_size=2)
    SqlStore(engine, "kv_store").allow(4)
    pool: Any = engine.pool
    assert (pool.size(), pool._max_overflow) == (1, 0)


def pool_of(engine: Engine) -> GrowingPool:
    assert isinstance(engine.pool, GrowingPool)
    return engine.pool
