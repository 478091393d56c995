"""An engine's connections: a small pool, and one more that is kept for single statements.

A caller gets the kept connection, which is outside of SQLAlchemy's pool. While another thread uses
the kept connection, a caller gets a connection of the pool. Statements run on the driver's own
cursor.

The kept connection and the driver's cursor save time. ``python -m benchmarks layers`` measures how
much. The table shows the time of a no-op run in a worker as a fraction of the time that the run
would take if each statement used SQLAlchemy's ``raw_connection()`` or ``connect()``. In brackets
are the fractions for the run's statements alone, and for the CPU time of the worker's child. The
worker is a prefork worker with one child. The fractions are medians of 60 turns on two cores:

============================  =====================  ============================
database                      ``raw_connection()``   ``connect()``
============================  =====================  ============================
PostgreSQL, no wait for disk  0.97 (0.88; 0.93)      0.88 (0.68; 0.72)
SQLite                        0.95 (0.72; 0.90)      0.87 (0.42; 0.73)
============================  =====================  ============================

"No wait for disk" is ``synchronous_commit = off``. By default PostgreSQL waits for its disk, which
hides the difference to ``raw_connection()``: the fraction for a run is 1.01, with quartiles of 0.93
and 1.08, and for the CPU time 0.94.

All connections are in autocommit mode, and SQLAlchemy neither pings nor resets them. So a statement
takes one round trip. BEGIN, COMMIT or ROLLBACK would add further round trips.

A connection belongs to the process that made it. A forked child must never use its copy of the
connection, not even to close it: parent and child share the socket, and the server would take the
child's bytes for its parent's. So the child gives up its copies at once, and a later use of a copy
is an error.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import URL, Engine, QueuePool, create_engine, event

from celery_singleton_state.compat import allow_connections, refuse_returns
from celery_singleton_state.store.connecting import connecting
from celery_singleton_state.store.options import STORE

from .errors import is_read_only

APPLICATION_NAME = "celery-singleton-state"
#: The longest time, in seconds, for which a fork is delayed until the parent's running statement on
#: an SQLite file has ended.
LONGEST_PAUSE = 5.0

#: A function that reads a statement's result from its cursor: the rows, or the number of rows.
Answer = Callable[[Any], Any]


class GrowingPool(QueuePool):
    """A connection pool whose size can be raised while it is in use.

    The pool is disposed of when its server has gone away, and when its store is closed. A
    connection that is in use at that time is closed when it is returned. Otherwise it would stay
    open until Python collects the pool as garbage.
    """

    def dispose(self) -> None:
        refuse_returns(self)
        super().dispose()

    def allow(self, connections: int) -> None:
        """Let the pool make and keep more connections than before. A smaller number than before
        changes nothing.
        """
        allow_connections(self, connections)


def pooled(
    url: URL, pool_size: int, io_timeout: float, connect: Callable[..., Any], **options: Any
) -> Engine:
    """Return an engine with a small connection pool, in autocommit mode.

    :param pool_size: the largest number of connections.
    :param io_timeout: seconds to wait for a connection when the pool is exhausted.
    :param connect: makes a connection with the driver.
    :param options: further arguments of SQLAlchemy's ``create_engine`` for this database.
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


#: The drivers' connections that this process has opened. A forked child calls the method
#: ``leave_to_parent()`` of each connection, because it must not use them.
_connections: weakref.WeakSet[Any] = weakref.WeakSet()


def _remember(connection: Any, _record: Any) -> None:
    _connections.add(connection)


def _leave_to_parent() -> None:
    for connection in list(_connections):
        # Ignore the error of a closed connection, which has no socket to give up.
        with contextlib.suppress(Exception):
            connection.leave_to_parent()
    _connections.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


class Connections:
    """The connections of an engine: its pool, and one connection that is kept outside the pool.

    :param keeps_one: whether to keep a connection outside the pool. False for a database in memory,
        which exists only within the pool's single connection.
    """

    def __init__(self, engine: Engine, keeps_one: bool) -> None:
        self._engine = engine
        self._is_file = engine.dialect.name == "sqlite"
        self._driver_error = engine.dialect.loaded_dbapi.Error
        #: The lock that a thread holds while it uses the kept connection. If a signal handler's
        #: exception prevents the lock's release, all later callers use the pool, which only costs
        #: time.
        self._in_use = threading.Lock()
        self._kept: Any = None
        self._outdated = False
        self._keeps_one = keeps_one
        self._paused = False
        if keeps_one:
            _all.add(self)
        event.listen(engine, "engine_disposed", self._outdate)

    def execute(self, statement: str, parameters: Mapping[str, Any], answer: Answer) -> Any:
        """Run one statement, and return the result that ``answer`` reads from its cursor.

        The statement runs on the driver's own cursor. SQLAlchemy's execution would add as much time
        as the statement itself takes on SQLite.

        :raises Exception: any error of the driver or of SQLAlchemy's pool.
        """
        if not self._keeps_one or not self._in_use.acquire(blocking=False):
            return self._execute_on_pools(statement, parameters, answer)
        try:
            if self._kept is None:
                self._kept = self._connect()
            return _execute(self._kept, statement, parameters, answer)
        except BaseException as error:
            # An error can leave a statement unfinished on the server, for example when a time limit
            # interrupted it. So a connection to a server is not used again. SQLite's calls end
            # before the error arrives, so a connection to an SQLite file is used again.
            self._outdated = not self._is_file
            if self._is_lost(error, self._kept):
                self._engine.dispose()
            raise
        finally:
            if self._outdated:
                self._close_kept()
            self._in_use.release()
            # Another thread may have tried to close the connection before this thread released the
            # lock. The other thread found the connection in use, so this thread has to close it.
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
                # Dispose of the pool's other connections, because they were made before the loss,
                # and so are lost, too.
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
        """Close the kept connection because the pool was disposed of. If a thread uses the kept
        connection, that thread closes it after its statement.
        """
        self._outdated = True
        self._close_outdated()

    def _close_outdated(self) -> None:
        if self._outdated and self._in_use.acquire(blocking=False):
            try:
                self._close_kept()
            finally:
                self._in_use.release()

    def pause(self) -> None:
        """Prepare for a fork: wait until the kept connection to an SQLite file is free, and close
        all connections.

        SQLite in a child that inherits a connection to a file assumes that the child has the file's
        locks, although only the parent has them. The child then neither waits for other processes
        nor keeps them from deleting the log that the child uses
        (https://sqlite.org/howtocorrupt.html, 2.6).
        """
        if not self._is_file:
            return
        self._paused = self._in_use.acquire(timeout=LONGEST_PAUSE)
        self._engine.dispose()
        if self._paused:
            self._close_kept()

    def resume(self) -> None:
        """After a fork, in the parent: let threads use the kept connection again."""
        if self._paused:
            self._paused = False
            self._in_use.release()

    def begin_anew(self) -> None:
        """After a fork, in the child: leave all connections to the parent, and begin with none."""
        self._kept, self._paused = None, False
        # Another thread of the parent may have held the lock at the fork. That thread does not
        # exist in the child, so nothing would release the lock.
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
