"""Conflicts of direct and eager calls: they have no message, so the caller's thread waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state import HeartbeatFailed, LeaderHandoffFailed, singleton_task
from celery_singleton_state.message.delivery import Delivery
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import StoreUnavailable


def task_of(app: Celery, body: Any, **options: Any) -> Any:
    return singleton_task(app, **{"name": "called", "shared": False} | options)(body)


def idle(self: Any, what: Any = None) -> None:
    """A body that does nothing."""


def returned(self: Any, what: Any) -> Any:
    """A body that returns its argument."""
    return what


@pytest.fixture(params=["called directly", "eager"])
def call(request: pytest.FixtureRequest) -> Any:
    if request.param == "eager":
        return lambda task, *arguments: task.apply(arguments).get()
    return lambda task, *arguments: task(*arguments)


def test_a_call_that_waits_runs_when_the_lease_is_free(app: Celery, call: Any) -> None:
    """A's body runs. B is called, and finds the lease taken. A ends. B runs."""
    inside, go = threading.Event(), threading.Event()
    met: list[str] = []

    def body(self: Any, what: str) -> str:
        met.append(what)
        if what == "first":
            inside.set()
            go.wait(30)
        return what

    task = task_of(app, body, on_conflict="wait")
    acquire = runtime_of(app).store.acquire

    def acquire_and_go(*arguments: Any) -> Any:
        acquired = acquire(*arguments)
        if acquired is None:
            go.set()
        return acquired

    runtime_of(app).store.acquire = acquire_and_go  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, task, "first")
        assert inside.wait(30)
        assert pool.submit(call, task, "second").result(30) == "second"
        assert first.result(30) == "first"
    assert met == ["first", "second"]


@pytest.mark.parametrize("policy", ["wait", "replace"])
def test_a_call_waits_for_the_conflict_timeout_at_most(
    app: Celery, call: Any, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Delivery, "conflict_timeout", 0.3)
    store = runtime_of(app).store
    assert store.acquire("singleton-state:called", "somebody", 60, "task-1") is not None
    task = task_of(app, idle, on_conflict=policy)
    with pytest.raises(LeaderHandoffFailed, match=r"not obtained within 0\.3 s; held by somebody"):
        call(task)


def test_a_checkpoint_of_a_run_that_is_asked_to_stop_saves_and_ends_it(app: Celery) -> None:
    """Another task asks for the lease. The checkpoint is saved, and then raises HeartbeatFailed.

    The saved state stays in the row.
    """
    store = runtime_of(app).store
    after: list[str] = []

    def body(self: Any) -> None:
        row = store.peek("singleton-state:called")
        assert row is not None
        assert store.requests.request_handoff(row, "task-2")
        self.state["n"] += 1
        self.checkpoint()
        after.append("went on")

    task = task_of(app, body, state_schema=dict_schema(), initial_state={"n": 0})
    with pytest.raises(HeartbeatFailed, match="asked to hand over to task-2"):
        task()
    row = store.peek("singleton-state:called")
    assert row is not None
    assert (row.value, row.last_outcome, row.holder, after) == ('{"n":1}', "lost", None, [])


def dict_schema() -> Any:
    from typing import TypedDict

    return TypedDict("State", {"n": int})


def test_a_coalesced_call_waits_for_the_end_of_the_hold_period(app: Celery, call: Any) -> None:
    """A call cannot be sent again as a message, so it waits and leaves no pending run."""
    task = task_of(app, returned, on_conflict="coalesce", hold_at_least=0.3)
    assert call(task, "first") == "first"
    assert call(task, "second") == "second"


def test_a_pending_run_is_sent_although_the_answer_to_a_release_is_lost(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A's body runs.
    2. A second call finds the lease taken, and leaves a pending run in the row.
    3. A's release is carried out, but its answer is lost.
    4. A repeats the release, and the store refuses it.
    5. A finds its own end in the row's history, and sends the pending run.
    """
    store = runtime_of(app).store
    sent: list[Any] = []

    def body(self: Any, what: str) -> None:
        if what == "first":
            task("pending_run")

    task = task_of(app, body, on_conflict="coalesce")
    release, lost = store.release, []

    def lose_the_answer(*arguments: Any) -> Any:
        released = release(*arguments)
        if not lost:
            lost.append(released)
            raise StoreUnavailable("cut")
        return released

    monkeypatch.setattr(store, "release", lose_the_answer)
    monkeypatch.setattr(app, "send_task", lambda name, args, *_, **__: sent.append(args))
    task("first")
    assert sent == [("pending_run",)]
    assert store.requests.wanted("singleton-state:called") is None


def test_arguments_that_cannot_be_kept_for_a_pending_run_are_refused(app: Celery) -> None:
    store = runtime_of(app).store
    assert store.acquire("singleton-state:called", "somebody", 60, "task-1") is not None
    task = task_of(app, idle, on_conflict="coalesce")
    with pytest.raises(TypeError, match="task called: on_conflict='coalesce' stores the arguments"):
        task(object())
