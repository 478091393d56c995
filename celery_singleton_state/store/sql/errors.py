"""Classify a database's errors, and turn them into the errors of a store.

An error has one of four meanings:

- the statement was rolled back and can be sent again at once;
- the database is unavailable for a while;
- the database cannot hold the value;
- the operator has to correct the set-up.

An error that is not in the tables below counts as "unavailable for a while", because no run may
fail for good only because the store was unavailable.
"""

from __future__ import annotations

import re

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from celery_singleton_state.store.base import (
    StoreError,
    StoreMisconfigured,
    StoreNotReady,
    StoreRefusesValue,
    StoreUnavailable,
    one_line,
)
from celery_singleton_state.store.connecting import was_connecting

from .refused_connections import advice_of_connecting

# In the constants below a text is an SQLSTATE of PostgreSQL, and a number is an error number of
# MySQL and MariaDB, unless the constant's comment says otherwise.

#: Codes of errors that mean: a table, a column or a schema does not exist.
_NOT_READY = frozenset({"42P01", "42703", "3F000", 1146, 1054})
#: Parts of SQLite's messages that mean: a table or a column does not exist.
_NOT_READY_TEXTS = ("no such table", "no such column", "has no column")
#: Codes of errors that mean: because of a deadlock or a serialization failure, the database has
#: rolled a statement back.
_ROLLED_BACK = frozenset({"40001", "40P01", 1213})
#: PostgreSQL's code of errors that mean: a privilege on an object of any kind is missing.
_FORBIDDEN_ON_POSTGRESQL = "42501"
#: Codes of errors that mean: a privilege is missing. MySQL has three codes: for a privilege on the
#: database, on the table and on a column.
_FORBIDDEN = frozenset({_FORBIDDEN_ON_POSTGRESQL, 1044, 1142, 1143})
#: Codes of errors that mean: the wait for another transaction's lock has timed out.
_LOCKED = frozenset({"55P03", 1205})
#: PostgreSQL's codes of errors that mean: on this connection the name of a prepared statement is
#: already in use, or is unknown.
_UNPREPARED = frozenset({"42P05", "26000"})
#: PostgreSQL's code of several errors. One of them means: a pooler has mixed up prepared
#: statements, so that the server executes a statement with another number of parameters.
_PROTOCOL_VIOLATION = "08P01"

#: Codes of errors that mean: the server is read-only, because it is a standby, or a primary that a
#: failover has demoted.
_READ_ONLY = frozenset({"25006", 1792, 1836})
#: MySQL's number of an error that means: an option of the server, such as ``--read-only``, forbids
#: the statement.
_PREVENTED = 1290

#: The first characters of PostgreSQL's SQLSTATEs for values that the database can never hold: data
#: that is too long, out of range or cannot be converted (22), data that a check of the table
#: (23514) or of a view (44) refuses, and data beyond a limit of the server, for example on the size
#: of an indexed text (54).
_VALUE_STATES = ("22", "23514", "44", "54")
#: MySQL's numbers for values that the database can never hold: the column's character set lacks a
#: character (1267, 1300, 1366, 3854, 3988), the value is too large (1118, 1153, 1301, 1406; in a
#: cluster 1180, 3100), out of range (1264, 1690), cannot be converted (1265, 1292), is not JSON
#: (3140, 3141, 4037, 4038), or a check refuses it (3819, 4025).
_VALUE_NUMBERS = frozenset(
    {1118, 1153, 1180, 1264, 1265, 1267, 1292, 1300, 1301, 1366, 1406, 1690}
    | {3100, 3140, 3141, 3819, 3854, 3988, 4025, 4037, 4038}
)
#: SQLite's error codes for values that it can never hold: SQLITE_TOOBIG, SQLITE_MISMATCH, and
#: SQLITE_CONSTRAINT_CHECK for a check of the table.
_VALUE_CODES = frozenset({18, 20, 275})
#: The first characters of SQLSTATEs that are about a value only if the statement carries a value
#: from outside this package. Other statements fail with these SQLSTATEs for another reason, for
#: example a wrong set-up.
_STATES_ONLY_OF_VALUES = ("22023", "23514", "44", "54")
#: Error numbers of MySQL and SQLite that are about a value only if the statement carries a value
#: from outside this package. Other statements fail with these numbers for another reason.
_NUMBERS_ONLY_OF_VALUES = frozenset({275, 1180, 1267, 3100, 3819, 4025})
#: Codes of errors that mean: the database's encoding lacks a character of a text.
_TEXTS = frozenset({"22021", "22P05", 1300, 1366, 3854, 3988})
#: Functions in PostgreSQL's source that raise SQLSTATE 54000 for every write until the database is
#: vacuumed (transaction id wraparound). So an error of these functions is not about a value,
#: although other errors with this SQLSTATE are.
_WRAPAROUND = ("GetNewTransactionId", "GetNewMultiXactId")
#: SQLite's code SQLITE_CONSTRAINT_TRIGGER: a trigger of the table has raised an error of its own.
#: So the advice about broken constraints does not apply.
_SQLITE_TRIGGER = 1811
#: Parts of messages about a value that the database can never hold, from errors without a specific
#: code: SQLite's overflow, PostgreSQL's limit of memory for one value, and a value whose type the
#: driver does not support.
_VALUE_TEXTS = ("integer overflow", "invalid memory alloc request size", "Error binding parameter")

