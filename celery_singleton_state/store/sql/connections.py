"""An engine's connections: a small pool, and one that is kept at hand for single statements.

To check a connection out of SQLAlchemy's pool and in again costs as much as the statement does on
SQLite. So the first caller has a connection that the pool does not know; who comes while it is in
use takes one of the pool's.

All are in autocommit mode. Autocommit, no ping and no reset keep a statement at one round trip:
BEGIN, COMMIT and ROLLBACK would double it.

A connection is its process's. A child that is forked while one is in use must never touch it, not
even to end it: what the child sends on the socket that both have, the server takes for its
parent's. So the child loses its copies at once, and is told so when it uses one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import URL, Engine, QueuePool, create_engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from celery_singleton_state.compat import allow_connections
from celery_singleton_state.store.connecting import connecting
from celery_singleton_state.store.options import STORE

from .errors import is_read_only

APPLICATION_NAME = "celery-singleton-state"
#: Seconds that a fork waits for a statement on a file.
LONGEST_PAUSE = 5.0

#: Answers a cursor after its statement was executed.
Answer = Callable[[Any], Any]


class GrowingPool(QueuePool):
    """A pool whose number of connections can be raised while it is in use.

    When it is disposed of, because its server went away, the connections that are in use then are
    closed as they come back. Otherwise they would stay open until the pool is garbage.
    """

    _is_disposed = False

    def dispose(self) -> None:
        self._is_disposed = True
        super().dispose()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if self._is_disposed:
            record.close()
            return
        super()._do_return_conn(record)
        if self._is_disposed:
            # Another thread disposed of the pool after the check, and did not see this connection.
            super().dispose()

    def allow(self, connections: int) -> None:
        """Make so many connections at most from now on, and keep them, if it was fewer before."""
        allow_connections(self, connections)


def pooled(
    url: URL, pool_size: int, io_timeout: float, connect: Callable[..., Any], **options: Any
) -> Engine:
    """An engine with a small pool.

    :param io_timeout: seconds that who finds all connections in use waits for one.
    :param connect: makes a connection of the driver's.
    :param options: of the database's own.
    """
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=io_timeout,
        pool_reset_on_return=None,
        pool_use_lifo=True,
        poolclass=GrowingPool,
        **options,
    )

    @event.listens_for(engine, "do_connect")
    def do_connect(_dialect: Any, _record: Any, args: Any, kwargs: Any) -> Any:
        with connecting(STORE, engine.dialect.loaded_dbapi.Error):
            return connect(*args, **kwargs)

    event.listen(engine, "connect", _remember)
    return engine


#: The drivers' connections of this process: each can be left to the parent.
_connections: weakref.WeakSet[Any] = weakref.WeakSet()


def _remember(connection: Any, _record: Any) -> None:
    _connections.add(connection)


def _leave_to_parent() -> None:
    for connection in list(_connections):
        # One that is closed has no socket.
        with contextlib.suppress(Exception):
            connection.leave_to_parent()
    _connections.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


class Connections:
    """An engine's connections, in autocommit mode.

    :param keeps_one: whether there is a connection besides the pool's; there is none for a
        database that lives in its only connection.
    """

    def __init__(self, engine: Engine, keeps_one: bool) -> None:
        self._engine = engine
        self._is_file = engine.dialect.name == "sqlite"
        self._driver_error = engine.dialect.loaded_dbapi.Error
        #: Held by whoever uses the kept connection. One that a signal takes away before its
        #: release only sends all later callers to the pool.
        self._in_use = threading.Lock()
        self._kept: Any = None
        self._outdated = False
        self._keeps_one = keeps_one
        self._paused = False
        if keeps_one:
            _all.add(self)
        event.listen(engine, "engine_disposed", self._outdate)

    def execute(self, statement: str, parameters: Mapping[str, Any], answer: Answer) -> Any:
        """Run one statement; returns what is wanted of its cursor.

        The driver's cursor is used as it is: what SQLAlchemy's execution adds to it costs as
        much as the statement does on SQLite.

        :raises Exception: whatever the driver or SQLAlchemy's pool raises.
        """
        if not self._keeps_one or not self._in_use.acquire(blocking=False):
            return self._execute_on_pools(statement, parameters, answer)
        try:
            if self._kept is None:
                self._kept = self._connect()
            return _execute(self._kept, statement, parameters, answer)
        except BaseException as error:
            # One that was broken off in mid-statement, by a time limit say, is in no state to be
            # reused, nor is a server's after any error. A file's stays good.
            self._outdated = not self._is_file
            if self._is_lost(error, self._kept):
                self._engine.dispose()
            raise
        finally:
            if self._outdated:
                self._close_kept()
            self._in_use.release()
            # Outdated between the two, by somebody who found it in use.
            self._close_outdated()

    def _execute_on_pools(
        self, statement: str, parameters: Mapping[str, Any], answer: Answer
    ) -> Any:
        connection = self._engine.raw_connection()
        try:
            return _execute(connection, statement, parameters, answer)
        except BaseException as error:
            lost = self._is_lost(error, connection.dbapi_connection)
            if not self._is_file:
                connection.invalidate()
            if lost:
                # The others are as old, and as dead.
                self._engine.dispose()
            raise
        finally:
            connection.close()

    def _connect(self) -> Any:
        connection = self._engine.raw_connection()
        connection.detach()
        return connection.dbapi_connection

    def _is_lost(self, error: BaseException, connection: Any) -> bool:
        return (
            not self._is_file
            and isinstance(error, self._driver_error)
            and (self._engine.dialect.is_disconnect(error, connection, None) or is_read_only(error))
        )

    def _outdate(self, _engine: Engine) -> None:
        """With the pool's connections, that which is kept is closed: now, or after its use."""
        self._outdated = True
        self._close_outdated()

    def _close_outdated(self) -> None:
        if self._outdated and self._in_use.acquire(blocking=False):
            try:
                self._close_kept()
            finally:
                self._in_use.release()

    def pause(self) -> None:
        """Before a fork: let whoever uses a file's kept connection end, and close all.

        A forked child that inherits a file's connection believes in locks that it does not have: it
        neither waits for others nor keeps them from deleting its log.
        (https://sqlite.org/howtocorrupt.html, 2.6)
        """
        if not self._is_file:
            return
        self._paused = self._in_use.acquire(timeout=LONGEST_PAUSE)
        self._engine.dispose()
        if self._paused:
            self._close_kept()

    def resume(self) -> None:
        """After a fork, in the parent."""
        if self._paused:
            self._paused = False
            self._in_use.release()

    def begin_anew(self) -> None:
        """After a fork, in the child: leave all connections to the parent."""
        self._kept, self._paused = None, False
        # Another thread of the parent's may have it.
        self._in_use = threading.Lock()
        self._engine.dispose(close=False)

    def _close_kept(self) -> None:
        kept, self._kept, self._outdated = self._kept, None, False
        if kept is not None:
            kept.close()


def _execute(connection: Any, statement: str, parameters: Mapping[str, Any], answer: Answer) -> Any:
    cursor = connection.cursor()
    try:
        cursor.execute(statement, parameters)
        return answer(cursor)
    finally:
        cursor.close()


_all: weakref.WeakSet[Connections] = weakref.WeakSet()


def _pause_all() -> None:
    for connections in list(_all):
        connections.pause()


def _resume_all() -> None:
    for connections in list(_all):
        connections.resume()


def _begin_all_anew() -> None:
    for connections in list(_all):
        connections.begin_anew()


os.register_at_fork(before=_pause_all, after_in_parent=_resume_all, after_in_child=_begin_all_anew)
