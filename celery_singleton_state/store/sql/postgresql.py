"""PostgreSQL: connections, by psycopg, and what its statements need."""

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

ACTIVE = psycopg.pq.TransactionStatus.ACTIVE

#: Seconds that closing a connection waits at most until the server has taken its cancel request.
LONGEST_CANCEL = 0.5
#: The same, as a part of what an answer may take.
CANCEL_PART = 0.25
#: The first release of psycopg that says when it hears nothing: with one before it, a statement
#: waits for a silent server until TCP gives up.
OLDEST = (3, 3)


class Connection(psycopg.Connection[Any]):
    """A connection that gives up on a server which stays silent.

    TCP's own time-outs do not see a proxy that acknowledges and never answers.

    A statement that is given up is cancelled, by libpq 17 and later. A server that waits for a
    lock, or for a standby, does not notice that its client has closed the connection, so each try
    would leave one more of the server's processes behind, until no application gets a connection.
    """

    #: Seconds; ``None``: for ever.
    patience: float | None = None
    cancel_timeout = LONGEST_CANCEL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owner = os.getpid()

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        if self.patience is not None:
            gen = self._impatient(gen, self.patience)
        return super().wait(gen, *args, **kwargs)

    def leave_to_parent(self) -> None:
        """In a forked child. libpq cannot close a socket without sending the session's end, so that
        goes nowhere.
        """
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, self.fileno(), inheritable=False)
        os.close(nothing)
        self.close()

    def close(self) -> None:
        """Close the connection, whatever it is in the middle of."""
        try:
            self._cancel_statement()
        finally:
            super().close()

    def _cancel_statement(self) -> None:
        """Ask the server to end the statement under way, and wait for a moment until it is told.

        The connection stays open until then, because a pooler knows by it whose statement that is.
        """
        if self.pgconn.transaction_status != ACTIVE or os.getpid() != self._owner:
            return
        # Before libpq 17 a cancel request holds the whole process up while the server is silent.
        if not psycopg.capabilities.has_cancel_safe():
            return
        # Nothing more can be done about a server that is not reached, and closing must not fail.
        with contextlib.suppress(psycopg.Error, OSError, RuntimeError):
            self.cancel_safe(timeout=self.cancel_timeout)

    def _impatient(self, gen: Any, patience: float) -> Generator[Any, Any, Any]:
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
    """Many writers, and rows that are locked."""

    now = "clock_timestamp()"
    level = "READ COMMITTED"
    insert = staticmethod(postgresql.insert)
    largest = 2**30 - 1
    encoding_advice = "CREATE DATABASE … ENCODING 'UTF8' makes one that has them all"

    def length_of(self, text: str) -> Any:
        # substr counts bytes if the database's encoding is SQL_ASCII.
        return sa.func.length(sa.literal(text))


STATEMENTS = PostgresqlStatements


def make(url: URL, io_timeout: float, pool_size: int, connect_timeout: float) -> Engine:
    """An engine. Statements are prepared at first use, unless a pooler is in between, or the URL
    says otherwise: ``?prepare_threshold=none``.

    :raises ImproperlyConfigured: what it says is not allowed.
    """
    if tuple(map(int, psycopg.__version__.split(".")[:2])) < OLDEST:
        raise ImproperlyConfigured(
            f"psycopg {psycopg.__version__} does not say when a server stays silent; "
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

    # Of several hosts SQLAlchemy reads a tuple.
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
            # Whatever the database's own is: it converts what it can, and says what it cannot.
            "client_encoding": "UTF8",
            "application_name": query.get("application_name", APPLICATION_NAME),
            "prepare_threshold": threshold,
            "autocommit": True,
        },
    )
    libpq.refuse_wrong_values(texts, engine.dialect.create_connect_args(engine.url)[1])
    return engine


def _is_pooled(connection: Connection) -> bool:
    """Whether a pooler stands between this process and the server: it has an id of its own.

    One that gives each transaction any of its connections, and does not know of prepared
    statements, runs by a statement's name what another client has prepared under it.
    """
    try:
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
    except BaseException:
        connection.close()
        raise
    return row is None or row[0] != connection.info.backend_pid
