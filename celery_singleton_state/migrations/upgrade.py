"""Create or upgrade the table of the SQL store, with Alembic.

A migration may run again, and in several processes at once: the second process waits for the first
one, and then finds nothing left to do. Alembic keeps the version of the store's table in another
table, ``<table>_version``.
"""

from __future__ import annotations

import threading
from importlib.resources import as_file, files
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from celery.exceptions import ImproperlyConfigured
from sqlalchemy import Engine

from celery_singleton_state.compat import upgrade_steps
from celery_singleton_state.config.settings import NO_SQL, Settings
from celery_singleton_state.store.base import StoreNotReady
from celery_singleton_state.store.sql.engine import make_engine
from celery_singleton_state.store.sql.store import open_transaction
from celery_singleton_state.store.sql.url import parse_url

from . import unobtrusive
from .concurrent_index import build_index

#: The longest time, in seconds, that a statement of a migration may take. Other statements may
#: take only a part of a lease's life, but a migration waits for locks and may build an index.
PATIENCE = 3600.0
#: The longest time, in seconds, that connecting to the database may take.
CONNECT_TIMEOUT = 10.0

#: A lock that lets only one thread of the process migrate at a time, because Alembic keeps the
#: current migration in global variables (``op``).
_one_at_a_time = threading.Lock()


def migrate(settings: Settings) -> None:
    """Create or upgrade the table that the settings name. An existing table keeps its rows.

    :raises ImproperlyConfigured: the URL cannot be used, or the settings name no database.
    :raises StoreError: the role lacks a privilege, or other sessions have locked the table for
        minutes.
    :raises sqlalchemy.exc.SQLAlchemyError: the database refused a statement.
    """
    if not settings.has_store:
        raise ImproperlyConfigured(NO_SQL)
    migrate_url(settings.store_url, settings.table)


def migrate_url(url: str, table_name: str) -> None:
    """Create or upgrade a table in the database behind a URL. An existing table keeps its rows.

    The errors are those of :func:`migrate`.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "postgresql":
        # Do not prepare statements. Each statement is sent only once, so preparing it would only
        # make other sessions wait longer for the migration's locks.
        parsed = parsed.update_query_dict({"prepare_threshold": "none"})
    engine = make_engine(parsed, PATIENCE, connect_timeout=CONNECT_TIMEOUT)
    try:
        migrate_engine(engine, table_name)
    finally:
        engine.dispose()


def migrate_engine(engine: Engine, table_name: str) -> None:
    """Create or upgrade a table in the database of an engine. An existing table keeps its rows.

    The errors are those of :func:`migrate`.
    """
    package = files("celery_singleton_state") / "migrations"
    with _one_at_a_time, as_file(package) as location:

        def upgrade() -> None:
            if engine.dialect.name == "postgresql":
                build_index(engine, table_name)
            _upgrade(engine, table_name, str(location))

        if engine.dialect.name == "sqlite":
            # SQLite's write transaction excludes other writers, so no further lock is needed.
            upgrade()
        else:
            unobtrusive.migrate(engine, table_name, upgrade)


def _upgrade(engine: Engine, table_name: str, location: str) -> None:
    with open_transaction(engine) as connection:
        unobtrusive.give_up_soon(connection)
        script = ScriptDirectory(location)

        def to_head(revision: Any, _context: Any) -> Any:
            return upgrade_steps(script, revision)

        schema, _, bare = table_name.rpartition(".")
        with EnvironmentContext(Config(), script, fn=to_head) as environment:
            environment.configure(
                connection=connection,
                version_table=f"{bare}_version",
                version_table_schema=schema or None,
                singleton_table=table_name,
            )
            try:
                environment.run_migrations()
            except CommandError as error:
                raise StoreNotReady(
                    f"table {table_name} was upgraded by a newer release than this one, install "
                    f"that release: {error}"
                ) from error
