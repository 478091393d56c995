"""What a database's error means: the statement is sent again, the database is unavailable for a
while, it cannot hold the value, or somebody has to mend the set-up.

An error that no table here knows counts as one that passes: no work fails because the store was
away for a while.
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

# SQLSTATEs, and MySQL's numbers.
#: Of a missing table, column and schema.
_NOT_READY = frozenset({"42P01", "42703", "3F000", 1146, 1054})
_NOT_READY_TEXTS = ("no such table", "no such column", "has no column")
#: Of a statement that was undone, as it and another waited for each other or could not have run one
#: after the other.
_UNDONE = frozenset({"40001", "40P01", 1213})
#: Of a privilege that is missing: on anything; on the database, the table, a column.
_FORBIDDEN_ON_POSTGRESQL = "42501"
_FORBIDDEN = frozenset({_FORBIDDEN_ON_POSTGRESQL, 1044, 1142, 1143})
#: Of a lock that was waited for in vain.
_LOCKED = frozenset({"55P03", 1205})
#: Of a prepared statement whose name another client's has, and of a missing one.
_UNPREPARED = frozenset({"42P05", "26000"})
#: Also of another client's prepared statement that has another number of parameters.
_PROTOCOL_VIOLATION = "08P01"

#: Of a write to a server that is read-only: a standby, or a primary that a failover has demoted.
_READ_ONLY = frozenset({"25006", 1792, 1836})
#: Of a statement that one of the server's options prevents; --read-only is one of them.
_PREVENTED = 1290

#: What a value causes, and no later try mends. What SQLSTATEs begin with: data that cannot be
#: converted, is too long or out of range; a check of the table's or of a view's; a limit of the
#: server's, on the size of an indexed text for example.
_VALUE_STATES = ("22", "23514", "44", "54")
#: The same of MySQL: a text that the column's character set does not have (1267, 1300, 1366, 3854,
#: 3988), too long or too large (1118, 1153, 1301, 1406; for a cluster 1180, 3100), out of range
#: (1264, 1690), not to be converted (1265, 1292), not JSON (3140, 3141, 4037, 4038), refused by a
#: check (3819, 4025).
_VALUE_NUMBERS = frozenset(
    {1118, 1153, 1180, 1264, 1265, 1267, 1292, 1300, 1301, 1366, 1406, 1690}
    | {3100, 3140, 3141, 3819, 3854, 3988, 4025, 4037, 4038}
)
#: The same of SQLite: SQLITE_TOOBIG, SQLITE_MISMATCH, and a check of the table's.
_VALUE_CODES = frozenset({18, 20, 275})
#: Those of them that a statement without a value has for another reason.
_STATES_ONLY_OF_VALUES = ("22023", "23514", "44", "54")
_NUMBERS_ONLY_OF_VALUES = frozenset({275, 1180, 1267, 3100, 3819, 4025})
#: Those of characters that the encoding lacks.
_TEXTS = frozenset({"22021", "22P05", 1300, 1366, 3854, 3988})
#: Functions of PostgreSQL's that refuse all writes until it is vacuumed, by SQLSTATE 54000.
_WRAPAROUND = ("GetNewTransactionId", "GetNewMultiXactId")
#: An error of a trigger's own, in SQLite.
_SQLITE_TRIGGER = 1811
#: The same, where an error has no code of its own: SQLite's overflow, PostgreSQL's memory for one
#: value, a value that the driver knows no type for.
_VALUE_TEXTS = ("integer overflow", "invalid memory alloc request size", "Error binding parameter")

#: Of SQLite, when somebody else has written bytes as a text.
_UNREADABLE = "Could not decode to UTF-8"
_CANNOT_HOLD = "the database cannot hold the value"

#: Of a number that is larger than its column can hold.
_OUT_OF_RANGE = frozenset({"22003", 1264, 1690})

_OTHER_TABLE = (
    "the table is not as this package makes it: have singleton_table name a table of its own, or "
    "remove what was added to it (constraints, columns that must not be NULL)"
)
_LOGIN = "set the user and the password in singleton_store_url, and let the server admit the user"
_NO_DATABASE = "create the database, or set its name in singleton_store_url"
_COLLATION = (
    "have all texts of the table in one collation of utf8mb4, utf8mb4_bin for key and value"
)
_PLUGIN = "install what it names, pip install 'pymysql[rsa]', or let the user log in another way"
#: What somebody has to mend, by what SQLSTATEs begin with, and what is to be done.
_SETUP_STATES = (
    ("28", _LOGIN),
    ("3D", _NO_DATABASE),
    ("23", _OTHER_TABLE),
    ("44", _OTHER_TABLE),
    ("42", _OTHER_TABLE),
    ("0A", "this server, or a pooler in front of it, does not have what is needed"),
)
#: The same by MySQL's numbers.
_SETUP_NUMBERS = {
    **dict.fromkeys((1045, 1130, 1251, 1698), _LOGIN),
    **dict.fromkeys((1046, 1049), _NO_DATABASE),
    **dict.fromkeys((1048, 1062, 1364, 1451, 1452, 3819, 4025), _OTHER_TABLE),
    **dict.fromkeys((1267, 1270, 1271), _COLLATION),
    **dict.fromkeys((2059, 2061), _PLUGIN),
    **dict.fromkeys((1064, 1305), "MariaDB from 10.6 on, or MySQL 8, is needed"),
}
#: The same by SQLite's codes, without their details: SQLITE_CORRUPT, _CONSTRAINT and _NOTADB.
_SETUP_CODES = {
    11: "restore the file from a backup",
    19: _OTHER_TABLE,
    26: "singleton_store_url is to name a file of SQLite's, or one that is not there yet",
}
#: The same of a connection that PostgreSQL refuses: its error has no SQLSTATE.
_SETUP_TEXTS = (
    ("password authentication failed|no pg_hba.conf entry|no password supplied", _LOGIN),
    ('FATAL: +role ".*" (does not exist|is not permitted to log in)', _LOGIN),
    ('FATAL: +database ".*" does not exist', _NO_DATABASE),
    ("FATAL: +permission denied for database", "GRANT CONNECT ON DATABASE to the worker's role"),
)

PRIVILEGES = "SELECT, INSERT, UPDATE, DELETE"
ROLE = "<the worker's role>"

#: Of a prepared statement whose columns an ``ALTER TABLE`` has changed; prepared anew, it works.
_OUTDATED_PLAN = ("RevalidateCachedQuery", "cached plan must not change result type")

#: What drivers raise for a value before they send anything.
REFUSED_BY_DRIVER = (UnicodeError, OverflowError)


def as_store_error(error: Exception, table: str, carries_value: bool = True) -> StoreError:
    """An error of the driver's or of SQLAlchemy's, as one of ours.

    :param table: the table's name, quoted where it must be.
    :param carries_value: whether the statement had a value to store, and not only names of ours.
    """
    error = getattr(error, "orig", None) or error
    text = one_line(error)
    if is_unprepared(error):
        return StoreMisconfigured(
            f"{text}; the pooler in front of the database does not know of prepared statements, "
            "and can run another client's instead: set prepare_threshold=none in "
            "singleton_store_url, or no prepare_threshold at all"
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
    """Whether the statement can be sent again at once."""
    return _code(error) in _UNDONE


def is_forbidden(error: Exception) -> bool:
    """Whether the role lacks a privilege."""
    return _code(error) in _FORBIDDEN


def is_of_policy(error: Exception) -> bool:
    """Whether row-level security refused a row."""
    error = getattr(error, "orig", None) or error
    if _code(error) != _FORBIDDEN_ON_POSTGRESQL:
        return False
    return _comes_of(error, "ExecWithCheckOptions", "row-level security")


def is_locked(error: Exception) -> bool:
    """Whether others held a lock for longer than it was waited for."""
    return _code(error) in _LOCKED


def is_read_only(error: Exception) -> bool:
    """Whether the server takes no writes: a new connection may lead to one that does."""
    code = _code(error)
    return code in _READ_ONLY or (code == _PREVENTED and "read-only" in str(error))


def is_unprepared(error: Exception) -> bool:
    """Whether it comes of prepared statements that are not those of their connection."""
    code = _code(error)
    return code in _UNPREPARED or (
        code == _PROTOCOL_VIOLATION and "prepared statement" in str(error)
    )


def is_of_value(error: Exception, carries_value: bool) -> bool:
    """Whether the database, or its driver, can never hold the value that it was given."""
    error = getattr(error, "orig", None) or error
    if was_connecting(error):
        return False
    if isinstance(error, REFUSED_BY_DRIVER):
        return True
    code = _code(error)
    if isinstance(code, str):
        if any(_comes_of(error, function, "wraparound") for function in _WRAPAROUND):
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
        # A driver's own refusal has no code: of a NUL in a text, for example.
        or type(error).__name__ == "DataError"
        or any(text in str(error) for text in (*_VALUE_TEXTS, _UNREADABLE))
    )


def _is_of_text(error: Exception) -> bool:
    """Whether the encoding lacks one of the text's characters."""
    code = _code(error)
    is_drivers = code is None and type(error).__name__ == "DataError"
    return isinstance(error, UnicodeError) or is_drivers or code in _TEXTS


