"""Messages that wait for a lease: when each tries again, and which one is next in line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, signals
from celery.app.trace import trace_task

from celery_singleton_state import LeaderHandoffFailed, singleton_task
from celery_singleton_state.headers import NEXT_SINCE, WAITED
from celery_singleton_state.lease import pace
from celery_singleton_state.lease.pace import COST_OF_MESSAGE, SHARE
from celery_singleton_state.run.waiting import LONGEST_GRACE, NEXT_PAUSE
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Ended, Lease
from tests.helpers.waiting import wait_until

KEY = "singleton-state:waits"
DONE = Ended("succeeded", "[]")


class Messages:
    """Delivers messages of one task, and keeps the headers of messages that are sent again.

    The message that is *next in line* is the one whose id the row records as queued.
    """

    def __init__(self, app: Celery, **options: Any) -> None:
        app.conf.broker_url = "memory://"
        self.app = app
        self.store = runtime_of(app).store
        #: Maps each task id to the headers with which its message was last sent again.
        self.waiting: dict[str, dict[str, Any]] = {}
        self.served: list[str] = []

        def body(self_: Any) -> None:
            self.served.append(self_.request.id)

        options = {"on_conflict": "wait", "conflict_timeout": 600} | options
        self.task: Any = singleton_task(app, name="waits", shared=False, **options)(body)

    def note(self, headers: dict[str, Any], **_: Any) -> None:
        self.waiting[headers["id"]] = headers

    def deliver(self, task_id: str, waited: float | None = None, **own: Any) -> Any:
        """Deliver a message with the headers with which it was last sent.

        :param waited: seconds that the message has waited; by default, as its headers say.
        :param own: more fields of the request.
        :returns: the result or the error of the task.
        """
        request = {"id": task_id, "retries": 0, "delivery_info": {}, "is_eager": False, **own}
        headers = self.waiting.pop(task_id, {})
        request |= {name: headers[name] for name in (WAITED, NEXT_SINCE) if name in headers}
        if waited is not None:
            request[WAITED] = waited
        found = trace_task(self.task, task_id, (), {}, request=request, app=self.app)
        return found[1].retval if found[1] else None

    def pause_of(self, task_id: str, before: float = 0.0) -> float:
        return float(self.waiting[task_id][WAITED]) - before

    @property
    def next_one(self) -> str | None:
        row = self.store.peek(KEY)
        return row and row.queued_task_id

    def hold(self) -> Lease:
        acquired = self.store.acquire(KEY, "a run", 60, "running")
        assert acquired is not None
        return acquired.lease


@pytest.fixture
def messages(app: Celery) -> Iterator[Messages]:
    found = Messages(app)
    signals.before_task_publish.connect(found.note)
    yield found
    signals.before_task_publish.disconnect(found.note)


def test_the_first_message_that_waits_is_next_in_line(
    messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message next in line tries soon, and then about once a second. The more other messages
    wait, the less often each of them tries.

    The clock stands still and each try costs nothing. Otherwise, on a busy machine, the first
    message would be due again before the last is delivered, and no longer count as waiting.
    """
    own = runtime_of(messages.app).pace
    of_any_cost = own.pause
    monkeypatch.setattr(own, "pause", lambda key, at_least, _cost: of_any_cost(key, at_least, 0.0))
    monkeypatch.setattr(pace, "clock", lambda: 1000.0)
    messages.hold()
    for number in range(50):
        messages.deliver(f"m{number}")
    assert messages.next_one == "m0"
    assert messages.pause_of("m0") == pytest.approx(0.1)
    for waited in (0.5, 5, 500):
        messages.deliver("m0", waited)
        assert messages.pause_of("m0", waited) <= NEXT_PAUSE
    pauses = [messages.pause_of(f"m{number}") for number in range(10, 50)]
    assert pauses[-1] > 2 * pauses[0]
    assert pauses[-1] > 40 * COST_OF_MESSAGE / SHARE