#: A part of Python's message about a text in SQLite that is not UTF-8.
_UNREADABLE = "Could not decode to UTF-8"
_CANNOT_HOLD = "the database cannot hold the value"

#: Codes of errors that mean: a number is larger than its column can hold.
_OUT_OF_RANGE = frozenset({"22003", 1264, 1690})

_OTHER_TABLE = (
    "the table differs from the one that this package creates: set singleton_table to the name of "
    "a table of its own, or remove added constraints and added columns that must not be NULL"
)
_LOGIN = "set the user and the password in singleton_store_url, and let this user log in"
_NO_DATABASE = "create the database, or set its name in singleton_store_url"
_COLLATION = (
    "give all text columns of the table one collation of utf8mb4, and key and value utf8mb4_bin"
)
_PLUGIN = (
    "install the plugin or package that the message names (pip install 'pymysql[rsa]'), or let the "
    "user log in by another authentication method"
)
#: Advice about PostgreSQL's errors of a wrong set-up. Each item has the first characters of an
#: SQLSTATE, and what the operator has to do.
_SETUP_STATES = (
    ("28", _LOGIN),
    ("3D", _NO_DATABASE),
    ("23", _OTHER_TABLE),
    ("44", _OTHER_TABLE),
    ("42", _OTHER_TABLE),
    ("0A", "this server, or the pooler in front of it, lacks a feature that this package needs"),
)
#: Advice about MySQL's errors of a wrong set-up: maps each error number to what the operator has to
#: do.
_SETUP_NUMBERS = {
    **dict.fromkeys((1045, 1130, 1251, 1698), _LOGIN),
    **dict.fromkeys((1046, 1049), _NO_DATABASE),
    **dict.fromkeys((1048, 1062, 1364, 1451, 1452, 3819, 4025), _OTHER_TABLE),
    **dict.fromkeys((1267, 1270, 1271), _COLLATION),
    **dict.fromkeys((2059, 2061), _PLUGIN),
    **dict.fromkeys((1064, 1305), "MariaDB from 10.6 on, or MySQL 8, is needed"),
}
#: Advice about SQLite's errors of a wrong set-up: maps each primary result code (SQLITE_CORRUPT,
#: SQLITE_CONSTRAINT, SQLITE_NOTADB) to what the operator has to do.
_SETUP_CODES = {
    11: "restore the file from a backup",
    19: _OTHER_TABLE,
    26: "set singleton_store_url to an SQLite file, or to a file that does not exist yet",
}
#: Advice about connections that PostgreSQL refuses because of a wrong set-up. Each item has a
#: pattern that matches the error's text, because these errors have no SQLSTATE, and what the
#: operator has to do.
_SETUP_TEXTS = (
    ("password authentication failed|no pg_hba.conf entry|no password supplied", _LOGIN),
    ('FATAL: +role ".*" (does not exist|is not permitted to log in)', _LOGIN),
    ('FATAL: +database ".*" does not exist', _NO_DATABASE),
    ("FATAL: +permission denied for database", "GRANT CONNECT ON DATABASE to the worker's role"),
)

