"""Singletons with task base classes of other libraries, in real workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery, chain

from celery_singleton_state.history import decode
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.fleet import Fleet, outcome

APP = "tests.apps.flask_app"

pytestmark = pytest.mark.fleet(app=APP)


def test_flasks_task_class_and_a_task_that_replaces_itself(
    fleet: Fleet, client: Callable[[], Celery], store: SqlStore, tmp_path: Path
) -> None:
    """Flask's documentation has a task class whose ``__call__`` wraps each body. Three tasks
    combine it with ``SingletonTask``. Each is guarded: while it runs, its other deliveries are
    skipped.

    A fourth task replaces itself by its next page three times. Each page sees the state that the
    page before has saved.
    """
    app, go = client(), tmp_path / "go"
    fleet.start("-c", "4")
    fleet.start("-P", "solo")
    names = ("flask_before", "flask_behind", "of_the_app")
    held = {name: app.send_task(name, (str(go),)) for name in names}
    fleet.wait_for_notes("enter", len(names))
    others = [app.send_task(name, (str(go),)) for name in names * 2]
    assert [outcome(other) for other in others] == [None] * len(others)
    entered = fleet.notes("enter")
    assert sorted(note["task"] for note in entered) == sorted(names)
    assert [note["contexts"] for note in entered] == [1] * len(names)
    go.touch()
    assert [outcome(held[name]) for name in names] == [1] * len(names)
    for name in names:
        row = store.peek(f"singleton-state:{name}")
        assert row is not None
        assert (row.value, row.run_count, row.last_outcome) == ('{"n":1}', 1, "succeeded")

    pages = chain(app.signature("paged", (1,)), app.signature("plain_add", (10,)), app=app)
    assert outcome(pages.apply_async()) == 14
    seen = [note for note in fleet.notes("enter") if note["task"] == "paged"]
    assert [(note["page"], note["n"]) for note in seen] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert {note["contexts"] for note in seen} == {1}
    row = store.peek("singleton-state:paged")
    assert row is not None
    assert [entry.outcome for entry in decode(row.history, "")] == ["succeeded"] * 4
