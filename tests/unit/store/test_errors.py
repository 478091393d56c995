"""How the error codes of databases and drivers become errors of the store, without a database."""

from __future__ import annotations

import sqlite3
from typing import Any

import psycopg
import pymysql
import pytest
from redis import exceptions as redis_errors
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from celery_singleton_state.store.base import (
    StoreMisconfigured,
    StoreNotReady,
    StoreRefusesValue,
    StoreUnavailable,
)
from celery_singleton_state.store.redis import errors
from celery_singleton_state.store.sql.errors import as_store_error

IS_TEMPORARY, IS_REFUSED, IS_SET_UP_WRONG = StoreUnavailable, StoreRefusesValue, StoreMisconfigured


def of_state(state: str | None, text: str = "a text in any language") -> psycopg.Error:
    kind = psycopg.errors.lookup(state) if state else psycopg.OperationalError
    return kind(text)


def of_number(number: int) -> pymysql.Error:
    return pymysql.OperationalError(number, "a text")


def of_code(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("a text")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("states", "kind"),
    [
        ("08000 08003 08006 08001 40001 40P01 53000 53100 53200 53300", IS_TEMPORARY),
        (
            "55P03 55006 57014 57P01 57P02 57P03 57P05 58000 58030 25006 25P03 XX000 XX001",
            IS_TEMPORARY,
        ),
        ("P0001 P0002 P0004 38000 39000", IS_TEMPORARY),
        ("22021 22P05 22001 22003 22P02 22P03 22023 23514 44000 54000 54001", IS_REFUSED),
        ("28000 28P01 3D000 42501 42601 42804 42883 42P10 23502 23505 0A000", IS_SET_UP_WRONG),
        ("42P01 42703 3F000", StoreNotReady),
    ],
)
def test_sqlstates_become_store_errors(states: str, kind: type) -> None:
    for state in states.split():
        assert type(as_store_error(of_state(state), "t")) is kind, state


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            'connection failed: FATAL:  password authentication failed for user "w"',
            StoreMisconfigured,
        ),
        ('FATAL:  database "shop" does not exist', StoreMisconfigured),
        ('FATAL:  role "w" does not exist', StoreMisconfigured),
        ('FATAL:  no pg_hba.conf entry for host "1.2.3.4"', StoreMisconfigured),
        ("FATAL:  the database system is starting up", IS_TEMPORARY),
        ("connection refused", IS_TEMPORARY),
        (
            'Multiple connection attempts failed: FATAL:  database "a" does not exist; refused',
            IS_TEMPORARY,
        ),
    ],
)
def test_errors_at_connecting_have_no_sqlstate(text: str, kind: type) -> None:
    assert type(as_store_error(of_state(None, text), "t")) is kind


def test_an_outdated_query_plan_is_temporary() -> None:
    error = of_state("0A000", "cached plan must not change result type")
    assert type(as_store_error(error, "t")) is IS_TEMPORARY


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        (
            (1040, 1205, 1213, 1317, 1927, 2002, 2003, 2006, 2013, 1792, 1836, 3024, 1644),
            IS_TEMPORARY,
        ),
        ((1366, 1406, 1264, 1690, 1153, 1301, 1118, 1267, 1292, 3140, 3819, 4025), IS_REFUSED),
        ((1180, 3100), IS_REFUSED),
        ((1045, 1049, 1044, 1142, 1364, 1064, 2061), IS_SET_UP_WRONG),
        ((1146, 1054), StoreNotReady),
    ],
)
def test_mysqls_error_numbers_become_store_errors(numbers: tuple[int, ...], kind: type) -> None:
    for number in numbers:
        error = of_number(number)
        assert type(as_store_error(error, "t")) is kind, number
        wrapped = DBAPIError("SELECT", {}, error)
        assert type(as_store_error(wrapped, "t")) is kind, number


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *(
            (of_state(state), IS_TEMPORARY)
            for state in ("54000", "54001", "54023", "22023", "P0001")
        ),
        *((of_state(state), IS_SET_UP_WRONG) for state in ("23514", "44000")),
        # Each statement has a key, and the database can refuse that.
        *((of_state(state), IS_REFUSED) for state in ("22021", "22P05", "22001", "22003")),
        *((pymysql.OperationalError(code, "a text"), IS_TEMPORARY) for code in (1180, 3100, 1644)),
        *(
            (pymysql.OperationalError(code, "a text"), IS_SET_UP_WRONG)
            for code in (3819, 4025, 1267)
        ),
        (pymysql.OperationalError(1366, "a text"), IS_REFUSED),
        (of_code(sqlite3.SQLITE_CONSTRAINT_CHECK), IS_SET_UP_WRONG),
    ],
)
def test_a_statement_without_a_state_is_not_refused_for_its_state(
    error: Exception, kind: type
) -> None:
    """Statements without a state acquire or renew a lease, or release it without a new state."""
    assert type(as_store_error(error, "t", carries_value=False)) is kind


