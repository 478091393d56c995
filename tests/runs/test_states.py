"""The state that a body leaves: the next run gets an equal state, or the save is refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_singleton_state import SchemaDecodeFailed, singleton_task
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Row
from tests.helpers.any_values import ANYTHING, JSON, Typed, Untyped, described, states


@dataclass
class Seen:
    n: int = 0
    seen: dict[Any, Any] = field(default_factory=dict)


def task_of(app: Celery, body: Any, **options: Any) -> Any:
    options = {"state_schema": Seen, "name": "see", "shared": False} | options
    return singleton_task(app, **options)(body)


def row(app: Celery) -> Row:
    found = runtime_of(app).store.peek("singleton-state:see")
    assert found is not None
    return found


def test_a_state_that_would_come_back_changed_fails_and_leaves_the_row(app: Celery) -> None:
    def body(self: Any, key: Any) -> None:
        self.state.n += 1
        self.state.seen[key] = "yes"

    task = task_of(app, body)
    task("a")
    with pytest.raises(SchemaDecodeFailed) as caught:
        task(42)
    assert "state.seen[42]: the key 42 (int) comes back as '42' (str)" in str(caught.value)
    found = row(app)
    assert (found.value, found.holder) == ('{"n":1,"seen":{"a":"yes"}}', None)
    assert found.last_outcome == "failed"
    task("b")
    assert row(app).value == '{"n":2,"seen":{"a":"yes","b":"yes"}}'


def test_a_changed_state_with_the_same_json_is_refused(app: Celery) -> None:
    """The key 42 would be stored as "42", which the row holds already.

    The save is refused, although nothing would have to be written.
    """

    def body(self: Any, key: Any) -> None:
        self.state.seen = {key: "yes"}

    task = task_of(app, body)
    task("42")
    with pytest.raises(SchemaDecodeFailed, match=r"state\.seen\[42\]"):
        task(42)


def test_a_checkpoint_that_would_come_back_changed_is_refused(app: Celery) -> None:
    after: list[str] = []

    def body(self: Any) -> None:
        self.state.n = 5
        self.checkpoint()
        self.state.seen = {"a": {1}}
        with pytest.raises(SchemaDecodeFailed, match=r"state\.seen\['a'\]: set comes back as list"):
            self.checkpoint()
        after.append(row(app).value)
        self.state.seen = {"a": [1]}

    task_of(app, body)()
    assert after == ['{"n":5,"seen":{}}']
    assert row(app).value == '{"n":5,"seen":{"a":[1]}}'


def test_a_transaction_whose_state_would_come_back_changed_is_rolled_back(app: Celery) -> None:
    with runtime_of(app).sql.engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE written (n integer)")

    def body(self: Any) -> None:
        with pytest.raises(SchemaDecodeFailed, match=r"state\.seen\['a'\]"):
            self._write((1,))
        assert self.state == Seen(0, {})
        self._write([1])

    def _write(self: Any, value: Any) -> None:
        with self.transaction() as connection:
            connection.exec_driver_sql("INSERT INTO written VALUES (1)")
            self.state.seen = {"a": value}

    task_of(app, body, _write=_write)()
    with runtime_of(app).sql.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM written").scalar() == 1
    assert row(app).value == '{"n":0,"seen":{"a":[1]}}'


def test_without_the_round_trip_check_a_state_is_saved_as_json_has_it(app: Celery) -> None:
    def body(self: Any) -> Any:
        found = self.state.seen
        self.state.seen = {42: (1,)}
        return found

    task = task_of(app, body, state_round_trip=False)
    assert [task(), task()] == [{}, {"42": [1]}]


@pytest.mark.parametrize("schema", [Untyped, Typed])
def test_the_next_run_has_the_saved_state_or_the_save_fails(
    memory_app: Celery, schema: Any
) -> None:
    def body(self: Any, state: Any = None) -> Any:
        found = described(self.state)
        if state is not None:
            self.state = state
        return found

    task = task_of(memory_app, body, state_schema=schema)

    @settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
    @given(st.builds(Untyped, ANYTHING | JSON) if schema is Untyped else states(schema))
    def check(state: Any) -> None:
        before = task()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                task(state)
            except SchemaDecodeFailed:
                expected = before
            else:
                expected = described(state)
        assert task() == expected

    check()
