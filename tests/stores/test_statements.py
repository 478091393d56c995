"""Tests that each ``.sql`` file has all statements, and that its database accepts them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

import celery_singleton_state.store.sql as package
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.sql.dialects import DATABASES
from celery_singleton_state.store.sql.schema import make_table
from celery_singleton_state.store.sql.statements import Statements, statements_in
from celery_singleton_state.store.sql.store import SqlStore

#: Attributes of ``Statements`` that its classes define in Python, not in a ``.sql`` file.
IN_PYTHON = {"now", "level", "begin", "insert", "largest", "rows", "encoding_advice"}
DECLARED = set(Statements.__annotations__) - IN_PYTHON
#: Statements that a database's ``.sql`` file may leave out, because ``Statements`` has a default.
OPTIONAL = {name for name in DECLARED if hasattr(Statements, name)}

#: Maps each parameter of the statements to a value for it.
PARAMETERS: dict[str, Any] = {
    "also": "b",
    "entries": '[{"key": "k", "value": "1"}]',
    "fence": 1,
    "first": 1,
    "history": "[]",
    "handoff_to": "w",
    "hold": 1.0,
    "holder": "host:1:a.1",
    "key": "k",
    "keys": '["k"]',
    "leases": '[{"key": "k", "fence": 1, "holder": "host:1:a.1", "ttl": 8.0}]',
    "number": 1,
    "of_clock": "clock:%",
    "older_than": 60.0,
    "outcome": "succeeded",
    "prefix": "a",
    "rank": 0,
    "schema": "",
    "schema_version": 1,
    "seen": 0,
    "sent": "clock:1",
    "table": "kv_store",
    "task": "t",
    "task_id": "id",
    "tasks": '[{"key": "k", "task": "t"}]',
    "ticks_done": None,
    "ttl": 8.0,
    "value": "null",
    "values": True,
    "wanted": None,
    "pending_run": "{}",
    "write": 0,
}
#: The first words of the statements that EXPLAIN accepts.
EXPLAINED = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sections(database: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each statement in a database's ``.sql`` file, comments
    included.
    """
    text = files(package).joinpath(f"{database}.sql").read_text(encoding="utf-8")
    for part in text.split("\n-- name: ")[1:]:
        name, _, rest = part.partition("\n")
        yield name, rest


def test_each_file_has_the_declared_statements(database: str) -> None:
    names = [name for name, _ in sections(database)]
    assert len(names) == len(set(names))
    assert DECLARED - OPTIONAL <= set(names) <= DECLARED


def test_each_statement_is_used() -> None:
    python = "".join(
        each.read_text(encoding="utf-8")
        for each in files(package).iterdir()
        if each.name.endswith(".py")
    )
    unused = {name for name in DECLARED if not re.search(rf"_sql\.{name}\b", python)}
    assert not unused
    assert {name for database in DATABASES for name, _ in sections(database)} == DECLARED


def test_each_statement_begins_with_a_one_sentence_comment(database: str) -> None:
    for name, text in sections(database):
        assert re.match(r"-- [A-Z][^.]+\.\n", text), name
        statement = statements_in(database)[name]
        assert statement in text, f"{name}: its comments come before it"
        assert text.rstrip().endswith(";"), name


def test_the_tables_name_is_the_only_placeholder(database: str) -> None:
    for name, statement in statements_in(database).items():
        assert set(re.findall(r"{(\w*)}", statement)) <= {"table"}, name


def test_the_check_reads_all_columns(database: str) -> None:
    statements = statements_in(database)
    columns = {column.name for column in make_table("kv_store").columns}
    read = re.search(r"SELECT(.*?)FROM", statements["check"], re.DOTALL)
    assert read is not None
    assert set(re.findall(r"\w+", read[1])) == columns
    if database == "mysql":
        assert set(re.findall(r"'(\w+)'", statements["encodings"])) == columns | {"utf8mb4"}


def test_the_database_explains_each_statement(store_url: str) -> None:
    """EXPLAIN shows that each statement is valid for its database and that its types fit. The test
    also shows that an operator can paste each statement into a client.
    """
    store = open_store(store_url, "kv_store", 10.0, auto_migrate=True)
    assert isinstance(store, SqlStore)
    explained = set()
    for name in DECLARED:
        for part in store._sql.parts(getattr(store._sql, name) or ""):
            if part.startswith(EXPLAINED):
                assert store._rows(f"EXPLAIN {part}", PARAMETERS), name
                explained.add(name)
    store.close()
    assert explained == {name for name in DECLARED if getattr(store._sql, name)}