#: The privileges on the table that a worker's role needs.
PRIVILEGES = "SELECT, INSERT, UPDATE, DELETE"
#: A placeholder for the role's name in advice to the operator.
ROLE = "<the worker's role>"

#: The marks of PostgreSQL's error about a prepared statement whose columns an ``ALTER TABLE`` has
#: changed: the function in PostgreSQL's source that raises the error, and the error's text. Such an
#: error passes, because the statement works when it is prepared anew.
_OUTDATED_PLAN = ("RevalidateCachedQuery", "cached plan must not change result type")

#: Python's own errors that drivers raise for a value that they cannot send. SQLAlchemy does not
#: wrap them into its errors.
REFUSED_BY_DRIVER = (UnicodeError, OverflowError)


def as_store_error(error: Exception, table: str, carries_value: bool = True) -> StoreError:
    """Turn an error of the driver or of SQLAlchemy into the :exc:`StoreError` that it means.

    :param table: the table's name, quoted if the database needs that.
    :param carries_value: whether the statement carried a value from outside this package, such as
        a state.
    """
    error = getattr(error, "orig", None) or error
    text = one_line(error)
    if is_unprepared(error):
        return StoreMisconfigured(
            f"{text}; the pooler in front of the database does not support prepared statements, "
            "and may run another client's statement instead: set prepare_threshold=none in "
            "singleton_store_url, or remove prepare_threshold from it"
        )
    if is_of_policy(error):
        return StoreMisconfigured(f"{text}; {policy_advice(table, ROLE)}")
    if is_forbidden(error):
        schema, _, _bare = table.rpartition(".")
        uses = _code(error) == _FORBIDDEN_ON_POSTGRESQL and schema
        usage = f"GRANT USAGE ON SCHEMA {schema} TO {ROLE}; " if uses else ""
        return StoreMisconfigured(
            f"{text}; run as the table's owner: {usage}{grant(PRIVILEGES, table, ROLE)}"
        )
    if _code(error) in _NOT_READY or any(part in text for part in _NOT_READY_TEXTS):
        return StoreNotReady(
            f"table {table} is missing or of an older release ({text}); "
            "run: celery -A <your app> singleton migrate"
        )
    if is_of_value(error, carries_value):
        is_read = isinstance(error, UnicodeDecodeError) or _UNREADABLE in text
        what = "the database holds a text that is not UTF-8" if is_read else _CANNOT_HOLD
        return StoreRefusesValue(f"{what}: {text}", _is_of_text(error))
    advice = _advice(error)
    return StoreMisconfigured(f"{text}; {advice}") if advice else StoreUnavailable(text)


def is_undone(error: Exception) -> bool:
    """Return whether an error means that a statement was rolled back and can be sent again at once.

    The reason is a deadlock or a serialization failure.
    """
    return _code(error) in _ROLLED_BACK


def is_forbidden(error: Exception) -> bool:
    """Return whether an error means that the role lacks a privilege."""
    return _code(error) in _FORBIDDEN


def is_of_policy(error: Exception) -> bool:
    """Return whether an error means that PostgreSQL's row-level security refused a row."""
    error = getattr(error, "orig", None) or error
    if _code(error) != _FORBIDDEN_ON_POSTGRESQL:
        return False
    return _raised_by(error, "ExecWithCheckOptions", "row-level security")


def is_locked(error: Exception) -> bool:
    """Return whether an error means that the wait for another transaction's lock timed out."""
    return _code(error) in _LOCKED


def is_read_only(error: Exception) -> bool:
    """Return whether an error means that the server refuses writes because it is read-only.

    A new connection may reach another server, which accepts writes.
    """
    code = _code(error)
    return code in _READ_ONLY or (code == _PREVENTED and "read-only" in str(error))


def is_unprepared(error: Exception) -> bool:
    """Return whether an error means that a pooler has mixed up prepared statements.

    The pooler has sent a statement to the server on a connection on which the statement had not
    been prepared.
    """
    code = _code(error)
    return code in _UNPREPARED or (
        code == _PROTOCOL_VIOLATION and "prepared statement" in str(error)
    )


