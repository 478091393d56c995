"""Connections to the store's database: autocommit, few, and never silent for long.

Autocommit, no ping and no reset keep a statement at one round trip: BEGIN, COMMIT and
ROLLBACK would double it. Engines must be made in the process that uses them.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL, Engine, QueuePool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError

from .dialects import DIALECTS

APPLICATION_NAME = "celery-singleton-state"
#: RETURNING came with this release.
OLDEST_SQLITE = (3, 35)


def parse_url(text: str) -> URL:
    """A store's URL, with the drivers that this package uses.

    :raises ImproperlyConfigured: it is no URL, or one of a database that is not supported.
    """
    try:
        url = make_url("sqlite://" if text == "memory://" else text)
    except ArgumentError:
        raise ImproperlyConfigured(f"singleton_store_url={text!r} is not a URL") from None
    if url.get_backend_name() == "postgres":
        url = url.set(drivername="postgresql")
    if url.drivername.startswith(("redis", "sentinel")):
        raise ImproperlyConfigured(
            f"singleton_store_url={url.render_as_string()!r} is not supported: states are kept in "
            "SQL; singleton_lease_url takes it, for leases of singletons without a state"
        )
    if url.get_backend_name() not in DIALECTS:
        raise ImproperlyConfigured(
            f"singleton_store_url={url.render_as_string()!r} is not supported; "
            f"it takes a URL of {', '.join(DIALECTS)}, or memory://"
        )
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() in ("mariadb", "mysql"):
        url = _with_pymysql(url)
    return url


def _with_pymysql(url: URL) -> URL:
    """:raises ImproperlyConfigured: it names another driver; only this one is sent several
    statements at once.
    """
    driver = url.drivername.partition("+")[2]
    if driver not in ("", "pymysql"):
        raise ImproperlyConfigured(
            f"singleton_store_url={url.render_as_string()!r} is not supported: "
            f"its driver is to be pymysql, not {driver}"
        )
    return url.set(drivername="mysql+pymysql")


def is_in_memory(url: URL) -> bool:
    """Whether a database lives in one process, and in its only connection."""
    return url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")


def identity(url: URL, table_name: str) -> str | None:
    """The same text for all processes that use a table; ``None`` if only this one does."""
    if is_in_memory(url):
        return None
    if url.get_backend_name() == "sqlite":
        url = url.set(database=str(Path(url.database or "").resolve()))
    return f"{url.render_as_string()} {table_name}"


def make_engine(
    url: URL, io_timeout: float, pool_size: int = 2, connect_timeout: float | None = None
) -> Engine:
    """An engine for this process.

    :param io_timeout: seconds that an answer may take.
    :param pool_size: connections at most.
    :param connect_timeout: seconds that connecting may take; left out: as an answer.
    :raises ImproperlyConfigured: the driver is not installed, or SQLite is too old.
    """
    try:
        if url.get_backend_name() == "sqlite":
            return _sqlite(url, io_timeout, pool_size)
        if url.get_backend_name() == "mysql":
            return _mysql(url, io_timeout, pool_size, connect_timeout or io_timeout)
        return _postgresql(url, io_timeout, pool_size, connect_timeout or io_timeout)
    except ImportError as error:
        raise ImproperlyConfigured(
            f"singleton_store_url={url.render_as_string()!r} needs a driver: {error}; "
            f"install celery-singleton-state[{url.get_backend_name()}]"
        ) from error


def _create(url: URL, pool_size: int, io_timeout: float, **options: Any) -> Engine:
    return create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=io_timeout,
        pool_reset_on_return=None,
        pool_use_lifo=True,
        **options,
    )


def _sqlite(url: URL, io_timeout: float, pool_size: int) -> Engine:
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise ImproperlyConfigured(
            f"SQLite {sqlite3.sqlite_version} is too old; "
            f"{'.'.join(map(str, OLDEST_SQLITE))} or newer is needed"
        )
    in_memory = is_in_memory(url)
    engine = _create(
        url,
        1 if in_memory else pool_size,
        io_timeout,
        connect_args={"timeout": io_timeout, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: Any) -> None:
        if not in_memory:
            _use_wal(connection, io_timeout)
            connection.execute("PRAGMA synchronous = NORMAL")

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


def _mysql(url: URL, io_timeout: float, pool_size: int, connect_timeout: float) -> Engine:
    import pymysql
    from pymysql.constants import CLIENT

    class Connection(pymysql.connections.Connection):  # type: ignore[misc]
        """A connection whose patience with a server that stays silent can be changed.

        It knows whether it was broken off in mid-statement, by a time limit say.
        """

        is_in_mid_statement = False

        def query(self, *args: Any, **kwargs: Any) -> Any:
            return self._whole(super().query, *args, **kwargs)

        def next_result(self, *args: Any, **kwargs: Any) -> Any:
            return self._whole(super().next_result, *args, **kwargs)

        def _whole(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self.is_in_mid_statement = True
            try:
                result = step(*args, **kwargs)
            except pymysql.MySQLError:
                self.is_in_mid_statement = not self.open
                raise
            self.is_in_mid_statement = False
            return result

        @property
        def patience(self) -> float | None:
            patience: float | None = self._read_timeout
            return patience

        @patience.setter
        def patience(self, seconds: float | None) -> None:
            self._read_timeout = seconds

    engine = _create(
        url,
        pool_size,
        io_timeout,
        connect_args={
            "charset": "utf8mb4",
            "client_flag": CLIENT.MULTI_STATEMENTS | CLIENT.FOUND_ROWS,
            "connect_timeout": connect_timeout,
            "read_timeout": io_timeout,
            "write_timeout": io_timeout,
            "program_name": APPLICATION_NAME,
            # Times are UTC, and a text that is too long is an error.
            "init_command": "SET time_zone = '+00:00', sql_mode = 'TRADITIONAL',"
            f" innodb_lock_wait_timeout = {math.ceil(io_timeout)}",
        },
    )

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, args: Any, kwargs: Any) -> Connection:
        return Connection(*args, **kwargs)

    return engine


def _postgresql(url: URL, io_timeout: float, pool_size: int, connect_timeout: float) -> Engine:
    import psycopg

    class Connection(psycopg.Connection[Any]):
        """A connection that gives up on a server which stays silent.

        TCP's own time-outs do not see a proxy that acknowledges and never answers.
        """

        patience: float | None = io_timeout

        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            if self.patience is not None:
                gen = self._impatient(gen, self.patience)
            return super().wait(gen, *args, **kwargs)

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
                        self.pgconn.finish()
                        raise psycopg.OperationalError(f"no answer within {patience:g} s")
                    wanted = gen.send(ready)
            except StopIteration as stop:
                return stop.value

    query = dict(url.query)
    threshold = str(query.pop("prepare_threshold", "0"))
    engine = _create(
        url.set(query=query),
        pool_size,
        io_timeout,
        use_native_hstore=False,
        connect_args={
            "connect_timeout": math.ceil(connect_timeout),
            "tcp_user_timeout": math.ceil(io_timeout * 1000),
            "application_name": query.get("application_name", APPLICATION_NAME),
            # Prepared at first use. A pooler that cannot pass that on: ?prepare_threshold=none
            "prepare_threshold": None if threshold == "none" else int(threshold),
        },
    )

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, args: Any, kwargs: Any) -> Connection:
        return Connection.connect(*args, **kwargs)

    return engine
