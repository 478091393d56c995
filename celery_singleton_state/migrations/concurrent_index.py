"""Build the index of an existing PostgreSQL table without blocking its readers and writers.

``CREATE INDEX CONCURRENTLY`` takes no lock that readers or writers wait for, but it cannot run in a
transaction. A build that fails leaves a broken (invalid) index, which must be dropped before the
next build. If only the client dies, the build does not fail: the database goes on building.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Table
from sqlalchemy.schema import CreateIndex, DropIndex

from celery_singleton_state.store.sql.schema import make_table
from celery_singleton_state.store.sql.store import open_transaction

#: The longest time, in seconds, to wait for the lock of another session that maintains the table,
#: for example builds another index. Readers and writers do not queue behind this wait. The time is
#: longer than PostgreSQL's ``deadlock_timeout`` (1 s), because a waiting session cancels an
#: autovacuum that holds the lock, but not before ``deadlock_timeout``.
LOCK_TIMEOUT = 5

_BROKEN = """
SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
WHERE indrelid = to_regclass(:table) AND NOT indisvalid
"""


def build_index(engine: Engine, table_name: str) -> None:
    """Build the index on ``updated_at`` if the table exists and has no working index on it."""
    table = make_table(table_name)
    (index,) = table.indexes
    index.dialect_options["postgresql"]["concurrently"] = True
    quoted = engine.dialect.identifier_preparer.format_table(table)
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(table.name, schema=table.schema):
            return
        if _found(connection, table, quoted)[0]:
            return
    _wait_for_builds(engine, quoted)
    with engine.connect() as connection:
        is_built, broken = _found(connection, table, quoted)
        if is_built:
            return
        if index.name in broken:
            connection.execute(DropIndex(index))
        connection.execute(CreateIndex(index))


def _found(connection: Connection, table: Table, quoted: str) -> tuple[bool, Sequence[str]]:
    """Return whether the table has a working index on ``updated_at``, and the names of its broken
    indexes.

    The working index may have any name.

    :param quoted: the table's name, quoted for SQL.
    """
    (index,) = table.indexes
    names = {
        found["name"]
        for found in sa.inspect(connection).get_indexes(table.name, schema=table.schema)
        if found["column_names"] == [column.name for column in index.columns]
    }
    # Ask for the broken indexes last, because a new index counts as broken until it is built. In
    # the other order an index whose build begins between the two queries would count as working.
    broken = connection.scalars(sa.text(_BROKEN), {"table": quoted}).all()
    return bool(names.difference(broken)), broken


def _wait_for_builds(engine: Engine, quoted: str) -> None:
    """Wait until other index builds on the table have ended, for example a build whose client died.

    ``CREATE INDEX`` and ``DROP INDEX`` cannot wait for such a build: they hold a snapshot while
    they wait for their lock, and the build waits for all snapshots, so each would wait for the
    other. ``LOCK TABLE`` waits without a snapshot.
    """
    with open_transaction(engine) as connection:
        connection.execute(sa.text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s'"))
        connection.execute(sa.text(f"LOCK TABLE {quoted} IN SHARE UPDATE EXCLUSIVE MODE"))
