"""The table, made new or upgraded from ``key``, ``value``, ``updated_at``.

Every added column may be null, so that no row is rewritten and old writers go on.
"""

from __future__ import annotations

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


def given() -> list[sa.Column[object]]:
    return [
        sa.Column("key", KEY, primary_key=True),
        sa.Column("value", TEXT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
    ]


def added() -> list[sa.Column[object]]:
    return [
        sa.Column("schema_version", sa.Integer),
        sa.Column("fence", sa.BigInteger),
        sa.Column("holder", TEXT),
        sa.Column("task_id", TEXT),
        sa.Column("acquired_at", MOMENT),
        sa.Column("expires_at", MOMENT),
        sa.Column("run_count", sa.BigInteger),
        sa.Column("last_outcome", TEXT),
        sa.Column("last_finished_at", MOMENT),
        sa.Column("history", TEXT),
        sa.Column("handoff_to", TEXT),
        sa.Column("wanted", TEXT),
        sa.Column("queued_task_id", TEXT),
        sa.Column("queued_until", MOMENT),
    ]


def compare_by_bytes(name: str, schema: str | None, inspector: sa.Inspector) -> None:
    """Have keys and values as a new table has them: two keys that differ only in case are two."""
    found = {
        column["name"]: column["type"] for column in inspector.get_columns(name, schema=schema)
    }
    for column, wanted in {"key": KEY, "value": TEXT}.items():
        is_text = isinstance(found[column], sa.String)
        if is_text and getattr(found[column], "collation", None) != BINARY["collation"]:
            op.alter_column(name, column, type_=wanted, nullable=False, schema=schema)


def upgrade() -> None:
    schema, _, name = op.get_context().opts["singleton_table"].rpartition(".")
    schema = schema or None
    inspector = sa.inspect(op.get_bind())
    if not inspector.has_table(name, schema=schema):
        op.create_table(name, *given(), *added(), schema=schema, mysql_engine="InnoDB")
    else:
        present = {column["name"] for column in inspector.get_columns(name, schema=schema)}
        for column in added():
            if column.name not in present:
                op.add_column(name, column, schema=schema)
        if op.get_bind().dialect.name == "mysql":
            compare_by_bytes(name, schema, inspector)
    inspector.clear_cache()
    indexed = [index["column_names"] for index in inspector.get_indexes(name, schema=schema)]
    if ["updated_at"] not in indexed:
        op.create_index(f"idx_{name}_updated_at", name, ["updated_at"], schema=schema)
