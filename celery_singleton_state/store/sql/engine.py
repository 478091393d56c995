"""Make SQLAlchemy engines for a store's URL, with few connections and with time-outs.

A process must make its own engine: connections do not survive a fork.
"""

from __future__ import annotations

from pathlib import Path

from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL, Engine
from sqlalchemy.exc import ArgumentError

from celery_singleton_state.text.urls import shown_url

from .dialects import module_of


def is_in_memory(url: URL) -> bool:
    """Return whether a URL names an SQLite database in memory.

    Such a database exists only within one connection of one process.
    """
    return url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")


def identity(url: URL, table_name: str) -> str | None:
    """Return a text that identifies a table of a database. All processes that use the table get
    the same text.

    For a database in memory, which no other process can use, return ``None``.
    """
    if is_in_memory(url):
        return None
    if url.get_backend_name() == "sqlite":
        url = url.set(database=str(Path(url.database or "").resolve()))
    return f"{url.render_as_string()} {table_name}"


def make_engine(
    url: URL, io_timeout: float, pool_size: int = 2, connect_timeout: float | None = None
) -> Engine:
    """Make an engine for the database behind a URL, for this process only.

    :param io_timeout: seconds that the database may take to answer.
    :param pool_size: the largest number of connections.
    :param connect_timeout: seconds that connecting may take. Left out: ``io_timeout``.
    :raises ImproperlyConfigured: the driver is not installed, an option of the URL is not known or
        not allowed, or SQLite is too old.
    """
    connect_timeout = connect_timeout or io_timeout
    try:
        make = module_of(url.get_backend_name()).make
        made: Engine = make(url, io_timeout, pool_size, connect_timeout)
        return made
    except ImportError as error:
        raise ImproperlyConfigured(
            f"singleton_store_url={shown_url(url)!r} needs a driver: {error}; "
            f"pip install celery-singleton-state[{url.get_backend_name()}]"
        ) from error
    except (ArgumentError, TypeError, ValueError) as error:
        # SQLAlchemy could not use the URL. SQLAlchemy's message is not shown, because it may
        # contain the whole URL with the password.
        raise ImproperlyConfigured(
            f"singleton_store_url={shown_url(url)!r} cannot be used: {_why(url, error)}"
        ) from None


def _why(url: URL, error: Exception) -> str:
    if url.get_backend_name() == "sqlite" and isinstance(error, ArgumentError):
        return "write sqlite:///file.db for a file in this folder, or sqlite:////folder/file.db"
    return f"an option has a value that is not allowed ({type(error).__name__})"
