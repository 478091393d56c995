"""A body that forks a child process: the run belongs to the parent, whatever the child does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from celery_singleton_state.history import decode
from celery_singleton_state.migrations.open_store import open_store
from tests.helpers.fleet import ROOT
from tests.helpers.stores import url_on

#: Maps each thing that the child may do (see tests/apps/forking.py) to the lines that the child
#: then writes to its notes.
NOTES_OF = {
    "use": ["is refused: checkpoint", "is refused: transaction", "succeeds"],
    "use_its_own": ["has its own", "succeeds"],
    "leave": [],
    "fail": ["LookupError"],
    "come_back": ["succeeds"],
    # The end of a transaction() block would save the state, so it raises RuntimeError in the child.
    "use in transaction": [
        "is refused: checkpoint",
        "is refused: transaction",
        "is refused: statement",
        "RuntimeError",
    ],
    "use_its_own in transaction": ["has its own", "RuntimeError"],
    "leave in transaction": [],
    "fail in transaction": ["LookupError"],
    "come_back in transaction": ["RuntimeError"],
}


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def shared_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database. The test runs once for each kind of database."""
    return url_on(request.param, request, tmp_path)


@pytest.mark.parametrize("how", NOTES_OF)
def test_a_child_that_a_body_forks_leaves_the_run_to_its_parent(
    shared_store_url: str, tmp_path: Path, how: str
) -> None:
    """1. The parent holds the lease, connections, and in some cases an open transaction.
    2. It forks a child, which has copies of all these.
    3. The child acts as ``how`` says, and ends.
    4. The parent goes on and saves.
    """
    store = open_store(shared_store_url, "kv_store", 5.0, auto_migrate=True)
    with store.transaction() as transaction:
        transaction.connection.execute(text("CREATE TABLE written (n integer)"))
    notes = tmp_path / "notes"
    program = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.apps.forking", shared_store_url, how, notes],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (program.returncode, program.stderr) == (0, "")
    lines = notes.read_text().splitlines()
    childs = [line.removeprefix("child ") for line in lines if line.startswith("child")]
    assert childs == NOTES_OF[how]
    assert lines[len(childs) :] == ["parent leads no longer", "parent succeeds"]
    row = store.peek("singleton-state:forks")
    assert row is not None
    assert (row.value, row.holder, row.run_count) == ('{"n":3}', None, 1)
    assert [entry.outcome for entry in decode(row.history, "forks")] == ["succeeded"]
    with store.engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT n FROM written ORDER BY n").scalars().all()
    assert rows == ([1, 2] if "transaction" in how else [])
    store.close()
