"""PostgreSQL: connections that psycopg makes, and the class with the SQL statements."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Generator
from typing import Any

import psycopg
import psycopg.pq
import sqlalchemy as sa
from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL, Engine
from sqlalchemy.dialects import postgresql

from . import libpq
from .connections import APPLICATION_NAME, pooled
from .statements import Statements

#: The status of a connection on which a statement is running.
ACTIVE = psycopg.pq.TransactionStatus.ACTIVE

#: The longest time, in seconds, for which the closing of a connection waits for the server to
#: accept a cancel request.
LONGEST_CANCEL = 0.5
#: The longest time for which the closing of a connection waits for the server to accept a cancel
#: request, as a fraction of ``io_timeout``. If ``LONGEST_CANCEL`` is shorter, it applies instead.
CANCEL_PART = 0.25
#: The oldest release of psycopg that can be used: the first one that reports, while it waits for an
#: answer, that nothing has arrived. With an older release a statement would wait for a silent
#: server until TCP gives up.
OLDEST = (3, 3)


class Connection(psycopg.Connection[Any]):
    """A connection that times out when the server does not answer.

    TCP's own time-outs are not enough: a proxy may acknowledge every packet and never answer.

    With libpq 17 and later, the connection cancels a statement that has timed out. A server process
    that waits for a lock, or for a standby, does not notice that its client has closed the
    connection. Without the cancelling each attempt would leave another server process behind, until
    the server accepts no more connections.
    """

    #: Seconds to wait for the server's answer; ``None``: without limit.
    patience: float | None = None
    #: The longest time, in seconds, for which closing waits for the server to accept a cancel
    #: request.
    cancel_timeout = LONGEST_CANCEL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owner = os.getpid()

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        if self.patience is not None:
            gen = self._with_time_out(gen, self.patience)
        return super().wait(gen, *args, **kwargs)

    def leave_to_parent(self) -> None:
        """Close a forked child's copy of the connection, without telling the server.

        When libpq closes a socket, it always tells the server that the session ends, but the parent
        still needs the session. So the child replaces the socket by ``/dev/null`` first.
        """
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, self.fileno(), inheritable=False)
        os.close(nothing)
        self.close()

    def close(self) -> None:
        """Cancel the running statement, if there is one, and close the connection."""
        try:
            self._cancel_statement()
        finally:
            super().close()

    def _cancel_statement(self) -> None:
        """Ask the server to cancel the running statement. Wait at most ``cancel_timeout`` seconds
        until the server has accepted this request.

        The connection must still be open, because a pooler finds the statement by the connection.
        """
        if self.pgconn.transaction_status != ACTIVE or os.getpid() != self._owner:
            return
        # Send no cancel request with a libpq before 17, because it would block the whole process
        # while the server is silent.
        if not psycopg.capabilities.has_cancel_safe():
            return
        # Ignore the error if the statement cannot be cancelled, for example because the server is
        # unavailable: the connection must be closed all the same.
        with contextlib.suppress(psycopg.Error, OSError, RuntimeError):
            self.cancel_safe(timeout=self.cancel_timeout)

    def _with_time_out(self, gen: Any, patience: float) -> Generator[Any, Any, Any]:
        try:
            wanted = next(gen)
            heard = time.monotonic()
            while True:
                ready = yield wanted
                now = time.monotonic()
                if ready:
                    heard = now
                elif now - heard > patience:
                    self.close()
                    raise psycopg.OperationalError(f"no answer within {patience:g} s")
                wanted = gen.send(ready)
        except StopIteration as stop:
            return stop.value


class PostgresqlStatements(Statements):
    """The SQL statements for PostgreSQL, from ``postgresql.sql``."""

    now = "clock_timestamp()"
    level = "READ COMMITTED"
    insert = staticmethod(postgresql.insert)
    largest = 2**30 - 1
    encoding_advice = "create a database with ENCODING 'UTF8', which can store all of them"

    def length_of(self, text: str) -> Any:
        # Let the database count instead of Python: with the encoding SQL_ASCII both substr and
        # length count bytes, and Python counts characters.
        return sa.func.length(sa.literal(text))


STATEMENTS = PostgresqlStatements


def make(url: URL, io_timeout: float, pool_size: int, connect_timeout: float) -> Engine:
    """Make an engine for PostgreSQL.

    :func:`~celery_singleton_state.store.sql.engine.make_engine` explains the arguments.

    Each statement is prepared at its first use. Statements are not prepared if a pooler stands
    between this process and the server, or if the URL says ``?prepare_threshold=none``.

    :raises ImproperlyConfigured: psycopg is too old, or an option of the URL is not known or not
        allowed.
    """
    if tuple(map(int, psycopg.__version__.split(".")[:2])) < OLDEST:
        raise ImproperlyConfigured(
            f"psycopg {psycopg.__version__} waits for a silent server without a time-out; "
            "3.3 or later is needed: pip install 'celery-singleton-state[postgresql]'"
        )
    query = libpq.read_options(url)
    chooses_threshold = "prepare_threshold" not in query
    threshold = query.pop("prepare_threshold", None)

    def connect(*args: Any, **kwargs: Any) -> Connection:
        connection = Connection.connect(*args, **kwargs)
        connection.patience = io_timeout
        connection.cancel_timeout = min(LONGEST_CANCEL, io_timeout * CANCEL_PART)
        if chooses_threshold and not _is_pooled(connection):
            connection.prepare_threshold = 0
        return connection

    # Convert all values to texts except tuples: SQLAlchemy takes several hosts or ports as a tuple.
    texts = {name: own if isinstance(own, tuple) else str(own) for name, own in query.items()}
    engine = pooled(
        url.set(query=texts),
        pool_size,
        io_timeout,
        connect,
        use_native_hstore=False,
        connect_args={
            "connect_timeout": math.ceil(connect_timeout),
            "tcp_user_timeout": math.ceil(io_timeout * 1000),
            # Send UTF-8 even if the database has another encoding. PostgreSQL then converts each
            # text, or refuses the text with an error.
            "client_encoding": "UTF8",
            "application_name": query.get("application_name", APPLICATION_NAME),
            "prepare_threshold": threshold,
            "autocommit": True,
        },
    )
    libpq.refuse_wrong_values(texts, engine.dialect.create_connect_args(engine.url)[1])
    return engine


def _is_pooled(connection: Connection) -> bool:
    """Return whether a pooler stands between this process and the server.

    A pooler announces a process id that is not the id of the server's process. Prepared statements
    are dangerous behind a pooler: it may run each transaction on another of its connections to the
    server, and another client may have prepared a different statement under the same name there.
    """
    try:
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
    except BaseException:
        connection.close()
        raise
    return row is None or row[0] != connection.info.backend_pid
