"""Upgrading a table of PostgreSQL while other connections use it."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from celery_singleton_state.migrations import concurrent_index, unobtrusive
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.store.base import StoreUnavailable
from tests.helpers.pgbouncer import PgBouncer
from tests.helpers.servers import Postgres
from tests.helpers.tables import ALL_COLUMNS, columns_and_indexes, execute, given_table
from tests.helpers.waiting import wait_until

Connect = Callable[..., psycopg.Connection[Any]]

VALID = "SELECT indisvalid FROM pg_index WHERE indrelid = '{table}'::regclass AND NOT indisprimary"
WAITS = """
SELECT 1 FROM pg_stat_activity WHERE query LIKE 'LOCK TABLE%' AND wait_event_type = 'Lock'
"""
BUILDS = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONCURRENTLY%'"


@pytest.fixture
def connect(postgres_url: str) -> Iterator[Connect]:
    """Return a function that opens connections whose statements time out after 20 s."""
    with ExitStack() as stack:

        def open_one(name: str, **options: Any) -> psycopg.Connection[Any]:
            dsn = postgres_url.replace("+psycopg", "")
            connection = psycopg.connect(
                dsn, application_name=name, options="-c statement_timeout=20s", **options
            )
            return stack.enter_context(connection)

        yield open_one


@pytest.fixture
def watch(connect: Connect) -> psycopg.Connection[Any]:
    return connect("watch", autocommit=True)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def table(postgres_url: str) -> str:
    """Make a table of three columns, with its index and a row; return its name."""
    make_table(postgres_url, "kv_store")
    execute(postgres_url, "CREATE INDEX idx_kv_store_updated_at ON kv_store (updated_at)")
    return "kv_store"


def make_table(url: str, name: str) -> None:
    """Make a table of three columns, without an index, and insert a row."""
    execute(url, given_table(url, name), f"INSERT INTO {name} (key, value) VALUES ('old', '1')")


def is_valid(watch: psycopg.Connection[Any], table: str = "kv_store") -> list[bool]:
    """Return for each index of the table, except the primary key's, whether it is valid."""
    return [valid for (valid,) in watch.execute(VALID.format(table=table))]