def is_out_of_range(error: BaseException | None) -> bool:
    """Whether a number has grown larger than its column can hold."""
    error = getattr(error, "orig", None) or error
    if not isinstance(error, Exception):
        return False
    is_large = isinstance(error, OverflowError) or _VALUE_TEXTS[0] in str(error)
    return is_large or _code(error) in _OUT_OF_RANGE


def went_away(error: SQLAlchemyError) -> bool:
    """Whether it is the database's, and not the statement's."""
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    refused = "database is locked" in str(error) or is_read_only(error) or is_unprepared(error)
    return lost or refused


def grant(privileges: str, table: str, role: str) -> str:
    """The statement that gives a role privileges on a table."""
    return f"GRANT {privileges} ON {table} TO {role};"


def policy_advice(table: str, role: str) -> str:
    """What is to be done about row-level security, which can hide a held lease."""
    return (
        "row-level security must not hide rows of the table: run as its owner: "
        f"CREATE POLICY celery_singleton ON {table} TO {role} USING (true); and drop restrictive "
        f"policies; or ALTER TABLE {table} DISABLE ROW LEVEL SECURITY;"
    )


def _advice(error: Exception) -> str | None:
    """What somebody has to do; ``None`` if the error can pass by itself."""
    code = _code(error)
    if was_connecting(error) and (advice := advice_of_connecting(code, str(error))):
        return advice
    if isinstance(code, str):
        if _comes_of(error, *_OUTDATED_PLAN):
            return None
        return next((advice for begin, advice in _SETUP_STATES if code.startswith(begin)), None)
    if isinstance(code, int):
        return _SETUP_NUMBERS.get(code)
    own = getattr(error, "sqlite_errorcode", None)
    if own is not None:
        return None if own == _SQLITE_TRIGGER else _SETUP_CODES.get(own & 0xFF)
    text = str(error)
    # One of several hosts may be away, and be the one that has what another host lacks.
    if "Multiple connection attempts failed" in text:
        return None
    return next((advice for pattern, advice in _SETUP_TEXTS if re.search(pattern, text)), None)


def _comes_of(error: Exception, function: str, text: str) -> bool:
    """Whether a function of PostgreSQL's raised it, whose text may be in any language."""
    source = getattr(getattr(error, "diag", None), "source_function", None)
    return source == function or text in str(error)


def _code(error: Exception) -> str | int | None:
    """What the database calls an error: by SQLSTATE, or by a number as MySQL does."""
    error = getattr(error, "orig", None) or error
    number = error.args[0] if error.args else None
    state: str | None = getattr(error, "sqlstate", None)
    return number if isinstance(number, int) else state
