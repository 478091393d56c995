"""``check_health``: whether each singleton finished in time, by its row in the store."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state import SingletonTask, check_health, singleton_task
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import StoreUnavailable


def nothing(self: SingletonTask) -> None:
    pass


def with_x(self: SingletonTask, x: str) -> None:
    pass


def health(app: Celery) -> dict[str, tuple[bool, str]]:
    found = check_health(app)
    assert found.error is None
    assert found.healthy == all(each.healthy for each in found.singletons)
    return {each.singleton: (each.healthy, each.reason) for each in found.singletons}


def make_older(app: Celery, column: str, seconds: float) -> None:
    """Move a column's time back by some seconds in all rows."""
    store: Any = runtime_of(app).store
    with store.engine.connect() as connection:
        connection.exec_driver_sql(
            f"UPDATE kv_store SET {column} ="
            f" strftime('%Y-%m-%d %H:%M:%f+00:00', {column}, '-{seconds} seconds')"
        )


def test_a_singleton_is_healthy_if_it_finished_in_time(
    memory_app: Celery,
) -> None:
    """The time limit is the task's ``expected_interval`` times the threshold (2 by default)."""
    task = singleton_task(
        memory_app, shared=False, name="t", expected_interval=timedelta(seconds=100)
    )(nothing)
    task()
    assert health(memory_app)["t"] == (True, "it finished 0 s ago")
    make_older(memory_app, "last_finished_at", 190)
    assert health(memory_app)["t"] == (True, "it finished 190 s ago")
    make_older(memory_app, "last_finished_at", 20)
    assert health(memory_app)["t"] == (
        False,
        "it finished 210 s ago, and should have within 200 s",
    )


def test_each_key_has_its_own_health(memory_app: Celery) -> None:
    task = singleton_task(
        memory_app, shared=False, name="t", unique_on=["x"], expected_interval=10
    )(with_x)
    task("a")
    make_older(memory_app, "last_finished_at", 60)
    task("b")
    found = health(memory_app)
    assert {name: healthy for name, (healthy, _) in found.items()} == {
        't{"x":"a"}': False,
        't{"x":"b"}': True,
    }


def test_a_singleton_without_an_expected_interval_is_always_healthy(memory_app: Celery) -> None:
    singleton_task(memory_app, shared=False, name="t")(nothing)()
    make_older(memory_app, "last_finished_at", 10**6)
    assert health(memory_app)["t"][0]


def test_a_singleton_that_never_ran_has_a_grace_time(memory_app: Celery) -> None:
    """The grace time begins when the first worker starts, because the worker writes the singleton's
    row.
    """
    singleton_task(memory_app, shared=False, name="quick", expected_interval=1)(nothing)
    singleton_task(memory_app, shared=False, name="daily", expected_interval=86400)(nothing)
    assert health(memory_app)["quick"][0], "in this process's first minute"
    keys = {f"singleton-state:{name}": name for name in ("quick", "daily")}
    runtime_of(memory_app).store.requests.expect(keys)
    make_older(memory_app, "updated_at", 50)
    assert health(memory_app)["quick"][0]
    make_older(memory_app, "updated_at", 20)
    found = health(memory_app)
    assert found["quick"] == (
        False,
        "it never ran, and has been expected for 70 s, longer than 60 s",
    )
    assert found["daily"][0]
    runtime_of(memory_app).store.requests.expect(keys)
    assert health(memory_app)["quick"] == found["quick"], "a second start is not the first"


def test_an_unavailable_store_is_unhealthy(
    memory_app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise StoreUnavailable("it is fail")

    monkeypatch.setattr(runtime_of(memory_app).store, "list", fail)
    found = check_health(memory_app)
    assert (found.healthy, found.error) == (False, "it is fail")


def test_the_task_of_a_singleton_is_read_from_its_row(memory_app: Celery) -> None:
    """A name is ambiguous: ``shop.t5`` can be the task ``shop.t5``, or the task ``shop.t`` with a
    callable that chose the number 5.
    """
    for name in ("shop.t", "shop.t5"):
        singleton_task(
            memory_app, shared=False, name=name, unique_on=lambda: 5, expected_interval=60
        )(nothing)()
    found = {each.singleton: each.task for each in check_health(memory_app).singletons}
    assert found == {"shop.t5": "shop.t", "shop.t55": "shop.t5"}