def is_of_value(error: Exception, carries_value: bool) -> bool:
    """Return whether an error means that the database or its driver can never accept a value of the
    statement.

    :param carries_value: whether the statement carried a value from outside this package, such as
        a state.
    """
    error = getattr(error, "orig", None) or error
    if was_connecting(error):
        return False
    if isinstance(error, REFUSED_BY_DRIVER):
        return True
    code = _code(error)
    if isinstance(code, str):
        if any(_raised_by(error, function, "wraparound") for function in _WRAPAROUND):
            return False
        if not carries_value and code.startswith(_STATES_ONLY_OF_VALUES):
            return False
        return code.startswith(_VALUE_STATES) or _VALUE_TEXTS[1] in str(error)
    number = getattr(error, "sqlite_errorcode", None) if code is None else code
    if not carries_value and number in _NUMBERS_ONLY_OF_VALUES:
        return False
    if code is not None:
        return code in _VALUE_NUMBERS
    return (
        number in _VALUE_CODES
        # A DataError without a code comes from the driver itself, for example for a NUL in a text.
        or type(error).__name__ == "DataError"
        or any(text in str(error) for text in (*_VALUE_TEXTS, _UNREADABLE))
    )


def _is_of_text(error: Exception) -> bool:
    """Return whether the reason for an error is a character that the database's encoding lacks."""
    code = _code(error)
    is_drivers = code is None and type(error).__name__ == "DataError"
    return isinstance(error, UnicodeError) or is_drivers or code in _TEXTS


def is_out_of_range(error: BaseException | None) -> bool:
    """Return whether an error means that a number is larger than its column can hold."""
    error = getattr(error, "orig", None) or error
    if not isinstance(error, Exception):
        return False
    is_large = isinstance(error, OverflowError) or _VALUE_TEXTS[0] in str(error)
    return is_large or _code(error) in _OUT_OF_RANGE


def went_away(error: SQLAlchemyError) -> bool:
    """Return whether an error comes from an unavailable database, and not from the statement."""
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    refused = "database is locked" in str(error) or is_read_only(error) or is_unprepared(error)
    return lost or refused


def grant(privileges: str, table: str, role: str) -> str:
    """Return the SQL statement that grants a role privileges on a table."""
    return f"GRANT {privileges} ON {table} TO {role};"


def policy_advice(table: str, role: str) -> str:
    """Return advice for the operator about row-level security, which could hide a held lease."""
    return (
        "row-level security must not hide rows of the table: run as its owner: "
        f"CREATE POLICY celery_singleton ON {table} TO {role} USING (true); and drop restrictive "
        f"policies; or ALTER TABLE {table} DISABLE ROW LEVEL SECURITY;"
    )


def _advice(error: Exception) -> str | None:
    """Return what the operator has to do about an error, or ``None`` if it may pass by itself."""
    code = _code(error)
    if was_connecting(error) and (advice := advice_of_connecting(code, str(error))):
        return advice
    if isinstance(code, str):
        if _raised_by(error, *_OUTDATED_PLAN):
            return None
        return next((advice for begin, advice in _SETUP_STATES if code.startswith(begin)), None)
    if isinstance(code, int):
        return _SETUP_NUMBERS.get(code)
    own = getattr(error, "sqlite_errorcode", None)
    if own is not None:
        return None if own == _SQLITE_TRIGGER else _SETUP_CODES.get(own & 0xFF)
    text = str(error)
    # Give no advice if the URL has several hosts. One host has refused the connection, for example
    # because it lacks the database. But another host may have the database, and be unavailable only
    # for a while.
    if "Multiple connection attempts failed" in text:
        return None
    return next((advice for pattern, advice in _SETUP_TEXTS if re.search(pattern, text)), None)


def _raised_by(error: Exception, function: str, text: str) -> bool:
    """Return whether a certain function in PostgreSQL's source raised an error.

    The function's name is compared first, because PostgreSQL translates its messages.

    :param text: a part of the English message, for errors that do not name their function.
    """
    source = getattr(getattr(error, "diag", None), "source_function", None)
    return source == function or text in str(error)


def _code(error: Exception) -> str | int | None:
    """Return an error's code: an SQLSTATE, or a number of MySQL; ``None`` if it has neither."""
    error = getattr(error, "orig", None) or error
    number = error.args[0] if error.args else None
    state: str | None = getattr(error, "sqlstate", None)
    return number if isinstance(number, int) else state
