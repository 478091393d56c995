"""Create the store's table, or add the singletons' columns to an existing table that has only the
columns ``key``, ``value`` and ``updated_at``.

Every added column is nullable, so that the database rewrites no row, and programs that know only
the three old columns can go on writing.
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

# The types of the columns: of the key, of other texts and of times. On MariaDB and MySQL texts are
# compared by their bytes, so that keys are case-sensitive. There the key has a length limit,
# because these databases need a limit in a primary key. Times have microseconds.
BINARY = {"charset": "utf8mb4", "collation": "utf8mb4_bin"}
KEY = sa.Text().with_variant(mysql.VARCHAR(255, **BINARY), "mysql")
TEXT = sa.Text().with_variant(mysql.LONGTEXT(**BINARY), "mysql")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql")

#: The table's fillfactor on PostgreSQL: new rows fill this percentage of a page. An update, such as
#: a renewal, puts the row's new version into the free rest of the page (a "HOT" update), so that no
#: index changes. A renewal then writes a ninth as much write-ahead log, and the table stays small.
FILL = 80

# A query that returns whether a table has PostgreSQL's default fillfactor. It returns no row for
# other tables than ordinary ones (relkind r), because a partitioned table, for example, has no
# fillfactor.
_IS_FILLED_AS_USUAL = """
SELECT NOT EXISTS (
  SELECT FROM unnest(reloptions) AS option WHERE split_part(option, '=', 1) = 'fillfactor'
) FROM pg_class WHERE oid = to_regclass(:table) AND relkind = 'r'
"""


def given() -> list[sa.Column[object]]:
    """Return the three columns that an existing ``kv_store`` table has before the upgrade."""
    return [
        sa.Column("key", KEY, primary_key=True),
        sa.Column("value", TEXT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
    ]


def added() -> list[sa.Column[object]]:
    """Return the columns that the upgrade adds."""
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
    """Create the table and its index, or upgrade them.

    All queries about the table come before the first change, because the first change locks the
    table for other sessions.
    """
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
    """Add the missing columns and adapt the existing ones, if possible in one statement.

    Each statement may have to wait for a lock, so one statement is better than several.

    :param found: the existing columns by name, as SQLAlchemy's inspector describes them.
    """
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
    """Return a change of a table's fillfactor, as a list for :func:`change`.

    With the new fillfactor each page has room for new versions of its rows, which renewals write.

    The list is empty on other databases than PostgreSQL, and if the table's owner has set a
    fillfactor. The change applies to pages that are written from now on; no row is rewritten.
    """
    bind = op.get_bind()
    if bind.dialect.name != "postgresql":
        return []
    quoted = bind.dialect.identifier_preparer.format_table(table)
    as_usual = bind.scalar(sa.text(_IS_FILLED_AS_USUAL), {"table": quoted})
    return [f"SET (fillfactor = {FILL})"] if as_usual else []


def change(table: sa.Table, changes: list[str]) -> None:
    """Alter a table in one statement, or on SQLite in one statement for each change, because SQLite
    accepts only one change in a statement.
    """
    dialect = op.get_bind().dialect
    quoted = dialect.identifier_preparer.format_table(table)
    for each in changes if dialect.name == "sqlite" else [", ".join(changes)]:
        if each:
            op.execute(f"ALTER TABLE {quoted} {each}")


def definition(column: sa.Column[object], dialect: sa.Dialect) -> str:
    """Return the SQL text that defines a column, as in ``CREATE TABLE``."""
    return str(sa.schema.CreateColumn(column).compile(dialect=dialect))


def changed(found: dict[str, Any]) -> Iterator[sa.Column[object]]:
    """Yield the columns of a MariaDB or MySQL table whose types must change.

    Texts must be compared by their bytes, so that two keys that differ only in case are different
    keys. Times must have microseconds, so that two times within one second can be compared.

    :param found: the existing columns by name, as SQLAlchemy's inspector describes them.
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
    """Return a column's default, with ``CURRENT_TIMESTAMP`` changed to microseconds: MySQL refuses
    a default whose precision differs from the column's precision.

    The default may include MySQL's ``ON UPDATE CURRENT_TIMESTAMP``.
    """
    return re.sub(r"(?i)\bcurrent_timestamp\b(\(\d*\))?", "CURRENT_TIMESTAMP(6)", default)
