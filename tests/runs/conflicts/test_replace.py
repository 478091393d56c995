"""on_conflict="replace": the newest message wins, and a replaced message never asks again.

In the docstrings, H is the run that holds the lease, or held it. A, B and C are messages, from the
oldest to the newest. A message's *rank* is a number that is larger the newer the message is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import pytest
from celery import Celery

from celery_singleton_state import HeartbeatFailed, singleton_task
from celery_singleton_state.headers import RANK, SENT_AT
from celery_singleton_state.history import Entry, Outcome, append
from celery_singleton_state.message.place import is_before, moment
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Ended, Lease, Row, StoreUnavailable
from tests.helpers.kept_messages import Broker, Message, broker_of
from tests.helpers.waiting import wait_until

KEY = "singleton-state:replaced"
DONE = Ended("succeeded", "[]")


class State(TypedDict):
    """A state without fields."""


@pytest.fixture
def app(memory_app: Celery) -> Celery:
    """Return an app on the store in memory. tests/stores tests the statements on every store."""
    return memory_app


@pytest.fixture
def broker(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Broker:
    return broker_of(app, monkeypatch)


@pytest.fixture
def ran() -> list[str]:
    """Return a list to which each body adds its argument."""
    return []


@pytest.fixture
def make_task(app: Celery, ran: list[str]) -> Callable[..., Any]:
    def make(during: Callable[..., None] = lambda self, what: None, **options: Any) -> Any:
        def body(self: Any, what: str) -> str:
            ran.append(what)
            during(self, what)
            return what

        defaults: dict[str, Any] = {"name": "replaced", "shared": False, "on_conflict": "replace"}
        return singleton_task(app, **defaults | options)(body)

    return make


def row_of(app: Celery) -> Row:
    row = runtime_of(app).store.peek(KEY)
    assert row is not None
    return row


def hold(app: Celery, task_id: str = "task-h") -> Lease:
    acquired = runtime_of(app).store.acquire(KEY, f"holder of {task_id}", 60, task_id)
    assert acquired is not None
    return acquired.lease


def release(app: Celery, lease: Lease) -> None:
    assert runtime_of(app).store.release(lease, DONE)


def send(task: Any, broker: Broker, what: str) -> Message:
    task.delay(what)
    return broker.pop()


def wait(message: Message, broker: Broker) -> Message:
    """Deliver a message that conflicts; return the message that is sent in its place."""
    message.deliver()
    again = broker.pop()
    assert again.task_id == message.task_id
    return again


def gives_up(message: Message, **how: Any) -> bool:
    return bool(message.deliver(**how) == ("SUCCESS", None))


def test_the_newest_of_several_waiting_messages_runs(
    app: Celery,
    broker: Broker,
    make_task: Callable[..., Any],
    ran: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """H runs. A, B and C are delivered, and ask H to stop. H stops. A is delivered again first.

    A must not acquire the lease. Otherwise C would have to stop A.
    """
    caplog.set_level(logging.INFO, "celery_singleton_state")
    task, holder = make_task(), hold(app)
    a, b, c = (wait(send(task, broker, what), broker) for what in "ABC")
    assert row_of(app).handoff_to == c.task_id
    assert gives_up(b), "while H still runs"
    assert f"replaced by task {c.task_id}, which is newer" in caplog.text
    release(app, holder)
    assert gives_up(a)
    assert c.deliver() == ("SUCCESS", "C")
    assert (ran, broker.sent) == (["C"], [])


def test_a_message_asks_the_holder_to_stop_once(
    app: Celery, broker: Broker, make_task: Callable[..., Any]
) -> None:
    """A asks H to stop. A is delivered again before H has stopped. A keeps its rank."""
    task = make_task()
    hold(app)
    a = wait(send(task, broker, "A"), broker)
    before = row_of(app)
    again = wait(a, broker)
    assert row_of(app).newest == before.newest == again.headers[RANK] == a.headers[RANK]


def test_a_message_that_waits_gives_up_for_a_newer_one_that_found_the_lease_free(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A asks H to stop. H stops. B is delivered, finds the lease free, runs and ends.

    A is delivered again, and finds the lease free, too. A gives up.
    """
    task, holder = make_task(), hold(app)
    a = wait(send(task, broker, "A"), broker)
    release(app, holder)
    assert send(task, broker, "B").deliver() == ("SUCCESS", "B")
    assert gives_up(a)
    assert ran == ["B"]


