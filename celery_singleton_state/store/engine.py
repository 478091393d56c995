"""The engine behind a URL: connections to the store's database, few, and never silent for long.

Engines must be made in the process that uses them.
"""

from __future__ import annotations

from pathlib import Path

from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError

from . import on_sqlite
from .dialects import DIALECTS


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
    patience = connect_timeout or io_timeout
    try:
        # Each driver is needed for its own database only.
        if url.get_backend_name() == "sqlite":
            return on_sqlite.make(url, is_in_memory(url), io_timeout, pool_size)
        if url.get_backend_name() == "mysql":
            from . import on_mysql

            return on_mysql.make(url, io_timeout, pool_size, patience)
        from . import on_postgresql

        return on_postgresql.make(url, io_timeout, pool_size, patience)
    except ImportError as error:
        raise ImproperlyConfigured(
            f"singleton_store_url={url.render_as_string()!r} needs a driver: {error}; "
            f"install celery-singleton-state[{url.get_backend_name()}]"
        ) from error
