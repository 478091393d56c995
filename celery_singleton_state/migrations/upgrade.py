"""Making and upgrading the table, by Alembic driven from code.

Safe to run again, and by several processes at once: the second waits for the first and finds
nothing left to do. The version stands in a table of its own, ``<table>_version``.
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

#: Upgrading waits for locks and may build an index, so it is not bound by a lease's life.
PATIENCE = 3600.0
CONNECT_TIMEOUT = 10.0

#: Alembic's ``op`` belongs to the whole process.
_one_at_a_time = threading.Lock()


def migrate(settings: Settings) -> None:
    """Make the table that the settings name, or upgrade it; its rows are kept.

    :raises ImproperlyConfigured: the URL cannot be used, or there is no database.
    :raises StoreError: the role may not do it, or others have locked the table for minutes.
    :raises sqlalchemy.exc.SQLAlchemyError: the database refused.
    """
    if not settings.has_store:
        raise ImproperlyConfigured(NO_SQL)
    migrate_url(settings.store_url, settings.table)


def migrate_url(url: str, table_name: str) -> None:
    """The same for the table in the database behind a URL."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "postgresql":
        # Each statement is sent once, and some while others wait.
        parsed = parsed.update_query_dict({"prepare_threshold": "none"})
    engine = make_engine(parsed, PATIENCE, connect_timeout=CONNECT_TIMEOUT)
    try:
        migrate_engine(engine, table_name)
    finally:
        engine.dispose()


def migrate_engine(engine: Engine, table_name: str) -> None:
    """The same on an engine that is there already."""
    package = files("celery_singleton_state") / "migrations"
    with _one_at_a_time, as_file(package) as location:

        def upgrade() -> None:
            if engine.dialect.name == "postgresql":
                build_index(engine, table_name)
            _upgrade(engine, table_name, str(location))

        if engine.dialect.name == "sqlite":
            # Its transaction keeps all others out.
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
                    f"table {table_name} is of a newer release than this one: {error}"
                ) from error
