"""Tables that users made without this package, and functions that read a table's columns and
indexes.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import create_engine, make_url

from celery_singleton_state.store.sql.schema import make_table

GIVEN = """
CREATE TABLE {name} (
  {key} {text} PRIMARY KEY,
  value TEXT NOT NULL,
  updated_at {moment} NOT NULL DEFAULT CURRENT_TIMESTAMP
)
"""


def execute(url: str, *statements: str) -> Any:
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            result = connection.exec_driver_sql(statement)
        answer = result.all() if result.returns_rows else None
    engine.dispose()
    return answer


def given_table(url: str, name: str = "kv_store") -> str:
    text, moment = {
        "sqlite": ("TEXT", "TIMESTAMP"),
        "postgresql": ("VARCHAR(255)", "TIMESTAMPTZ"),
        "mysql": ("VARCHAR(255)", "DATETIME"),
    }[make_url(url).get_backend_name()]
    return GIVEN.format(name=name, text=text, moment=moment, key=key_of(url))


def key_of(url: str) -> str:
    """Return the name of the key's column, quoted if it is a keyword of the database."""
    return "`key`" if url.startswith("mysql") else "key"


def columns_and_indexes(url: str, name: str = "kv_store") -> tuple[set[str], list[Any]]:
    engine = create_engine(url)
    inspector = sa.inspect(engine)
    columns = {column["name"] for column in inspector.get_columns(name)}
    indexes = [(index["name"], index["column_names"]) for index in inspector.get_indexes(name)]
    engine.dispose()
    return columns, indexes


ALL_COLUMNS = set(make_table("kv_store").columns.keys())
