"""Messages that share one task id: which of them carry a value that distinguishes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.beat import ScheduleEntry, Scheduler
from celery.schedules import schedule

from celery_singleton_state import HeartbeatFailed, history, singleton_task
from celery_singleton_state.headers import DUE, SENT
from celery_singleton_state.history import Entry
from celery_singleton_state.message import poison
from celery_singleton_state.message.poison import deaths_allowed
from celery_singleton_state.recovery import end_for
from celery_singleton_state.runtime import Runtime, runtime_of


@pytest.fixture
def sent(memory_app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The value that distinguishes each sent message, in order; ``None`` if a message has none."""
    values: list[Any] = []

    def send(producer: Any, name: str, message: Any, headers: Any = None, **_: Any) -> None:
        values.append({**message.headers, **(headers or {})}.get(SENT))

    monkeypatch.setattr(memory_app.amqp, "send_task_message", send)
    return values


@pytest.fixture
def task(memory_app: Celery) -> Any:
    @singleton_task(memory_app, name="t", shared=False)
    def body(self: Any) -> None:
        """A body that never runs: the tests only send its messages."""

    return body


def test_messages_with_one_id_differ(task: Any, sent: list[Any]) -> None:
    for _ in range(2):
        task.apply_async(task_id="nightly-import")
    assert len({*sent, None}) == 3


def test_a_frozen_signature_that_is_sent_twice_is_two_messages(task: Any, sent: list[Any]) -> None:
    signature = task.s()
    signature.freeze()
    for _ in range(2):
        signature.apply_async()
    assert len({*sent, None}) == 3


def test_a_schedule_entry_with_a_task_id_is_a_new_message_each_time(
    memory_app: Celery, task: Any, sent: list[Any]
) -> None:
    options = {"task_id": "nightly-import"}
    entry = ScheduleEntry("e", "t", schedule=schedule(1), options=options, app=memory_app)
    beat = Scheduler(memory_app, lazy=True)
    for _ in range(2):
        beat.apply_async(entry, advance=False)
    assert len({*sent, None}) == 3


@pytest.mark.parametrize(
    "send",
    [
        lambda task: task.delay(),
        lambda task: task.apply_async(task_id="x", headers={DUE: "2026-11-27T00:00:00+00:00"}),
        lambda task: task.apply_async(task_id="x", root_id="r", parent_id="p"),
        lambda task: task.apply_async(task_id="x", retries=1),
        lambda task: (task.si() | task.si()).apply_async(),
    ],
    ids=["new id", "tick", "callback", "retry", "chain"],
)
def test_messages_whose_ids_tell_them_apart_have_no_value(
    task: Any, sent: list[Any], send: Callable[[Any], Any]
) -> None:
    send(task)
    assert sent == [None]


def test_after_an_error_the_next_send_is_the_same_message(
    memory_app: Celery, task: Any, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender cannot know whether the broker has the first message. So the second one has the
    same value, and counts as a duplicate if both arrive.
    """
    send = memory_app.amqp.send_task_message

    def send_and_fail(*args: Any, **options: Any) -> None:
        send(*args, **options)
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(memory_app.amqp, "send_task_message", send_and_fail)
        with pytest.raises(ConnectionError):
            task.apply_async(task_id="nightly-import")
    task.apply_async(task_id="nightly-import")
    task.apply_async(task_id="nightly-import")
    assert sent[0] == sent[1] != sent[2]


def test_a_task_that_runs_again_sends_the_same_messages(
    memory_app: Celery, task: Any, sent: list[Any]
) -> None:
    """A task sends a message, and its process dies. The task runs again, and sends the message
    again.

    Both messages have the same value, so the second one counts as a duplicate.
    """

    @memory_app.task(bind=True, shared=False)
    def dispatch(self: Any) -> None:
        task.apply_async(task_id="nightly-import")

    for parent in ("monday", "monday", "tuesday"):
        dispatch.apply(task_id=parent)
    assert sent == ["monday", "monday", "tuesday"]


def test_sending_an_id_again_forgets_its_earlier_result(
    memory_app: Celery, task: Any, sent: list[Any]
) -> None:
    memory_app.backend.store_result("nightly-import", 1, "SUCCESS")
    assert task.apply_async(task_id="nightly-import").state == "PENDING"


def entry(outcome: str = "succeeded", sent: str | None = None, deaths: int = 0) -> Entry:
    return Entry("t", 0, "h", 1, None, outcome, None, 1.0, 2.0, True, sent, None, deaths)


@pytest.mark.parametrize(
    ("ran", "comes", "known"),
    [
        (None, None, True),
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, True),
        (None, "a", False),
    ],
)
def test_a_message_with_another_value_is_no_duplicate(
    ran: str | None, comes: str | None, known: bool
) -> None:
    assert bool(history.done_by((entry(sent=ran),), "t", 0, comes)) == known


def test_deaths_are_counted_until_a_run_ends_by_itself() -> None:
    dead = entry("lost", deaths=3)
    assert history.deaths_of((entry(), dead), "t", None) == 3
    assert history.deaths_of((dead, entry("failed")), "t", None) == 0
    assert history.deaths_of((entry("lost", "a", 3),), "t", "b") == 0


@pytest.mark.parametrize(
    ("counts", "max_retries", "allowed"),
    [(False, 3, 3), (False, 0, 0), (False, None, None), (True, 3, 20), (True, 50, 50)],
)
def test_the_number_of_deaths_that_are_allowed(
    monkeypatch: pytest.MonkeyPatch, counts: bool, max_retries: int | None, allowed: int | None
) -> None:
    monkeypatch.setattr(poison, "CELERY_COUNTS", counts)
    assert deaths_allowed(max_retries) == allowed


def test_a_message_whose_workers_die_too_often_fails(memory_app: Celery, task: Any) -> None:
    """The package counts the deaths of whole workers, because Celery does not.

    When the message has failed, and an operator sends it again, the count begins at 0.
    """
    runtime = runtime_of(memory_app)
    for number in range(deaths_allowed(task.max_retries) or 0):
        die(runtime, f"w@host:1:aa.{number}")
    assert task.apply(task_id="x", throw=False).state == "SUCCESS"
    for number in range(21):
        die(runtime, f"w@host:1:bb.{number}")
    failed = task.apply(task_id="x", throw=False)
    assert isinstance(failed.result, HeartbeatFailed)
    assert "21 processes died while they ran task x" in str(failed.result)
    assert task.apply(task_id="y", throw=False).state == "SUCCESS"


def die(runtime: Runtime, holder: str) -> None:
    """Let a process die in a run of the message with the id ``x``."""
    key = "singleton-state:t"
    assert runtime.store.acquire(key, holder, 60, "x")
    row = runtime.store.peek(key)
    assert row is not None
    assert end_for(runtime, row, 0, history.DIED)
