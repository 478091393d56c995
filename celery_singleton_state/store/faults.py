"""What an error of the database's means: undone, gone away, passing, or to be mended."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from .base import StoreError, StoreMisconfigured, StoreNotReady, StoreUnavailable, one_line

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

PRIVILEGES = "SELECT, INSERT, UPDATE, DELETE"
ROLE = "<the worker's role>"


def as_store_error(error: Exception, table: str) -> StoreError:
    """An error of the driver's or of SQLAlchemy's, as one of ours.

    :param table: the table's name, quoted where it must be.
    """
    error = getattr(error, "orig", None) or error
    text = one_line(error)
    if is_unprepared(error):
        return StoreMisconfigured(
            f"{text}; the pooler in front of the database does not know of prepared statements, "
            "and can run another client's instead: set prepare_threshold=none in "
            "singleton_store_url, or no prepare_threshold at all"
        )
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
    return StoreUnavailable(text)


def is_undone(error: Exception) -> bool:
    """Whether the statement can be sent again at once."""
    return _code(error) in _UNDONE


def is_forbidden(error: Exception) -> bool:
    """Whether the role lacks a privilege."""
    return _code(error) in _FORBIDDEN


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


def went_away(error: SQLAlchemyError) -> bool:
    """Whether it is the database's, and not the statement's."""
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    refused = "database is locked" in str(error) or is_read_only(error) or is_unprepared(error)
    return lost or refused


def grant(privileges: str, table: str, role: str) -> str:
    """The statement that gives a role privileges on a table."""
    return f"GRANT {privileges} ON {table} TO {role};"


def _code(error: Exception) -> str | int | None:
    """What the database calls an error: by SQLSTATE, or by a number as MySQL does."""
    error = getattr(error, "orig", None) or error
    number = error.args[0] if error.args else None
    state: str | None = getattr(error, "sqlstate", None)
    return number if isinstance(number, int) else state
