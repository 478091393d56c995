"""The table, made new or upgraded from ``key``, ``value``, ``updated_at``.

Every added column may be null, so that no row is rewritten and old writers go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None

# MariaDB and MySQL: compared by their bytes, without a limit but for the key, to the microsecond.
BINARY = {"charset": "utf8mb4", "collation": "utf8mb4_bin"}
KEY = sa.Text().with_variant(mysql.VARCHAR(255, **BINARY), "mysql")
TEXT = sa.Text().with_variant(mysql.LONGTEXT(**BINARY), "mysql")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql")

#: Percent of a page of PostgreSQL's that new rows fill. In the rest a renewal puts the row's next
#: version, so that no index changes: a ninth of the log is written, and the table stays small.
FILL = 80

# No table of another kind, one that is partitioned say, has storage parameters of its own.
_IS_FILLED_AS_USUAL = """
SELECT NOT EXISTS (
  SELECT FROM unnest(reloptions) AS option WHERE split_part(option, '=', 1) = 'fillfactor'
) FROM pg_class WHERE oid = to_regclass(:table) AND relkind = 'r'
"""


def given() -> list[sa.Column[object]]:
    return [
        sa.Column("key", KEY, primary_key=True),
        sa.Column("value", TEXT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
    ]


def added() -> list[sa.Column[object]]:
    return [
        sa.Column("task", TEXT),
        sa.Column("schema_version", sa.Integer),
        sa.Column("fence", sa.BigInteger),
        sa.Column("write", sa.BigInteger),
        sa.Column("holder", TEXT),
        sa.Column("task_id", TEXT),
        sa.Column("acquired_at", MOMENT),
        sa.Column("expires_at", MOMENT),
        sa.Column("hold_until", MOMENT),
        sa.Column("run_count", sa.BigInteger),
        sa.Column("last_outcome", TEXT),
        sa.Column("last_finished_at", MOMENT),
        sa.Column("history", TEXT),
        sa.Column("ticks_done", TEXT),
        sa.Column("handoff_to", TEXT),
        sa.Column("wanted", TEXT),
        sa.Column("queue", sa.BigInteger),
        sa.Column("queued_task_id", TEXT),
        sa.Column("queued_until", MOMENT),
        sa.Column("newest", sa.BigInteger),
        sa.Column("newest_sent", TEXT),
    ]


def upgrade() -> None:
    """All questions come first: from the first change on nobody else can use the table."""
    schema, _, name = op.get_context().opts["singleton_table"].rpartition(".")
    schema = schema or None
    inspector = sa.inspect(op.get_bind())
    indexed: list[object] = []
    if not inspector.has_table(name, schema=schema):
        created = op.create_table(name, *given(), *added(), schema=schema, mysql_engine="InnoDB")
        change(created, room_for_renewals(created))
    else:
        found = {column["name"]: column for column in inspector.get_columns(name, schema=schema)}
        indexed = [index["column_names"] for index in inspector.get_indexes(name, schema=schema)]
        alter(sa.Table(name, sa.MetaData(), schema=schema), found)
    if ["updated_at"] not in indexed:
        op.create_index(f"idx_{name}_updated_at", name, ["updated_at"], schema=schema)


def alter(table: sa.Table, found: dict[str, Any]) -> None:
    """Add columns, by one statement where a database has that: each may wait for others."""
    dialect = op.get_bind().dialect
    changes = room_for_renewals(table)
    changes += [
        f"ADD COLUMN {definition(column, dialect)}"
        for column in added()
        if column.name not in found
    ]
    if dialect.name == "mysql":
        changes += [f"MODIFY COLUMN {definition(column, dialect)}" for column in changed(found)]
    change(table, changes)


def room_for_renewals(table: sa.Table) -> list[str]:
    """The change that leaves room in each page, unless the owner has said how full pages are.

    It is for pages that are written from now on: no row is rewritten.
    """
    bind = op.get_bind()
    if bind.dialect.name != "postgresql":
        return []
    quoted = bind.dialect.identifier_preparer.format_table(table)
    as_usual = bind.scalar(sa.text(_IS_FILLED_AS_USUAL), {"table": quoted})
    return [f"SET (fillfactor = {FILL})"] if as_usual else []


def change(table: sa.Table, changes: list[str]) -> None:
    """Alter a table, by one statement unless that is SQLite's."""
    dialect = op.get_bind().dialect
    quoted = dialect.identifier_preparer.format_table(table)
    for each in changes if dialect.name == "sqlite" else [", ".join(changes)]:
        if each:
            op.execute(f"ALTER TABLE {quoted} {each}")


def definition(column: sa.Column[object], dialect: sa.Dialect) -> str:
    return str(sa.schema.CreateColumn(column).compile(dialect=dialect))


def changed(found: dict[str, Any]) -> Iterator[sa.Column[object]]:
    """Columns of MariaDB's or MySQL's that are to be as a new table has them.

    Two keys that differ only in case are two; and of two moments within a second one is later.
    """
    for column in given():
        before = found[column.name]["type"]
        if isinstance(before, sa.String):
            as_wanted = getattr(before, "collation", None) == BINARY["collation"]
        else:
            as_wanted = getattr(before, "fsp", None) == 6
            if isinstance(before, mysql.TIMESTAMP):
                column = sa.Column(column.name, mysql.TIMESTAMP(fsp=6), nullable=False)
        if not as_wanted:
            default = found[column.name].get("default")
            if default is not None:
                column.server_default = sa.DefaultClause(sa.text(to_the_microsecond(default)))
            yield column


def to_the_microsecond(default: str) -> str:
    """A column's default, or what it is set to at each change, as precise as its column."""
    return re.sub(r"(?i)\bcurrent_timestamp\b(\(\d*\))?", "CURRENT_TIMESTAMP(6)", default)
