"""``enqueue_once`` with real workers: which messages keep the next message from being published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state import singleton_task
from celery_singleton_state.runtime import close_runtime, runtime_of
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until

APP = "tests.apps.sent_once_app"

pytestmark = pytest.mark.fleet(app=APP)


@pytest.fixture
def make_task(fleet: Fleet, client: Callable[[], Celery]) -> Iterator[Callable[..., Any]]:
    """A function that makes a task in the sending app. There ``enqueue_once`` decides whether to
    publish a message.
    """
    made: list[Celery] = []

    def make(name: str, **options: Any) -> Any:
        made.append(client())

        def body(self: Any, what: Any = "", until: str = "") -> None:
            """Do nothing: only the name and the options of this task are used. The workers run
            another body.
            """

        return singleton_task(made[-1], name=name, shared=False, enqueue_once=True, **options)(body)

    yield make
    for app in made:
        close_runtime(app)


def sent_after(task: Any, last: Any, *args: Any, **options: Any) -> Any:
    """Send the task until the result is not ``last``, because a new message was published; return
    the new result.
    """

    def sent() -> Any:
        result = task.apply_async(args, **options)
        return result if result.id != last.id else None

    return wait_until(sent, f"a message after {last.id} is sent")


def is_queued(task: Any) -> bool:
    row = runtime_of(task.app).store.peek(f"singleton-state:{task.name}")
    return row is not None and row.queued_task_id is not None


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_a_message_that_fails_before_its_delivery_does_not_block_the_next(
    fleet: Fleet, make_task: Callable[..., Any], how: str
) -> None:
    """``before_start`` raises, or the hard time limit kills the process in ``before_start``. The
    next message is published.
    """
    fleet.start("-c", "1")
    task = make_task("ends_early")
    first = task.delay(how)
    wait_until(lambda: not is_queued(task), "no message is recorded as queued")
    assert outcome(sent_after(task, first, "runs")) == "runs"


def test_a_message_that_a_worker_cannot_read_does_not_block_the_next(
    fleet: Fleet, make_task: Callable[..., Any]
) -> None:
    """The sender uses a serializer that workers do not accept. Its next message is published."""
    fleet.start("-c", "1")
    task = make_task("ends_early")
    first = task.apply_async(("runs",), serializer="pickle")
    assert outcome(sent_after(task, first, "runs")) == "runs"


def test_a_message_for_an_unknown_task_does_not_block_the_next(
    fleet: Fleet, make_task: Callable[..., Any]
) -> None:
    """During a deployment no worker knows the task yet, so the first message fails. The sender's
    next message is published: the sender does not get the failed result instead.
    """
    fleet.start("-c", "1")
    task = make_task("known_tomorrow")
    first = task.delay("a")
    outcome(first)
    assert sent_after(task, first, "b").id != first.id


def test_a_change_during_a_run_is_not_lost(
    fleet: Fleet, make_task: Callable[..., Any], tmp_path: Path
) -> None:
    """Versions 2 and 3 are sent while version 1 runs. Version 2 is published, because the running
    message has not seen the change. Version 2 is then queued, so the sender of version 3 gets its
    result.
    """
    go = tmp_path / "go"
    fleet.start("-c", "2")
    task = make_task("versioned", on_conflict="wait")
    first = task.delay(1, str(go))
    fleet.wait_for_notes("version")
    second, third = task.delay(2), task.delay(3)
    assert first.id != second.id == third.id
    go.touch()
    assert [outcome(each) for each in (first, second)] == [1, 2]
    assert outcome(task.delay(4)) == 4
