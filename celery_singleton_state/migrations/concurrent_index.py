"""The index of a PostgreSQL table that is there already, built beside its readers and writers.

That takes no lock which others wait for, but cannot be part of a transaction. One whose build broke
off is in the way, and is built anew.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.schema import CreateIndex, DropIndex

from celery_singleton_state.store.schema import make_table

_BROKEN = """
SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
WHERE indrelid = to_regclass(:table) AND NOT indisvalid
"""


def build_index(engine: Engine, table_name: str) -> None:
    """Build the index of a table that is there and has none, or one that broke off."""
    table = make_table(table_name)
    (index,) = table.indexes
    index.dialect_options["postgresql"]["concurrently"] = True
    with engine.connect() as connection:
        inspector = sa.inspect(connection)
        if not inspector.has_table(table.name, schema=table.schema):
            return
        names = {
            found["name"]
            for found in inspector.get_indexes(table.name, schema=table.schema)
            if found["column_names"] == [column.name for column in index.columns]
        }
        quoted = engine.dialect.identifier_preparer.format_table(table)
        broken = connection.scalars(sa.text(_BROKEN), {"table": quoted}).all()
        if names.difference(broken):
            return
        if index.name in broken:
            connection.execute(DropIndex(index))
        connection.execute(CreateIndex(index))
