"""The engine behind a URL: connections to the store's database, few, and never silent for long.

Engines must be made in the process that uses them.
"""

from __future__ import annotations

from pathlib import Path

from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL, Engine
from sqlalchemy.exc import ArgumentError

from celery_singleton_state.text.urls import shown_url

from .dialects import module_of


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
    :raises ImproperlyConfigured: the driver is not installed or does not know an option of the
        URL, or SQLite is too old.
    """
    patience = connect_timeout or io_timeout
    try:
        made: Engine = module_of(url.get_backend_name()).make(url, io_timeout, pool_size, patience)
        return made
    except ImportError as error:
        raise ImproperlyConfigured(
            f"singleton_store_url={shown_url(url)!r} needs a driver: {error}; "
            f"pip install celery-singleton-state[{url.get_backend_name()}]"
        ) from error
    except (ArgumentError, TypeError, ValueError) as error:
        # Of SQLAlchemy's look at the URL. What it says of a value may be the whole URL.
        raise ImproperlyConfigured(
            f"singleton_store_url={shown_url(url)!r} cannot be used: {_why(url, error)}"
        ) from None


def _why(url: URL, error: Exception) -> str:
    if url.get_backend_name() == "sqlite" and isinstance(error, ArgumentError):
        return "write sqlite:///file.db for a file of this folder, sqlite:////folder/file.db else"
    return f"an option has a value that is not allowed ({type(error).__name__})"