def test_a_run_that_failed_by_itself_is_not_retried_over_a_newer_message(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A runs. B asks A to stop. A fails before it learns of that, and asks for a retry.

    The retry is delivered before B is delivered again. The retry gives up.
    """
    b: list[Message] = []

    def during(self: Any, what: str) -> None:
        if what == "A":
            message = send(self, broker, "B")
            message.deliver()
            b.append(broker.pop())
            raise LookupError

    task = make_task(during, autoretry_for=(LookupError,), retry_backoff=False)
    state, _ = send(task, broker, "A").deliver()
    assert state == "RETRY"
    assert gives_up(broker.pop())
    assert b[0].deliver() == ("SUCCESS", "B")
    assert ran == ["A", "B"]


def test_a_run_that_failed_by_itself_is_retried(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    def during(self: Any, what: str) -> None:
        if not self.request.retries:
            raise LookupError

    task = make_task(during, autoretry_for=(LookupError,), retry_backoff=False)
    send(task, broker, "A").deliver()
    assert broker.pop().deliver() == ("SUCCESS", "A")
    assert ran == ["A", "A"]


def test_the_replacement_of_a_run_is_as_old_as_the_run(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A runs. B asks A to stop. A calls ``self.replace()`` before it learns of that.

    A's replacement is delivered before B is delivered again. The replacement gives up.
    """
    b: list[Message] = []

    def during(self: Any, what: str) -> None:
        if what == "A":
            b.append(wait(send(self, broker, "B"), broker))
            raise self.replace(self.s("A's second page"))

    send(make_task(during), broker, "A").deliver()
    assert gives_up(broker.pop())
    assert b[0].deliver() == ("SUCCESS", "B")
    assert ran == ["A", "B"]


@pytest.mark.parametrize(
    "retry", ["autoretry_for", "self.retry()", "self.replace()", "retry_reasons"]
)
def test_a_run_that_was_asked_to_stop_is_not_retried(
    app: Celery, broker: Broker, make_task: Callable[..., Any], retry: str
) -> None:
    """A runs. B asks A to stop. A learns of it at a checkpoint, which raises an error.

    A is not retried, although its task asks for retries over every error.
    """

    def during(self: Any, what: str) -> None:
        assert runtime_of(app).store.requests.request_handoff(row_of(app), "task-b")
        try:
            self.checkpoint()
        except HeartbeatFailed as error:
            if retry == "self.retry()":
                raise self.retry(exc=error, countdown=0) from error
            if retry == "self.replace()":
                raise self.replace(self.s("A's second page")) from error
            raise

    options: dict[str, Any] = {"state_schema": State, "initial_state": {}}
    if retry == "autoretry_for":
        options["autoretry_for"] = (Exception,)
    if retry == "retry_reasons":
        options["retry_reasons"] = ("HeartbeatFailed",)
    state, error = send(make_task(during, **options), broker, "A").deliver()
    assert state == "FAILURE"
    assert isinstance(error, HeartbeatFailed)
    assert "asked to hand over to task-b" in error.detail
    assert broker.sent == []
    assert row_of(app).last_outcome == "lost"


def killed(app: Celery, lease: Lease, task_id: str) -> None:
    """Release a lease as a run's host does when the run's process has died."""
    entry = Entry(task_id, 0, lease.holder, lease.fence, None, Outcome.LOST, None, 0.0, 0.0)
    assert runtime_of(app).store.release(lease, Ended("lost", append((), entry, 16)))


@pytest.mark.parametrize("again", [{"redelivered": True}, {"retries": 1}])
def test_a_message_whose_run_died_does_not_replace_a_newer_one(
    app: Celery,
    broker: Broker,
    make_task: Callable[..., Any],
    ran: list[str],
    again: dict[str, Any],
) -> None:
    """A runs. B asks A to stop. A's process dies. The broker or Celery delivers A's message again,
    without A's rank, before B is delivered again. A gives up.
    """
    task = make_task()
    a = send(task, broker, "A")
    del a.headers[SENT_AT]
    lease = hold(app, a.task_id)
    b = wait(send(task, broker, "B"), broker)
    killed(app, lease, a.task_id)
    assert gives_up(a, **again)
    assert b.deliver() == ("SUCCESS", "B")
    assert ran == ["B"]


def test_a_message_whose_run_died_runs_again(
    app: Celery, broker: Broker, make_task: Callable[..., Any]
) -> None:
    task = make_task()
    a = send(task, broker, "A")
    killed(app, hold(app, a.task_id), a.task_id)
    assert a.deliver(redelivered=True) == ("SUCCESS", "A")


def test_a_waiting_message_that_is_redelivered_keeps_its_rank(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A asks H to stop. A's worker is killed before it has sent A's message again.

    The broker redelivers A's message twice. Before B is delivered, A keeps its rank. After B was
    delivered, A gives up.
    """
    task, holder = make_task(), hold(app)
    message = send(task, broker, "A")
    a = wait(message, broker)
    message.deliver(redelivered=True)
    assert broker.pop().headers[RANK] == a.headers[RANK]
    b = wait(send(task, broker, "B"), broker)
    assert gives_up(message, redelivered=True)
    release(app, holder)
    assert b.deliver() == ("SUCCESS", "B")
    assert ran == ["B"]


def test_a_message_whose_handoff_request_was_not_answered_keeps_its_rank(
    app: Celery,
    broker: Broker,
    make_task: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    ran: list[str],
) -> None:
    """A asks H to stop. The answer is lost, so A is sent again. B is delivered before A. A gives
    up.
    """
    task, holder = make_task(), hold(app)
    requests = runtime_of(app).store.requests
    ask = requests.request_handoff

    def lose_the_answer(*arguments: Any) -> bool:
        ask(*arguments)
        monkeypatch.setattr(requests, "request_handoff", ask)
        raise StoreUnavailable("cut")

    monkeypatch.setattr(requests, "request_handoff", lose_the_answer)
    a = wait(send(task, broker, "A"), broker)
    b = wait(send(task, broker, "B"), broker)
    assert gives_up(a)
    release(app, holder)
    assert b.deliver() == ("SUCCESS", "B")
    assert ran == ["B"]


def test_a_duplicate_replaces_no_newer_message(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """H runs. B asks H to stop. H ends. A second copy of H's message acquires the free lease, and
    ends as a duplicate. B is delivered again, and runs. H's message lacks the time of its sending.
    """
    b: list[Message] = []

    def during(self: Any, what: str) -> None:
        if what == "H":
            b.append(wait(send(self, broker, "B"), broker))

    task = make_task(during, deduplicate=True)
    h = send(task, broker, "H")
    del h.headers[SENT_AT]
    assert h.deliver() == ("SUCCESS", "H")
    h.deliver()
    assert row_of(app).last_outcome == "duplicate"
    assert b[0].deliver() == ("SUCCESS", "B")
    assert ran == ["H", "B"]


def test_messages_that_overtake_each_other_rank_by_the_time_of_sending(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A, B and C are sent, and each is delivered in another process of the worker.

    The processes ask the store in the order B, C, A. A and B give up, and C runs.
    """
    task, holder = make_task(), hold(app)
    a, b, c = (send(task, broker, what) for what in "ABC")
    b, c = wait(b, broker), wait(c, broker)
    assert gives_up(a)
    assert gives_up(b)
    release(app, holder)
    assert c.deliver() == ("SUCCESS", "C")
    assert ran == ["C"]


def test_an_overtaken_message_leaves_a_free_lease_to_the_newest(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A and B are sent. B is delivered first, and asks H to stop. H stops at once.

    A is delivered before B is delivered again, and finds the lease free. A gives up.
    """
    task, holder = make_task(), hold(app)
    a, b = (send(task, broker, what) for what in "AB")
    b = wait(b, broker)
    release(app, holder)
    assert gives_up(a)
    assert b.deliver() == ("SUCCESS", "B")
    assert ran == ["B"]


def test_a_message_with_a_countdown_is_not_ranked_by_its_time_of_sending(
    app: Celery, broker: Broker, make_task: Callable[..., Any]
) -> None:
    task = make_task()
    task.apply_async(("A",), countdown=60)
    assert SENT_AT not in broker.pop().headers


def test_times_of_two_hosts_are_not_compared() -> None:
    earlier, later = moment(), moment()
    assert is_before(earlier, later)
    assert not is_before(later, earlier)
    assert not is_before(earlier, "another host:999999999999999999999")
    assert not is_before(None, later)
    assert not is_before(earlier, None)


def test_in_the_hold_period_only_the_newest_message_waits(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """H has ended, and its hold period has begun. A and B are delivered. After an early release of
    the lease, A gives up and B runs.
    """
    task, holder = make_task(), hold(app)
    store = runtime_of(app).store
    assert store.release(holder, Ended("succeeded", "[]", 60))
    a, b = (wait(send(task, broker, what), broker) for what in "AB")
    assert store.requests.release_early(row_of(app))
    assert gives_up(a)
    assert b.deliver() == ("SUCCESS", "B")
    assert ran == ["B"]


def test_the_older_of_two_direct_calls_gives_up(
    app: Celery, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A direct call waits in its own thread. A asks H to stop. B asks H to stop. A gives up. H
    stops. B runs.
    """
    task, holder = make_task(), hold(app)
    with ThreadPoolExecutor(2) as pool:
        a = pool.submit(task, "A")
        wait_until(lambda: row_of(app).newest > 0, "A has asked")
        first = row_of(app).newest
        b = pool.submit(task, "B")
        wait_until(lambda: row_of(app).newest > first, "B has asked")
        assert a.result(30) is None
        release(app, holder)
        assert b.result(30) == "B"
    assert ran == ["B"]


def test_two_requests_made_from_one_row_get_different_ranks(
    app: Celery, make_task: Callable[..., Any], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A and B read the row of H, and both ask with the same rank. The store refuses one of them.
    That one reads the row again, and gets the next rank.
    """
    task, holder = make_task(), hold(app)
    requests, both = runtime_of(app).store.requests, threading.Barrier(2)
    ask, ranks = requests.request_handoff, []

    def together(row: Row, who: str, rank: int, sent: str | None) -> bool:
        ranks.append(rank)
        if len(ranks) <= 2:
            both.wait(30)
        return ask(row, who, rank, sent)

    monkeypatch.setattr(Row, "next_rank", property(lambda row: row.rank + 1))
    monkeypatch.setattr(requests, "request_handoff", together)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(task, what) for what in "AB"]
        wait_until(lambda: any(call.done() for call in calls), "one gives up")
        release(app, holder)
        results = [call.result(30) for call in calls]
    assert sorted(results, key=str) in (["A", None], ["B", None])
    assert len(ran) == 1
    first = ranks[0]
    assert ranks == [first, first, first + 1]


@pytest.mark.parametrize(("interval", "allowed"), [(4.0, 9.0), (10.0, 21.0)])
def test_the_wait_is_longer_than_two_heartbeats_of_the_holder(
    memory_app: Celery, make_task: Callable[..., Any], interval: float, allowed: float
) -> None:
    memory_app.conf.update(singleton_heartbeat_interval=interval)
    task = make_task(conflict_timeout=0.5)
    task.push_request(id="1", called_directly=False)
    try:
        assert task._delivery(task.request, ("A",), {}).conflict_timeout == allowed
    finally:
        task.pop_request()


def test_a_message_waits_for_the_end_of_a_hold_period(
    app: Celery, make_task: Callable[..., Any], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run is in progress that could stop. A records once that it is next. It waits for the end
    of the hold period.
    """
    task = make_task(hold_at_least=0.5)
    assert task("h") == "h"
    assert row_of(app).in_hold_period
    asked: list[Any] = []
    requests = runtime_of(app).store.requests
    ask = requests.request_handoff
    monkeypatch.setattr(requests, "request_handoff", lambda *args: asked.append(args) or ask(*args))
    assert task("a") == "a"
    assert ran == ["h", "a"]
    assert len(asked) == 1
