"""Open the SQL store behind a URL, and create or upgrade its table if that is allowed."""

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
    """Open the store behind a URL, for this process only: connections do not survive a fork.

    :param table_name: the table's name, which may have a schema: ``schema.name``.
    :param io_timeout: seconds without an answer after which the database counts as unavailable.
    :param pool_size: the largest number of connections.
    :param auto_migrate: whether to create or upgrade the table if necessary. Left out: true on
        SQLite, false on other databases.
    :raises ImproperlyConfigured: the URL, its driver or its database cannot be used.
    :raises StoreError: the table could not be created or upgraded, or the database has a fault that
        creating or upgrading the table does not correct.
    """
    parsed = parse_url(url)
    store = SqlStore(make_engine(parsed, io_timeout, pool_size), table_name)
    if auto_migrate is None:
        auto_migrate = parsed.get_backend_name() == "sqlite"
    if auto_migrate:
        try:
            _create_table_if_missing(store, url)
        except BaseException:
            store.close()
            raise
    return store


def _create_table_if_missing(store: SqlStore, url: str) -> None:
    try:
        # Pass no prefixes to the check, because the keys' prefixes are not known here.
        store.check(())
    except StoreMisconfigured:
        raise
    except StoreNotReady:
        _create_table(store, url)


def _create_table(store: SqlStore, url: str) -> None:
    try:
        with _quiet_alembic():
            # This module is imported only here, because it imports Alembic, which takes long and is
            # rarely needed.
            from .upgrade import migrate_engine, migrate_url

            if is_in_memory(store.engine.url):
                migrate_engine(store.engine, store.table.fullname)
            else:
                migrate_url(url, store.table.fullname)
        logger.info("table %s was created or upgraded", store.table.fullname)
    except SQLAlchemyError as error:
        raise StoreUnavailable(
            f"table {store.table.fullname} could not be created or upgraded: {error}"
        ) from error


@contextmanager
def _quiet_alembic() -> Iterator[None]:
    """Silence Alembic's log lines below WARNING, because they would bury a worker's first lines."""
    alembic = logging.getLogger("alembic")
    level = alembic.level
    alembic.setLevel(logging.WARNING)
    try:
        yield
    finally:
        alembic.setLevel(level)
