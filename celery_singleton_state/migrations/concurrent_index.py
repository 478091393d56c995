"""The index of a PostgreSQL table that is there already, built beside its readers and writers.

That takes no lock which others wait for, but cannot be part of a transaction. One whose build broke
off is in the way, and is built anew. Where only the client died it did not break off: the database
goes on building.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Table
from sqlalchemy.schema import CreateIndex, DropIndex

from celery_singleton_state.store.sql.schema import make_table
from celery_singleton_state.store.sql.store import open_transaction

#: Seconds that others' work on the table is waited for, before it is said by whom. Only such work
#: waits behind; and longer than the second after which an autovacuum lets others pass
#: (``deadlock_timeout``).
LOCK_TIMEOUT = 5

_BROKEN = """
SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
WHERE indrelid = to_regclass(:table) AND NOT indisvalid
"""


def build_index(engine: Engine, table_name: str) -> None:
    """Build the index of a table that is there and has none, or one that broke off."""
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
    """Whether the table has the index, under whatever name; and which of all are broken."""
    (index,) = table.indexes
    names = {
        found["name"]
        for found in sa.inspect(connection).get_indexes(table.name, schema=table.schema)
        if found["column_names"] == [column.name for column in index.columns]
    }
    # In this order, as one that appears in between is not built yet.
    broken = connection.scalars(sa.text(_BROKEN), {"table": quoted}).all()
    return bool(names.difference(broken)), broken


def _wait_for_builds(engine: Engine, quoted: str) -> None:
    """Let a build end whose client died.

    It waits for whoever has a snapshot, as a statement has that waits for its lock in order to
    build or drop an index: each would wait for the other. ``LOCK`` has none.
    """
    with open_transaction(engine) as connection:
        connection.execute(sa.text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s'"))
        connection.execute(sa.text(f"LOCK TABLE {quoted} IN SHARE UPDATE EXCLUSIVE MODE"))
