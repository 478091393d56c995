"""on_conflict="replace": the newest message wins, and nothing that was replaced asks again.

H holds the lease, or held it; A, B and C are messages, from the oldest to the newest.
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
    """Statements are tested in every store elsewhere."""
    return memory_app


@pytest.fixture
def broker(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Broker:
    return broker_of(app, monkeypatch)


@pytest.fixture
def ran() -> list[str]:
    """What bodies ran."""
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
    """Deliver a message that conflicts; returns the message that is sent in its place."""
    message.deliver()
    again = broker.pop()
    assert again.task_id == message.task_id
    return again


def gives_up(message: Message, **how: Any) -> bool:
    return bool(message.deliver(**how) == ("SUCCESS", None))


def test_the_newest_of_several_that_wait_is_served(
    app: Celery,
    broker: Broker,
    make_task: Callable[..., Any],
    ran: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """H runs. A, B and C come and ask H to stop. H stops, and A comes again first: it must not take
    the lease, or the newest would have to stop it, and would be stopped by B.
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


def test_a_message_asks_once(app: Celery, broker: Broker, make_task: Callable[..., Any]) -> None:
    """A asks H, and comes again before H has stopped; so A is still the one that H hears of."""
    task = make_task()
    hold(app)
    a = wait(send(task, broker, "A"), broker)
    before = row_of(app)
    again = wait(a, broker)
    assert row_of(app).newest == before.newest == again.headers[RANK] == a.headers[RANK]


def test_a_message_that_waits_gives_up_for_a_newer_one_that_found_the_lease_free(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A asks H to stop. H stops. B comes, finds the lease free, runs and ends. Then A comes again,
    and finds the lease free, too.
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
    """A runs. B comes and asks A to stop. A fails before it hears of that, and is retried. Its
    retry comes before B does again.
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


def test_a_run_that_replaces_itself_is_no_newer_for_it(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A runs. B comes and asks A to stop. A replaces itself before it hears of that, and its
    replacement comes before B does again.
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
    """B asks A to stop; A hears of it at a checkpoint, and its retries are to catch any error."""

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
    """The run's process dies, and its host frees the lease."""
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
    """A runs, B asks A to stop, A's process dies. The broker, or Celery, sends A's message again,
    and it comes before B does again, without the rank that A had.
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


def test_a_message_that_asked_and_was_lost_with_its_worker_keeps_its_place(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A asks H to stop, and its worker is killed before it has sent A's message again. The broker
    gives it out again, before and after B came.
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


def test_a_message_whose_request_was_not_answered_keeps_its_place(
    app: Celery,
    broker: Broker,
    make_task: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    ran: list[str],
) -> None:
    """A asks H to stop, and the answer is lost, so A is retried. B comes meanwhile."""
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


def test_a_message_that_was_done_before_replaces_none(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """H runs. B asks H to stop, and H ends. A second copy of H's message finds the lease free,
    takes it, finds itself done and ends. B comes again. When H was sent is not known.
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


def test_messages_that_overtake_each_other_are_as_new_as_they_were_sent(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A, B and C are sent. The worker gives each to another process, and these ask the store in the
    order B, C, A.
    """
    task, holder = make_task(), hold(app)
    a, b, c = (send(task, broker, what) for what in "ABC")
    b, c = wait(b, broker), wait(c, broker)
    assert gives_up(a)
    assert gives_up(b)
    release(app, holder)
    assert c.deliver() == ("SUCCESS", "C")
    assert ran == ["C"]


def test_a_message_that_was_overtaken_does_not_take_the_lease_before_the_newest_comes_again(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """A and B are sent. B comes first, and asks H to stop. H stops at once. A comes before B does
    again, and finds the lease free.
    """
    task, holder = make_task(), hold(app)
    a, b = (send(task, broker, what) for what in "AB")
    b = wait(b, broker)
    release(app, holder)
    assert gives_up(a)
    assert b.deliver() == ("SUCCESS", "B")
    assert ran == ["B"]


def test_a_message_that_is_to_come_later_is_as_new_as_it_comes(
    app: Celery, broker: Broker, make_task: Callable[..., Any]
) -> None:
    task = make_task()
    task.apply_async(("A",), countdown=60)
    assert SENT_AT not in broker.pop().headers


def test_moments_of_two_hosts_are_not_compared() -> None:
    earlier, later = moment(), moment()
    assert is_before(earlier, later)
    assert not is_before(later, earlier)
    assert not is_before(earlier, "another host:999999999999999999999")
    assert not is_before(None, later)
    assert not is_before(earlier, None)


def test_while_a_lease_is_kept_after_its_run_the_newest_waits(
    app: Celery, broker: Broker, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """H has ended, and its lease is kept for a while. A and B come."""
    task, holder = make_task(), hold(app)
    store = runtime_of(app).store
    assert store.release(holder, Ended("succeeded", "[]", 60))
    a, b = (wait(send(task, broker, what), broker) for what in "AB")
    assert store.requests.release_early(row_of(app))
    assert gives_up(a)
    assert b.deliver() == ("SUCCESS", "B")
    assert ran == ["B"]


def test_the_older_of_two_calls_gives_up(
    app: Celery, make_task: Callable[..., Any], ran: list[str]
) -> None:
    """Direct calls wait where they are. A asks H to stop, B does; H stops."""
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


def test_two_that_saw_the_same_row_are_ranked_one_after_the_other(
    app: Celery, make_task: Callable[..., Any], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A and B find H, and both take the next rank. One is refused it, looks again, and is newer."""
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
def test_the_wait_is_longer_than_a_holders_heartbeats(
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
    """There is no run that could stop: A notes once that it is to be next, and looks again then."""
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
