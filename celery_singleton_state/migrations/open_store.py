"""Opening the database of a store, whose table is made or upgraded at first use if need be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError

from celery_singleton_state.store.base import StoreMisconfigured, StoreNotReady, StoreUnavailable
from celery_singleton_state.store.sql.engine import is_in_memory, make_engine
from celery_singleton_state.store.sql.store import SqlStore
from celery_singleton_state.store.sql.url import parse_url
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)


def open_store(
    url: str,
    table_name: str,
    io_timeout: float,
    pool_size: int = 2,
    auto_migrate: bool | None = None,
) -> SqlStore:
    """The store behind a URL, for this process.

    :param io_timeout: seconds of silence after which the database counts as out of reach.
    :param pool_size: connections at most.
    :param auto_migrate: make or upgrade the table if need be; left out: on SQLite only.
    :raises ImproperlyConfigured: the URL, its driver or its database cannot be used.
    :raises StoreError: the table was to be made and that failed, or cannot help.
    """
    parsed = parse_url(url)
    store = SqlStore(make_engine(parsed, io_timeout, pool_size), table_name)
    if auto_migrate is None:
        auto_migrate = parsed.get_backend_name() == "sqlite"
    if auto_migrate:
        try:
            _see_to_table(store, url)
        except BaseException:
            store.close()
            raise
    return store


def _see_to_table(store: SqlStore, url: str) -> None:
    try:
        # Whatever its keys will be.
        store.check(())
    except StoreMisconfigured:
        raise
    except StoreNotReady:
        _make_table(store, url)


def _make_table(store: SqlStore, url: str) -> None:
    try:
        with _quiet_alembic():
            # It takes longer to import than all else here, and is needed once in a table's life.
            from .upgrade import migrate_engine, migrate_url

            if is_in_memory(store.engine.url):
                migrate_engine(store.engine, store.table.fullname)
            else:
                migrate_url(url, store.table.fullname)
        logger.info("table %s was made or upgraded", store.table.fullname)
    except SQLAlchemyError as error:
        raise StoreUnavailable(
            f"table {store.table.fullname} could not be made: {error}"
        ) from error


@contextmanager
def _quiet_alembic() -> Iterator[None]:
    """Without Alembic's own account of it, which would bury a worker's first lines."""
    alembic = logging.getLogger("alembic")
    level = alembic.level
    alembic.setLevel(logging.WARNING)
    try:
        yield
    finally:
        alembic.setLevel(level)