@pytest.fixture
def short_lock_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the upgrade's lock timeouts, and the pauses before it asks for the lock again."""
    monkeypatch.setattr(unobtrusive, "LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(concurrent_index, "LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(unobtrusive, "PAUSE", 0.1)


@pytest.mark.usefixtures("table", "short_lock_timeouts")
def test_others_use_the_table_while_the_upgrade_waits_for_a_reader(
    postgres_url: str,
    connect: Connect,
    watch: psycopg.Connection[Any],
    pool: ThreadPoolExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reads, and does not end its transaction; the upgrade asks for the table's lock, gives up,
    and asks again; B reads and writes all the while; A's transaction ends. The table must be
    upgraded.
    """
    reader = connect("slow reader")
    reader.execute("SELECT * FROM kv_store")
    with caplog.at_level(logging.WARNING):
        upgraded = pool.submit(migrate_url, postgres_url, "kv_store")

        def tried_thrice() -> bool:
            watch.execute("SELECT * FROM kv_store")
            watch.execute("UPDATE kv_store SET value = '2'")
            return caplog.text.count("table kv_store is locked, trying again: pid") >= 3

        wait_until(tried_thrice, "the upgrade was tried three times")
        assert "slow reader, role postgres, idle in transaction since" in caplog.text
        assert not upgraded.done()
        reader.rollback()
        upgraded.result()
    assert columns_and_indexes(postgres_url)[0] == ALL_COLUMNS


@pytest.mark.usefixtures("table", "short_lock_timeouts")
def test_a_failed_upgrade_says_which_process_holds_the_lock(
    postgres_url: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unobtrusive, "PATIENCE", 0.0)
    reader = connect("slow reader")
    reader.execute("SELECT * FROM kv_store")
    who = f"kv_store could not be upgraded.* pid {reader.info.backend_pid}, slow reader, role post"
    with pytest.raises(StoreUnavailable, match=who):
        migrate_url(postgres_url, "kv_store")
    reader.rollback()
    assert columns_and_indexes(postgres_url)[0] == {"key", "value", "updated_at"}
    migrate_url(postgres_url, "kv_store")
    assert columns_and_indexes(postgres_url)[0] == ALL_COLUMNS


@pytest.fixture
def writer(postgres_url: str, connect: Connect) -> psycopg.Connection[Any]:
    """Return a connection that has written to a table without an index, and has not ended its
    transaction, so that an index build has to wait.
    """
    make_table(postgres_url, "kv_store")
    connection = connect("slow writer")
    connection.execute("INSERT INTO kv_store (key, value) VALUES ('slow', '1')")
    return connection


def test_others_write_while_the_index_is_built(
    postgres_url: str,
    writer: psycopg.Connection[Any],
    watch: psycopg.Connection[Any],
    pool: ThreadPoolExecutor,
) -> None:
    upgraded = pool.submit(migrate_url, postgres_url, "kv_store")
    wait_until(lambda: is_valid(watch) == [False], "the index is being built")
    watch.execute("INSERT INTO kv_store (key, value) VALUES ('quick', '1')")
    watch.execute("UPDATE kv_store SET value = '2', updated_at = now() WHERE key = 'old'")
    assert is_valid(watch) == [False]
    writer.commit()
    upgraded.result()
    assert is_valid(watch) == [True]
    assert columns_and_indexes(postgres_url)[1] == [("idx_kv_store_updated_at", ["updated_at"])]
    found = watch.execute("SELECT key, value FROM kv_store ORDER BY key").fetchall()
    assert found == [("old", "2"), ("quick", "1"), ("slow", "1")]


@pytest.mark.parametrize("name", ["kv_store", '"Jobs-2"."kv Store"'])
def test_an_index_is_built_again_after_a_cancelled_build(
    postgres_url: str,
    connect: Connect,
    watch: psycopg.Connection[Any],
    pool: ThreadPoolExecutor,
    name: str,
) -> None:
    execute(postgres_url, 'CREATE SCHEMA "Jobs-2"')
    make_table(postgres_url, name)
    writer = connect("slow writer")
    writer.execute(f"INSERT INTO {name} (key, value) VALUES ('slow', '1')")
    plain = name.replace('"', "")
    broken = pool.submit(migrate_url, postgres_url, plain)
    wait_until(lambda: is_valid(watch, name) == [False], "the index is being built")
    watch.execute(f"SELECT pg_cancel_backend(pid) FROM ({BUILDS}) AS build")
    with pytest.raises(OperationalError, match="canceling statement"):
        broken.result()
    writer.commit()
    assert is_valid(watch, name) == [False]

    for _ in range(2):
        migrate_url(postgres_url, plain)
        assert is_valid(watch, name) == [True]
    (count,) = watch.execute(f"SELECT count(*) FROM {name} WHERE fence IS NULL").fetchone() or (0,)
    assert count == 2


@pytest.mark.usefixtures("short_lock_timeouts")
def test_an_upgrade_waits_for_an_index_build_whose_client_died(
    postgres_url: str,
    writer: psycopg.Connection[Any],
    watch: psycopg.Connection[Any],
    pool: ThreadPoolExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A builds the index, and waits for a writer's transaction; A's process is killed, but its
    build continues in the database; B starts an upgrade, and waits for this build, while others
    write; the writer's transaction ends. A's build ends, because B holds no snapshot for which the
    build would have to wait. B must keep A's index.
    """
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=migrate_url, args=(postgres_url, "kv_store"), daemon=True)
    process.start()
    wait_until(lambda: is_valid(watch) == [False], "the index is being built")
    process.kill()
    process.join()
    index = "SELECT 'idx_kv_store_updated_at'::regclass::oid::int"
    before = watch.execute(index).fetchone()

    with caplog.at_level(logging.WARNING):
        upgraded = pool.submit(migrate_url, postgres_url, "kv_store")
        wait_until(lambda: caplog.text.count("is locked, trying again: pid") >= 2, "B waits")
    watch.execute("UPDATE kv_store SET value = '2'")
    assert is_valid(watch) == [False]
    wait_until(lambda: watch.execute(WAITS).fetchall(), "B waits for the lock")
    writer.commit()
    upgraded.result()
    assert (is_valid(watch), watch.execute(index).fetchone()) == ([True], before)
    assert columns_and_indexes(postgres_url)[0] == ALL_COLUMNS


@pytest.mark.usefixtures("table")
def test_an_index_of_another_name_is_kept(
    postgres_url: str, watch: psycopg.Connection[Any]
) -> None:
    watch.execute("ALTER INDEX idx_kv_store_updated_at RENAME TO by_time")
    migrate_url(postgres_url, "kv_store")
    assert columns_and_indexes(postgres_url)[1] == [("by_time", ["updated_at"])]


def test_an_index_build_does_not_wait_for_waiting_upgrades(
    postgres: Postgres,
    pgbouncer: PgBouncer,
    postgres_url: str,
    writer: psycopg.Connection[Any],
    watch: psycopg.Connection[Any],
) -> None:
    """A builds the index, and waits for a writer's transaction; more upgrades are started than the
    pooler has connections; the writer's transaction ends. All upgrades must succeed: A does not
    wait for the upgrades that wait for A.
    """
    url = postgres_url.replace(f":{postgres.port}/", f":{pgbouncer.port}/")
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=migrate_url, args=(url, "kv_store"), daemon=True) for _ in range(5)
    ]
    processes[0].start()
    wait_until(lambda: is_valid(watch) == [False], "the index is being built")
    for process in processes[1:]:
        process.start()
    database = url.rpartition("/")[2]

    def connected() -> bool:
        # The first upgrade opens two connections, and each other upgrade opens one.
        return pgbouncer.log.read_text().count(f"login attempt: db={database}") > len(processes)

    wait_until(connected, "the others have connected")
    writer.commit()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    assert is_valid(watch) == [True]