def test_a_free_lease_is_left_to_the_message_next_in_line(messages: Messages) -> None:
    """A, B and C wait, and A is next in line. The lease is released. B is delivered again before A,
    and leaves the free lease to A.
    """
    lease = messages.hold()
    for task_id in ("A", "B", "C"):
        messages.deliver(task_id)
    messages.store.release(lease, DONE)
    messages.deliver("B")
    assert messages.served == []
    messages.deliver("A")
    assert messages.served == ["A"]
    lease = messages.hold()
    messages.deliver("C")
    assert messages.next_one == "C", "the first message that finds the lease taken again"
    messages.deliver("B")
    messages.store.release(lease, DONE)
    for task_id in ("B", "C", "B"):
        messages.deliver(task_id)
    assert messages.served == ["A", "C", "B"]


def test_the_last_try_of_a_message_takes_a_free_lease(messages: Messages) -> None:
    lease = messages.hold()
    for task_id in ("A", "B"):
        messages.deliver(task_id)
    messages.store.release(lease, DONE)
    messages.deliver("B", waited=600)
    assert messages.served == ["B"]


def test_a_lost_message_loses_its_place_as_next_in_line(messages: Messages) -> None:
    """A is next in line, and lost with its worker. The row's record of A expires.

    Then B acquires the lease.
    """
    lease = messages.hold()
    for task_id in ("A", "B"):
        messages.deliver(task_id)
    row = messages.store.peek(KEY)
    assert row is not None
    assert messages.store.requests.claim(KEY, "A", 0.2, row.queue)
    messages.store.release(lease, DONE)
    wait_until(lambda: messages.next_one is None, "A's claim expires")
    messages.deliver("B")
    assert messages.served == ["B"]


def test_a_message_that_waited_too_long_fails_and_loses_its_place(
    messages: Messages,
) -> None:
    messages.hold()
    messages.deliver("A")
    assert isinstance(messages.deliver("A", waited=600), LeaderHandoffFailed)
    assert messages.next_one is None
    messages.deliver("B", waited=599.5)
    assert messages.pause_of("B", 599.5) <= 0.5, "its last try comes when its time is over"


def test_a_queued_message_of_enqueue_once_blocks_no_waiting_message(app: Celery) -> None:
    """The queued message may be lost, so B, which waits, acquires the free lease."""
    found = Messages(app, enqueue_once=True)
    lease = found.hold()
    found.task.delay()
    signals.before_task_publish.connect(found.note)
    try:
        found.deliver("B")
        found.store.release(lease, DONE)
        found.deliver("B")
    finally:
        signals.before_task_publish.disconnect(found.note)
    assert found.served == ["B"]


def test_a_message_of_enqueue_once_that_waits_stays_queued(app: Celery) -> None:
    found = Messages(app, enqueue_once=True)
    found.hold()
    sent = found.task.delay()
    signals.before_task_publish.connect(found.note)
    try:
        found.deliver(sent.id)
    finally:
        signals.before_task_publish.disconnect(found.note)
    assert found.task.delay().id == sent.id
    row = found.store.peek(KEY)
    assert row is not None
    assert (row.queued_in or 0) > 10 * LONGEST_GRACE


def test_another_try_of_a_waiting_message_only_reads_the_row(
    messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages.hold()
    for task_id in ("A", "B"):
        messages.deliver(task_id)
    asked: list[str] = []
    for verb in ("acquire", "peek"):
        real = getattr(messages.store, verb)

        def noted(*arguments: Any, verb: str = verb, real: Any = real) -> Any:
            asked.append(verb)
            return real(*arguments)

        monkeypatch.setattr(messages.store, verb, noted)
    messages.deliver("B")
    assert asked == ["peek"]


@pytest.mark.parametrize(
    ("of_task", "of_message", "expected"),
    [(True, None, True), (False, None, False), (False, True, True), (True, False, False)],
)
def test_a_message_that_waits_keeps_whether_its_result_is_ignored(
    memory_app: Celery, of_task: bool, of_message: bool | None, expected: bool
) -> None:
    """If a message of another client lacks ``ignore_result``, the task's option counts."""
    found = Messages(memory_app, ignore_result=of_task)
    found.hold()
    own = {} if of_message is None else {"ignore_result": of_message}
    signals.before_task_publish.connect(found.note)
    try:
        found.deliver("A", **own)
    finally:
        signals.before_task_publish.disconnect(found.note)
    assert found.waiting["A"]["ignore_result"] is expected
