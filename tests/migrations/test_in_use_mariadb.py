"""Upgrading a table of MariaDB while other connections use it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pymysql
import pytest
from sqlalchemy import make_url

from celery_singleton_state.migrations import unobtrusive
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.store.base import StoreUnavailable
from tests.helpers.mariadb import MariaDB
from tests.helpers.tables import ALL_COLUMNS, columns_and_indexes, execute, given_table
from tests.helpers.waiting import wait_until

Connect = Callable[..., pymysql.cursors.Cursor]


@pytest.fixture
def connect(mariadb: MariaDB, mariadb_url: str) -> Iterator[Connect]:
    """Return a function that opens connections whose waits for locks time out after 20 s."""
    with ExitStack() as stack:

        def open_one(autocommit: bool) -> pymysql.cursors.Cursor:
            connection = stack.enter_context(mariadb.connect(make_url(mariadb_url).database))
            connection.autocommit(autocommit)
            cursor = connection.cursor()
            cursor.execute("SET SESSION lock_wait_timeout = 20")
            return cursor

        yield open_one


@pytest.fixture
def reader(
    mariadb_url: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> pymysql.cursors.Cursor:
    """Return a connection that has read a table of three columns in an open transaction."""
    monkeypatch.setattr(unobtrusive, "PAUSE", 0.1)
    execute(
        mariadb_url,
        given_table(mariadb_url),
        "INSERT INTO kv_store (`key`, value) VALUES ('k', '1')",
    )
    cursor = connect(autocommit=False)
    cursor.execute("SELECT * FROM kv_store")
    return cursor


def test_others_use_the_table_while_the_upgrade_waits_for_a_reader(
    mariadb_url: str,
    connect: Connect,
    reader: pymysql.cursors.Cursor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reads, and does not end its transaction; the upgrade asks for the table's lock, gives up,
    and asks again; B reads and writes all the while; A's transaction ends. The table must be
    upgraded.
    """
    other = connect(autocommit=True)
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING):
        upgraded = pool.submit(migrate_url, mariadb_url, "kv_store")

        def tried_twice() -> bool:
            other.execute("SELECT * FROM kv_store")
            other.execute("UPDATE kv_store SET value = '2'")
            return caplog.text.count("table kv_store is locked, trying again: ") >= 2

        wait_until(tried_twice, "the upgrade was tried twice")
        assert not upgraded.done()
        reader.connection.rollback()
        upgraded.result()
    assert columns_and_indexes(mariadb_url)[0] == ALL_COLUMNS


def test_a_failed_upgrade_says_how_to_find_the_locks_holder(
    mariadb_url: str, reader: pymysql.cursors.Cursor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unobtrusive, "PATIENCE", 0.0)
    with pytest.raises(StoreUnavailable, match=r"kv_store could not be upgraded.* PROCESSLIST"):
        migrate_url(mariadb_url, "kv_store")
    assert columns_and_indexes(mariadb_url)[0] == {"key", "value", "updated_at"}
    reader.connection.rollback()
    migrate_url(mariadb_url, "kv_store")
    assert columns_and_indexes(mariadb_url)[0] == ALL_COLUMNS


@pytest.mark.parametrize(
    ("column", "becomes"),
    [
        (
            "DATETIME NOT NULL DEFAULT CURRENT_TIMESTAMP",
            "datetime(6) NOT NULL DEFAULT current_timestamp(6)",
        ),
        (
            "TIMESTAMP NOT NULL DEFAULT now() ON UPDATE now()",
            "timestamp(6) NOT NULL DEFAULT current_timestamp(6) ON UPDATE current_timestamp(6)",
        ),
        ("DATETIME(3) NOT NULL", "datetime(6) NOT NULL"),
    ],
)
def test_an_upgrade_makes_times_precise_to_the_microsecond(
    mariadb_url: str, connect: Connect, column: str, becomes: str
) -> None:
    """If a commit's answer is lost, the commit is recognised by its time. So two commits within a
    second need different times.
    """
    cursor = connect(autocommit=True)
    cursor.execute(
        "CREATE TABLE kv_store (`key` VARCHAR(100) PRIMARY KEY,"
        f" value TEXT NOT NULL DEFAULT 'null', updated_at {column})"
    )
    cursor.execute("INSERT INTO kv_store (`key`, updated_at) VALUES ('k', '2026-01-02 03:04:05')")
    migrate_url(mariadb_url, "kv_store")
    cursor.execute("SHOW CREATE TABLE kv_store")
    (_, table), *_ = cursor.fetchall()
    assert f"`updated_at` {becomes}," in table
    assert "`value` longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEF" in table
    cursor.execute("SELECT value, CAST(updated_at AS CHAR) FROM kv_store")
    assert cursor.fetchall() == (("null", "2026-01-02 03:04:05.000000"),)
