"""SQLite: connections that wait for the file's lock in Python code instead of in SQLite, and the
class with the SQL statements.
"""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
import time
from typing import Any, Self

from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL, Engine, event
from sqlalchemy.dialects import sqlite

from celery_singleton_state.store.options import (
    STORE,
    SWITCH,
    Option,
    choice,
    refuse_unknown_options,
    seconds,
    whole,
)

from .connections import pooled
from .engine import is_in_memory
from .statements import Statements
from .url import read_query

#: The oldest release of SQLite that can be used: the first release that has RETURNING.
OLDEST = (3, 35)
#: The options that a URL may have. One of SQLite's own URIs (``?uri=true``) may have further ones.
OPTIONS: dict[str, Option] = {
    "cached_statements": whole(0),
    "check_same_thread": SWITCH,
    "detect_types": whole(0),
    "isolation_level": choice("DEFERRED", "IMMEDIATE", "EXCLUSIVE"),
    "timeout": seconds(0),
    "uri": SWITCH,
}
#: The first and the longest pause, in seconds, between two attempts to get the file's lock. The
#: pause doubles after each attempt until it is the longest pause.
FIRST_POLL, LONGEST_POLL = 0.001, 0.02


_execute = sqlite3.Cursor.execute


class Connection(sqlite3.Connection):
    """A connection that waits for the file's lock in Python instead of in SQLite.

    SQLite would wait in C code. Under gevent such a wait blocks all greenlets, including the
    greenlet that holds the lock. In other worker pools it delays the signals of time limits.
    """

    #: The longest time, in seconds, for which a statement waits for the lock of another connection.
    lock_timeout = 0.0

    _is_parents = False

    def cursor(self, factory: Any = None) -> Any:
        if self._is_parents:
            self._refuse_parents()
        return super().cursor(factory or Cursor)

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        """Run a statement, and wait for the file's lock if necessary.

        The method of ``sqlite3`` would not wait, because it does not use the class :class:`Cursor`.
        """
        return self.cursor().execute(statement, parameters)

    def commit(self) -> None:
        self._refuse_parents()
        super().commit()

    def rollback(self) -> None:
        if not self._is_parents:
            super().rollback()

    def close(self) -> None:
        if not self._is_parents:
            super().close()

    def leave_to_parent(self) -> None:
        """Make the connection unusable in a forked child, and keep it open there: closing it would
        roll back a transaction in memory that the child shares with its parent.
        """
        self._is_parents = True
        # Add a reference that is never released, so that Python does not close the connection, not
        # even when the process exits.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def _refuse_parents(self) -> None:
        if self._is_parents:
            raise sqlite3.OperationalError("the connection belongs to this process's parent")


class Cursor(sqlite3.Cursor):
    """A cursor that waits while another connection holds the file's lock."""

    connection: Connection

    def execute(self, statement: str, parameters: Any = ()) -> Self:
        """Run a statement. While another connection holds the file's lock, wait and try again.

        :raises sqlite3.OperationalError: the lock was not free within
            :attr:`Connection.lock_timeout` seconds, or the statement failed.
        """
        try:
            return _execute(self, statement, parameters)
        except sqlite3.OperationalError as error:
            if not self._can_wait(error):
                raise
        pause, deadline = FIRST_POLL, time.monotonic() + self.connection.lock_timeout
        while True:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL)
            try:
                return _execute(self, statement, parameters)
            except sqlite3.OperationalError as error:
                if time.monotonic() > deadline or not self._can_wait(error):
                    raise

    def _can_wait(self, error: sqlite3.OperationalError) -> bool:
        """Return whether a statement that failed may be tried again, because the file was locked.

        A statement within a transaction may not be tried again: the connection that holds the lock
        may be waiting for this transaction's lock.
        """
        code: int = getattr(error, "sqlite_errorcode", 0)
        return code & 0xFF == sqlite3.SQLITE_BUSY and not self.connection.in_transaction


class SqliteStatements(Statements):
    """The SQL statements for SQLite, from ``sqlite.sql``."""

    now = "strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')"
    level = "SERIALIZABLE"
    # BEGIN IMMEDIATE asks for the write lock at once, and can wait for it. A transaction that reads
    # first and asks for the write lock later cannot wait, because SQLite raises an error.
    begin = "BEGIN IMMEDIATE"
    insert = staticmethod(sqlite.insert)


STATEMENTS = SqliteStatements


def make(url: URL, io_timeout: float, pool_size: int, connect_timeout: float) -> Engine:
    """Make an engine for an SQLite file, or for an SQLite database in memory.

    :param io_timeout: seconds to wait for the file's lock, and for a connection of the pool.
    :param connect_timeout: has no effect, because opening a file needs no time-out.
    :raises ImproperlyConfigured: SQLite is too old, or an option of the URL is not known or not
        allowed.
    """
    in_memory = is_in_memory(url)
    read_query(url, OPTIONS)
    if "uri" not in url.query:
        refuse_unknown_options(STORE, url.query, OPTIONS, "sqlite3", {})
    if sqlite3.sqlite_version_info < OLDEST:
        raise ImproperlyConfigured(
            f"SQLite {sqlite3.sqlite_version} is too old; "
            f"{'.'.join(map(str, OLDEST))} or newer is needed"
        )
    engine = pooled(
        url,
        1 if in_memory else pool_size,
        io_timeout,
        sqlite3.connect,
        connect_args={"timeout": 0, "check_same_thread": False, "factory": Connection},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Connection, _record: Any) -> None:
        connection.lock_timeout = io_timeout
        if not in_memory:
            _use_wal(connection, io_timeout)
            connection.execute("PRAGMA synchronous = NORMAL")

    return engine


def _use_wal(connection: sqlite3.Connection, io_timeout: float) -> None:
    """Switch the file to the journal mode WAL, unless the file has this mode already.

    While another process uses the file, the switch fails at once, because SQLite does not wait for
    that process. So the switch is repeated for ``io_timeout`` seconds.
    """
    deadline = time.monotonic() + io_timeout
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")
            continue
        if time.monotonic() > deadline:
            raise sqlite3.OperationalError("database is locked: it could not be switched to WAL")
        time.sleep(0.01)