def test_a_server_that_must_be_vacuumed_is_unavailable() -> None:
    """PostgreSQL then accepts no writes. It reports this with the SQLSTATE of a value that is too
    large.
    """
    text = "database is not accepting commands that assign new XIDs to avoid wraparound data loss"
    assert type(as_store_error(of_state("54000", text), "t")) is IS_TEMPORARY


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (of_code(sqlite3.SQLITE_BUSY), IS_TEMPORARY),
        (of_code(sqlite3.SQLITE_IOERR_FSYNC), IS_TEMPORARY),
        (of_code(sqlite3.SQLITE_FULL), IS_TEMPORARY),
        (of_code(sqlite3.SQLITE_CONSTRAINT_TRIGGER), IS_TEMPORARY),
        (of_code(sqlite3.SQLITE_TOOBIG), IS_REFUSED),
        (of_code(sqlite3.SQLITE_CONSTRAINT_CHECK), IS_REFUSED),
        (of_code(sqlite3.SQLITE_CONSTRAINT_NOTNULL), IS_SET_UP_WRONG),
        (of_code(sqlite3.SQLITE_NOTADB), IS_SET_UP_WRONG),
        (of_code(sqlite3.SQLITE_CORRUPT), IS_SET_UP_WRONG),
        (sqlite3.OperationalError("integer overflow"), IS_REFUSED),
        (sqlite3.InterfaceError("Error binding parameter 1: type is not supported"), IS_REFUSED),
        (sqlite3.OperationalError("no such table: t"), StoreNotReady),
        (OverflowError("Python int too large to convert to SQLite INTEGER"), IS_REFUSED),
        (UnicodeEncodeError("utf-8", "\udc80", 0, 1, "surrogates not allowed"), IS_REFUSED),
        (psycopg.DataError("PostgreSQL text fields cannot contain NUL (0x00) bytes"), IS_REFUSED),
        (psycopg.InterfaceError("the connection is closed"), IS_TEMPORARY),
        (of_state("XX000", "invalid memory alloc request size 2000000004"), IS_REFUSED),
        (PoolTimeoutError("QueuePool limit"), IS_TEMPORARY),
    ],
)
def test_sqlites_codes_and_errors_without_code_become_store_errors(
    error: Exception, kind: type
) -> None:
    assert type(as_store_error(error, "t")) is kind


def test_row_level_security_is_told_apart_from_a_missing_grant() -> None:
    text_of_error = str(
        as_store_error(of_state("42501", "new row violates row-level security policy"), "t")
    )
    assert "CREATE POLICY" in text_of_error
    assert "GRANT" not in text_of_error
    assert "GRANT" in str(as_store_error(of_state("42501", "permission denied for table t"), "t"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (redis_errors.ConnectionError("Connection reset by peer"), IS_TEMPORARY),
        (redis_errors.BusyLoadingError("loading the dataset in memory"), IS_TEMPORARY),
        (
            redis_errors.OutOfMemoryError("command not allowed when used memory > 'maxmemory'"),
            IS_TEMPORARY,
        ),
        (redis_errors.ResponseError("Protocol error: invalid bulk length"), IS_REFUSED),
        (redis_errors.ResponseError("increment or decrement would overflow"), IS_REFUSED),
        (redis_errors.DataError("Invalid input of type: 'object'"), IS_REFUSED),
        (UnicodeEncodeError("utf-8", "\udc80", 0, 1, "surrogates not allowed"), IS_REFUSED),
        (redis_errors.AuthenticationError("invalid username-password pair"), IS_SET_UP_WRONG),
    ],
)
def test_errors_of_redis_become_store_errors(error: Any, kind: type) -> None:
    assert type(errors.as_store_error(error)) is kind
