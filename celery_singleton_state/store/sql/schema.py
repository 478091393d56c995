"""SQLAlchemy's description of the table of singletons and key-value pairs."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
)


def make_table(name: str) -> Table:
    """Return SQLAlchemy's description of the table of singletons and key-value pairs.

    An existing table that has only the columns ``key``, ``value`` and ``updated_at`` and the index
    can be upgraded: all other columns can be added to it.

    :param name: the table's name, for example ``kv_store``. It may have a schema: ``schema.name``.
    """
    schema, _, bare = name.rpartition(".")
    moment = DateTime(timezone=True)
    table = Table(
        bare,
        MetaData(schema=schema or None),
        Column("key", Text, primary_key=True),
        Column("value", Text, nullable=False),
        Column("updated_at", moment, nullable=False),
        Column("task", Text),
        Column("schema_version", Integer),
        Column("fence", BigInteger),
        Column("write", BigInteger),
        Column("holder", Text),
        Column("task_id", Text),
        Column("acquired_at", moment),
        Column("expires_at", moment),
        Column("hold_until", moment),
        Column("run_count", BigInteger),
        Column("last_outcome", Text),
        Column("last_finished_at", moment),
        Column("history", Text),
        Column("ticks_done", Text),
        Column("handoff_to", Text),
        Column("wanted", Text),
        Column("queue", BigInteger),
        Column("queued_task_id", Text),
        Column("queued_until", moment),
        Column("newest", BigInteger),
        Column("newest_sent", Text),
    )
    Index(f"idx_{bare}_updated_at", table.c.updated_at)
    return table
