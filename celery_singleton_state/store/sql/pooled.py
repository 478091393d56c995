"""What the engines of all databases have in common: few connections, in autocommit mode.

Autocommit, no ping and no reset keep a statement at one round trip: BEGIN, COMMIT and
ROLLBACK would double it.

A connection is its process's. A child that is forked while one is in use must never touch it, not
even to end it: what the child sends on the socket that both have, the server takes for its
parent's. So the child loses its copies at once, and is told so when it uses one.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Any

from sqlalchemy import URL, Engine, QueuePool, create_engine, event
from sqlalchemy.pool import ConnectionPoolEntry

APPLICATION_NAME = "celery-singleton-state"


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
        else:
            super()._do_return_conn(record)

    def allow(self, connections: int) -> None:
        """Make so many connections at most from now on, and keep them, if it was fewer before."""
        with self._overflow_lock:
            more = max(0, connections - self.size())
            self._pool.maxsize += more
            # Counted from the size: how many there are is the sum of both.
            self._overflow -= more


def pooled(url: URL, pool_size: int, io_timeout: float, **options: Any) -> Engine:
    """An engine with a small pool.

    :param io_timeout: seconds that who finds all connections in use waits for one.
    :param options: of the database's own.
    """
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        poolclass=GrowingPool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=io_timeout,
        pool_reset_on_return=None,
        pool_use_lifo=True,
        **options,
    )
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
