"""SQLite: connections, and what its statements need."""

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

#: RETURNING came with this release.
OLDEST = (3, 35)
#: Options of a URL, beside those of SQLite's own URIs.
OPTIONS: dict[str, Option] = {
    "cached_statements": whole(0),
    "check_same_thread": SWITCH,
    "detect_types": whole(0),
    "isolation_level": choice("DEFERRED", "IMMEDIATE", "EXCLUSIVE"),
    "timeout": seconds(0),
    "uri": SWITCH,
}
#: Seconds between two looks at a lock: the first, and the longest.
FIRST_POLL, LONGEST_POLL = 0.001, 0.02


_execute = sqlite3.Cursor.execute


class Connection(sqlite3.Connection):
    """A connection that waits for the file's lock in Python, and not in SQLite.

    SQLite waits in C. Under gevent that stops all greenlets, and with them the one that has the
    lock; elsewhere no time limit's signal is heard meanwhile.
    """

    #: Seconds that a statement waits for others' lock at most.
    lock_timeout = 0.0

    _is_parents = False

    def cursor(self, factory: Any = None) -> Any:
        if self._is_parents:
            self._refuse_parents()
        return super().cursor(factory or Cursor)

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        """Run a statement. Python's own method uses no cursor of this class, so does not wait."""
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
        """In a forked child: never use it, nor end it, which would roll back in memory that both
        share.
        """
        self._is_parents = True
        # Not even the interpreter's end may free it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def _refuse_parents(self) -> None:
        if self._is_parents:
            raise sqlite3.OperationalError("the connection is that of this process's parent")


class Cursor(sqlite3.Cursor):
    """A cursor of :class:`Connection`."""

    connection: Connection

    def execute(self, statement: str, parameters: Any = ()) -> Self:
        """Run a statement, when nobody else has the file's lock.

        :raises sqlite3.OperationalError: somebody had it for too long.
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
        """Whether the statement changed nothing, and can be sent again: it is not a transaction's
        second, which would wait for somebody who may wait for the transaction.
        """
        code: int = getattr(error, "sqlite_errorcode", 0)
        return code & 0xFF == sqlite3.SQLITE_BUSY and not self.connection.in_transaction


class SqliteStatements(Statements):
    """One writer at a time."""

    now = "strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')"
    level = "SERIALIZABLE"
    # A transaction that reads first and writes later cannot wait for a writer.
    begin = "BEGIN IMMEDIATE"
    insert = staticmethod(sqlite.insert)


STATEMENTS = SqliteStatements


def make(url: URL, io_timeout: float, pool_size: int, connect_timeout: float) -> Engine:
    """An engine.

    :param connect_timeout: not needed for a file.
    :raises ImproperlyConfigured: SQLite is too old, or does not know an option of the URL.
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
        if in_memory:
            return
        try:
            _use_wal(connection, io_timeout)
            connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            # SQLAlchemy drops a connection whose preparation failed, and leaves it open.
            connection.close()
            raise

    return engine


def _use_wal(connection: sqlite3.Connection, io_timeout: float) -> None:
    """Switch the file to WAL, once: the switch does not wait for other processes by itself."""
    deadline = time.monotonic() + io_timeout
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")
            continue
        if time.monotonic() > deadline:
            raise sqlite3.OperationalError("database is locked: it could not be switched to WAL")
        time.sleep(0.01)
