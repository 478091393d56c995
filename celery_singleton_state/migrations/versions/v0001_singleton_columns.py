"""The table, made new or upgraded from ``key``, ``value``, ``updated_at``.

Every added column may be null, so that no row is rewritten and old writers go on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

MOMENT = sa.DateTime(timezone=True)


def given() -> list[sa.Column[object]]:
    return [
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
    ]


def added() -> list[sa.Column[object]]:
    return [
        sa.Column("schema_version", sa.Integer),
        sa.Column("fence", sa.BigInteger),
        sa.Column("holder", sa.Text),
        sa.Column("task_id", sa.Text),
        sa.Column("acquired_at", MOMENT),
        sa.Column("expires_at", MOMENT),
        sa.Column("run_count", sa.BigInteger),
        sa.Column("last_outcome", sa.Text),
        sa.Column("last_finished_at", MOMENT),
        sa.Column("history", sa.Text),
        sa.Column("handoff_to", sa.Text),
        sa.Column("wanted", sa.Text),
        sa.Column("queued_task_id", sa.Text),
        sa.Column("queued_until", MOMENT),
    ]


def upgrade() -> None:
    schema, _, name = op.get_context().opts["singleton_table"].rpartition(".")
    schema = schema or None
    inspector = sa.inspect(op.get_bind())
    if not inspector.has_table(name, schema=schema):
        op.create_table(name, *given(), *added(), schema=schema)
    else:
        present = {column["name"] for column in inspector.get_columns(name, schema=schema)}
        for column in added():
            if column.name not in present:
                op.add_column(name, column, schema=schema)
    inspector.clear_cache()
    indexed = [index["column_names"] for index in inspector.get_indexes(name, schema=schema)]
    if ["updated_at"] not in indexed:
        op.create_index(f"idx_{name}_updated_at", name, ["updated_at"], schema=schema)
