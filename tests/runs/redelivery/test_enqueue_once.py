"""``enqueue_once``: which messages the sending client publishes, on every store.

Before a client publishes a message, it *claims*: it asks the store to record the message as queued.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from zoneinfo import ZoneInfo

import psycopg
import pytest
from celery import Celery, chain, signals
from celery.app.task import Context
from celery.app.trace import trace_task
from celery.exceptions import Ignore, NotRegistered, Reject, TimeLimitExceeded

from celery_singleton_state import SingletonTask, StateLoadFailed, singleton_task
from celery_singleton_state.headers import DUE, ENTRY
from celery_singleton_state.message import dropped, duplicates, enqueue_once
from celery_singleton_state.message.dropped import dequeue_dropped
from celery_singleton_state.message.resend import requeue
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Queued, StoreUnavailable
from tests.helpers.stores import apps_on
from tests.helpers.waiting import wait_until


@pytest.fixture
def app(app: Celery) -> Celery:
    app.conf.broker_url = "memory://"
    return app


def task_of(app: Celery, **options: Any) -> Any:
    options = {"name": "sent", "shared": False, "enqueue_once": True} | options

    def body(self: Any, what: str = "") -> str:
        return what

    return singleton_task(app, **options)(body)


def test_a_second_copy_is_not_published(app: Celery, published: list[str]) -> None:
    task = task_of(app)
    first = task.delay()
    assert [task.delay().id, task.apply_async().id] == [first.id] * 2
    assert published == [first.id]


def test_each_singleton_has_a_queued_copy_of_its_own(app: Celery, published: list[str]) -> None:
    task = task_of(app, unique_on=["what"])
    ids = [task.delay(what).id for what in ("a", "b", "a")]
    assert ids[0] == ids[2] != ids[1]
    assert published == ids[:2]


def test_after_a_run_the_next_message_is_published(app: Celery, published: list[str]) -> None:
    task = task_of(app)
    first = task.delay()
    task.apply(task_id=first.id)
    second = task.delay()
    assert published == [first.id, second.id]


def test_a_running_message_stands_for_the_messages_of_others(
    app: Celery, published: list[str]
) -> None:
    """Another thread sends a message while the first message's body runs."""
    inner: list[str] = []

    def body(self: Any) -> None:
        with ThreadPoolExecutor() as others:
            inner.append(others.submit(self.delay).result().id)

    task = singleton_task(app, name="sent", shared=False, enqueue_once=True)(body)
    first = task.delay()
    task.apply(task_id=first.id)
    assert inner == published == [first.id]


def test_a_run_may_send_its_next_message(app: Celery, published: list[str]) -> None:
    """A run stands only for messages that others send (issue 53 of celery-singleton).

    The messages that its own body sends are published.
    """

    def body(self: Any, what: str = "") -> list[bool]:
        sent = [self.apply_async((what,), countdown=1).id for what in ("a", "b")]
        return [task_id == self.request.id for task_id in sent]

    task = singleton_task(app, name="sent", shared=False, enqueue_once=True, unique_on=["what"])(
        body
    )
    assert task.apply(("a",)).result == [False, False]
    assert len(published) == 2


def test_a_skipped_message_no_longer_counts_as_queued(app: Celery, published: list[str]) -> None:
    """Another run holds the lease. The message is delivered, and skipped. The next is published."""
    task = task_of(app)
    first = task.delay()
    store = runtime_of(app).store
    acquired = store.acquire("singleton-state:sent", "somebody", 60, None)
    assert acquired is not None
    assert task.apply(task_id=first.id).get() is None
    assert task.delay().id != first.id


@pytest.mark.parametrize(
    "options",
    [{"retries": 1}, {"headers": {"own": 1}}, {"group_id": "g"}, {"chain": []}, {"link": []}],
)
def test_retries_workflow_parts_and_messages_with_headers_are_always_sent(
    app: Celery, published: list[str], options: dict[str, Any]
) -> None:
    """The queued message cannot do the work of such a message (issue 20 of celery-singleton)."""
    task = task_of(app)
    task.delay()
    if "link" in options:
        task.apply_async(link=task.si("callback"))
    elif "chain" in options:
        chain(task.si("a"), task.si("b")).apply_async()
    else:
        task.apply_async(**options)
    assert len(published) == 2


def test_a_lost_message_blocks_others_only_until_it_expires(
    app: Celery, published: list[str]
) -> None:
    """The first message is never delivered. After its ``expires``, the next is published.

    In issue 29 of celery-singleton, a revoked task blocked all other messages for ever.
    """
    task = task_of(app)
    first = task.apply_async(expires=0.5)
    wait_until(lambda: task.delay().id != first.id, "the next one is published")
    assert len(published) == 2


def test_a_message_that_a_worker_drops_no_longer_counts_as_queued(
    app: Celery, published: list[str]
) -> None:
    """Celery sends a signal when a worker drops a revoked or expired message."""
    task = task_of(app, unique_on=["what"])
    first, other = task.delay("a"), task.delay("b")
    dequeue_dropped(task, Context(id=first.id, args=["a"], kwargs={}))
    assert task.delay("a").id != first.id
    assert task.delay("b").id == other.id
    assert len(published) == 3


def test_a_dropped_message_of_a_plain_task_is_ignored(memory_app: Celery) -> None:
    @memory_app.task(shared=False, name="plain")
    def plain() -> None:
        """A task that is not a singleton."""

    dequeue_dropped(plain, Context(id="1", args=[], kwargs={}))


def test_a_message_that_could_not_be_published_blocks_no_other(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(app)
    with monkeypatch.context() as patched:
        patched.setattr(app.amqp, "send_task_message", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            task.delay()
    task.delay()
    assert len(published) == 1


@pytest.mark.parametrize("verb", ["queued", "claim"])
def test_while_the_store_is_unavailable_all_messages_are_published(
    app: Celery,
    published: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    verb: str,
) -> None:
    """Two messages are sent. The lease still lets only one run at a time."""

    def fail(*_: Any) -> str:
        raise StoreUnavailable("gone")

    task = task_of(app)
    monkeypatch.setattr(runtime_of(app).store.requests, verb, fail)
    task.delay()
    task.delay()
    assert len(published) == 2
    assert (
        "another message may be queued, because the store could not be asked: gone" in caplog.text
    )


@pytest.mark.parametrize("error", [StoreUnavailable("the answer is lost"), TimeoutError()])
def test_a_claim_whose_message_was_not_sent_does_not_count(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """1. The claim is carried out.
    2. Its answer is lost, or a time limit interrupts the client.
    3. The broker refuses the message.
    4. The next message is published.
    """
    task = task_of(app)
    requests = runtime_of(app).store.requests
    claim = requests.claim

    def lose_answer(*arguments: Any) -> Any:
        claim(*arguments)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(requests, "claim", lose_answer)
        patch.setattr("celery.app.task.Task.apply_async", lambda *_, **__: 1 / 0)
        with pytest.raises((ZeroDivisionError, TimeoutError)):
            task.delay()
    task.delay()
    assert len(published) == 1


def test_several_clients_at_once_publish_one_message(app: Celery, published: list[str]) -> None:
    """Four clients start together, so several may read that no message is queued, and claim."""
    task = task_of(app)
    runtime_of(app).check()
    together = threading.Barrier(4)

    def ask(n: int) -> Any:
        together.wait(10)
        return enqueue_once.enqueue(task, "singleton-state:sent", {}, published.append) and n

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert len(published) == 1
    assert task.delay().id == published[0]


class RowRequests:
    """A store's ``requests``, with a function that is called after each read of the queued message.

    So a test can act between this read and the client's claim.

    :param between: is called with the number of reads so far.
    """

    def __init__(self, requests: Any, between: Callable[[int], None]) -> None:
        self._requests = requests
        self._between = between
        self.reads = 0

    def queued(self, key: str) -> Queued:
        found: Queued = self._requests.queued(key)
        self.reads += 1
        self._between(self.reads)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._requests, name)


def test_a_message_queued_between_read_and_claim_stands_for_the_new_one(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A reads that no message is queued.
    2. B reads, claims and publishes.
    3. A claims, and is refused.
    4. A reads again, and finds B's message.
    """
    task = task_of(app)
    store = runtime_of(app).store
    requests = store.requests

    def between(reads: int) -> None:
        if reads == 1:
            assert requests.claim("singleton-state:sent", "b", 60, 0)

    monkeypatch.setattr(store, "requests", RowRequests(requests, between))
    assert task.delay().id == "b"
    assert published == []


def test_a_queue_that_changes_at_every_read_blocks_no_message(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another message is dequeued between each read and the claim, so each claim is refused.

    After a few tries the client publishes its message.
    """
    task = task_of(app)
    store = runtime_of(app).store
    requests = store.requests
    changing = RowRequests(
        requests, lambda reads: requests.dequeue("singleton-state:sent", "other")
    )
    monkeypatch.setattr(store, "requests", changing)
    assert published == [task.delay().id]
    assert changing.reads == enqueue_once.ATTEMPTS


def test_a_claim_whose_answer_is_lost_is_repeated(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(app)
    requests = runtime_of(app).store.requests
    claim = requests.claim
    answers = []

    def lose_the_first(*arguments: Any) -> bool:
        answers.append(claim(*arguments))
        if len(answers) == 1:
            raise StoreUnavailable("the answer is lost")
        return answers[-1]

    monkeypatch.setattr(requests, "claim", lose_the_first)
    assert [task.delay().id for _ in range(2)] == published * 2
    assert answers == [True, True]


# -- messages that are sent during a run


@pytest.mark.parametrize(
    ("policy", "published_beside_run"),
    [("skip", 0), ("raise", 0), ("wait", 1), ("replace", 1), ("coalesce", 1)],
)
def test_messages_sent_during_a_run_bring_one_more_run_if_the_policy_does(
    app: Celery, published: list[str], policy: str, published_beside_run: int
) -> None:
    """Messages 2 and 3 are sent while message 1 runs.

    With "wait", "replace" and "coalesce", message 2 is published and stands for 3. With the other
    policies, message 1 stands for both.
    """
    task = task_of(app, on_conflict=policy)
    assert runtime_of(app).store.acquire("singleton-state:sent", "a run", 60, "1") is not None
    second, third = task.delay("2"), task.delay("3")
    assert second.id == third.id
    assert len(published) == published_beside_run
    assert (second.id == "1") is not bool(published_beside_run)


# -- how long a message counts as queued


def row_of(app: Celery) -> Any:
    return runtime_of(app).store.peek("singleton-state:sent")


def ways_to_say_when(now: datetime) -> list[tuple[dict[str, Any], float]]:
    """Return pairs: options of a message, and the seconds for which it counts as queued."""
    in_an_hour, in_a_minute = now + timedelta(hours=1), now + timedelta(minutes=1)
    return [
        ({}, 300),
        ({"countdown": 60}, 360),
        ({"countdown": 60, "expires": 100}, 100),
        ({"countdown": -60}, 300),
        ({"eta": in_an_hour}, 3900),
        ({"eta": in_an_hour.astimezone(ZoneInfo("Asia/Kolkata"))}, 3900),
        ({"eta": in_an_hour.replace(tzinfo=None)}, 3900),
        ({"eta": in_an_hour.isoformat()}, 3900),
        ({"eta": in_an_hour.strftime("%Y-%m-%dT%H:%M:%SZ")}, 3900),
        ({"eta": now - timedelta(hours=1)}, 300),
        ({"eta": in_an_hour, "countdown": 60}, 360),
        ({"expires": 30}, 30),
        ({"expires": in_a_minute}, 60),
        ({"expires": in_a_minute.replace(tzinfo=None)}, 60),
        ({"expires": in_a_minute.isoformat()}, 60),
        ({"expires": in_an_hour}, 300),
        ({"expiration": 20}, 20),
        ({"expiration": 20, "countdown": 60}, 80),
        ({"eta": datetime.max}, enqueue_once.LONGEST_LIFE),
    ]


@pytest.mark.parametrize("way", range(len(ways_to_say_when(datetime.now(UTC)))))
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_a_message_counts_as_queued_until_it_may_have_run(
    memory_app: Celery, published: list[str], way: int, zone: str
) -> None:
    """Use all the options of Celery that say when a message may run, or when it expires."""
    memory_app.conf.update(timezone=zone, enable_utc=zone == "UTC")
    task = task_of(memory_app)
    options, life = ways_to_say_when(datetime.now(UTC))[way]
    first = task.apply_async(**options)
    assert row_of(memory_app).queued_in == pytest.approx(life, abs=10)
    assert task.delay().id == first.id
    assert published == [first.id]


@pytest.mark.parametrize("how", ["attribute", "annotation", "set"])
def test_the_expires_option_of_a_task_counts_for_its_messages(memory_app: Celery, how: str) -> None:
    if how == "annotation":
        memory_app.conf.task_annotations = {"sent": {"expires": 30}}
    task = task_of(memory_app, **({"expires": 30} if how == "attribute" else {}))
    if how == "set":
        task.s().set(expires=30).delay()
    else:
        task.delay()
    assert row_of(memory_app).queued_in == pytest.approx(30, abs=5)
    runtime_of(memory_app).store.requests.dequeue(
        "singleton-state:sent", row_of(memory_app).queued_task_id
    )
    task.apply_async(expires=None)
    assert row_of(memory_app).queued_in == pytest.approx(300, abs=5)


def error_of(task: Any, options: dict[str, Any]) -> type | None:
    try:
        task.apply_async(**options)
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize(
    "options",
    [
        {"countdown": "soon"},
        {"countdown": 1e12},
        {"countdown": timedelta(seconds=1)},
        {"eta": 5},
        {"expires": timedelta(seconds=1)},
        {"expires": Decimal(1)},
        {"expires": "tomorrow"},
        {"args": 5},
        {"args": (object(),)},
        {"args": ("too", "many")},
    ],
    ids=[*"abcdefghij"],
)
def test_options_that_celery_refuses_raise_the_same_error(
    memory_app: Celery, options: dict[str, Any]
) -> None:
    """A singleton and a plain task raise the same error, and no message counts as queued."""
    task = task_of(memory_app, unique_on=["what"])

    @memory_app.task(name="plain", shared=False)
    def plain(what: str = "") -> None:
        """A task that is not a singleton."""

    assert error_of(task, options) == error_of(plain, options)
    store = runtime_of(memory_app).store
    rows = [store.peek(row.key) for row in store.list("")]
    assert [row.queued_task_id for row in rows if row] in ([], [None])


# -- task ids that the sender gives


def test_a_message_with_the_senders_task_id_is_queued_once(
    app: Celery, published: list[str]
) -> None:
    task = task_of(app)
    assert [task.apply_async(task_id="nightly").id for _ in range(3)] == ["nightly"] * 3
    assert published == ["nightly"]
    task.apply(task_id="nightly")
    task.apply_async(task_id="nightly")
    assert published == ["nightly"] * 2


def test_two_clients_with_the_same_task_id_at_once_send_one_message(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A reads that no message is queued.
    2. B reads, claims and publishes with the same task id.
    3. A claims, and must not mistake B's claim for its own.
    """
    task = task_of(app)
    store = runtime_of(app).store
    requests = store.requests

    def between(reads: int) -> None:
        if reads == 1:
            task.apply_async(task_id="nightly")

    monkeypatch.setattr(store, "requests", RowRequests(requests, between))
    assert task.apply_async(task_id="nightly").id == "nightly"
    assert published == ["nightly"]


def test_a_tick_whose_beat_died_before_it_sent_it_is_sent(
    app: Celery, published: list[str]
) -> None:
    """1. Beat A claims for its tick. 2. A dies. 3. Beat B sends this tick with the same task id."""
    task = task_of(app)
    assert runtime_of(app).store.requests.claim("singleton-state:sent", "tick", 60, 0)
    task.apply_async(task_id="tick", headers={ENTRY: "nightly", DUE: "2026-01-01T00:00:00+00:00"})
    assert published == ["tick"]


# -- messages that end without a run


def test_a_tick_that_was_done_before_no_longer_counts_as_queued(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Beat A sends a tick, and dies before it records that.
    2. The tick runs.
    3. Another message acquires the lease.
    4. Beat B sends the tick again, and the run refuses it.
    """
    monkeypatch.setattr(duplicates, "GRACE", 0.0)
    task = task_of(app, on_conflict="wait")
    tick: dict[str, Any] = {ENTRY: "nightly", DUE: "2026-01-01T00:00:00+00:00"}
    request = {"id": "tick", "retries": 0, "delivery_info": {}, "is_eager": False, **tick}
    for number in (1, 2):
        task.apply_async(task_id="tick", headers=tick)
        assert published == ["tick"] * number
        trace_task(task, "tick", (), {}, request=request, app=app)
        assert row_of(app).queued_task_id is None
        runtime_of(app).store.acquire("singleton-state:sent", "another run", 60, "2")
    assert row_of(app).run_count == 1


class Unlucky(SingletonTask[Any, Any, Any]):
    """A base class that raises in ``before_start``: the message ends before the guard sees it."""

    abstract = True
    ends_with: BaseException

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        raise self.ends_with


@pytest.fixture
def watched() -> Iterator[None]:
    """Connect the signal receivers by which a worker notices messages that it drops."""
    followed = {
        signals.task_revoked: dropped.dequeue_dropped,
        signals.task_rejected: dropped.dequeue_rejected,
        signals.task_failure: dropped.dequeue_failed,
        signals.task_internal_error: dropped.dequeue_failed,
        signals.task_postrun: dropped.dequeue_unreached,
    }
    dropped.watch_for_dropped()
    yield
    for signal, receiver in followed.items():
        signal.disconnect(receiver)


@pytest.mark.parametrize(
    ("ends_with", "stays"),
    [(ValueError(), False), (Ignore(), False), (Reject(), False), (Reject(requeue=True), True)],
    ids=repr,
)
@pytest.mark.usefixtures("watched")
def test_a_message_that_ends_before_the_guard_no_longer_counts_as_queued(
    app: Celery, ends_with: BaseException, stays: bool
) -> None:
    task = task_of(app, base=type("Base", (Unlucky,), {"ends_with": ends_with, "abstract": True}))
    first = task.delay()
    task.apply(task_id=first.id)
    assert (task.delay().id == first.id) is stays


@pytest.mark.usefixtures("watched")
def test_a_message_whose_process_dies_before_the_guard_no_longer_counts_as_queued(
    app: Celery,
) -> None:
    """The worker's parent process sends ``task_failure``, for example after a hard time limit."""
    task = task_of(app)
    first = task.delay()
    signals.task_failure.send(
        sender=task, task_id=first.id, exception=TimeLimitExceeded(), args=(), kwargs={}
    )
    assert task.delay().id != first.id


@pytest.mark.parametrize("unique_on", [None, ["what"]])
@pytest.mark.usefixtures("watched")
def test_a_message_that_a_worker_cannot_read_no_longer_counts_as_queued(
    app: Celery, unique_on: Any
) -> None:
    task = task_of(app, unique_on=unique_on)
    first = task.delay("a")
    headers = {"task": "sent", "id": first.id}
    message = SimpleNamespace(headers=headers, payload=[["a"], {}, {}])
    consumer = Mock(app=app)
    signals.task_rejected.send(sender=consumer, message=message, exc=None)
    assert task.delay("a").id != first.id


@pytest.mark.usefixtures("watched")
def test_a_run_costs_no_further_request(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a successful nor a failed run asks the store to dequeue its message."""
    task = task_of(app)
    monkeypatch.setattr(runtime_of(app).store.requests, "dequeue", lambda *_: 1 / 0)
    assert task.apply(("a",), task_id="1").get() == "a"
    failing = task_of(app, name="failing")
    failing.run = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        failing.apply(task_id="2").get()


@pytest.mark.usefixtures("watched")
def test_a_message_that_failed_over_the_store_no_longer_counts_as_queued(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is unavailable when the run would acquire the lease, and the message is not
    retried.
    """
    task = task_of(app, retry_reasons=[])
    first = task.delay()

    def fail(*_: Any) -> None:
        raise StoreUnavailable("gone")

    with monkeypatch.context() as patched:
        patched.setattr(runtime_of(app).store, "acquire", fail)
        with pytest.raises(StateLoadFailed):
            task.apply(task_id=first.id).get()
    assert task.delay().id != first.id


def test_a_message_whose_stored_result_is_a_failure_blocks_no_other(
    app: Celery, published: list[str]
) -> None:
    """The message counts as queued, but its stored result is a failure. The next is published.

    For example, a worker that does not know the task stores such a failure.
    """
    task = task_of(app)
    first = task.delay()
    app.backend.mark_as_failure(first.id, NotRegistered("sent"))
    second = task.delay()
    assert second.id != first.id
    assert task.delay().id == second.id
    assert published == [first.id, second.id]


def test_a_task_id_that_was_used_before_counts_as_queued_again(
    app: Celery, published: list[str]
) -> None:
    """The result backend still has yesterday's result of this task id.

    This result does not mean that today's message has ended.
    """
    task = task_of(app)
    app.backend.store_result("nightly", None, "SUCCESS")
    assert {task.apply_async(task_id="nightly").id for _ in range(2)} == {"nightly"}
    assert published == ["nightly"]


# -- retries


def test_a_retry_that_waits_counts_as_queued(app: Celery, published: list[str]) -> None:
    """1. A run sends its own retry. 2. The retry blocks others' messages. 3. The retry runs."""

    def body(self: Any, what: str = "") -> None:
        if not self.request.retries:
            raise self.retry(countdown=60)

    task = singleton_task(app, name="sent", shared=False, enqueue_once=True)(body)
    first = task.delay()
    message = {"id": first.id, "retries": 0, "delivery_info": {}, "is_eager": False}
    trace_task(task, first.id, (), {}, request=message, app=app)
    assert published == [first.id] * 2
    assert row_of(app).queued_in == pytest.approx(360, abs=10)
    assert task.delay().id == first.id
    assert len(published) == 2
    trace_task(task, first.id, (), {}, request=message | {"retries": 1}, app=app)
    assert row_of(app).queued_task_id is None


def test_a_retry_that_cannot_be_sent_does_not_count_as_queued(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(app)
    with monkeypatch.context() as patched:
        patched.setattr(app.amqp, "send_task_message", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            task.apply_async(task_id="1", retries=1, countdown=60)
    assert row_of(app).queued_task_id is None


def test_a_retry_is_sent_although_another_message_is_queued(
    app: Celery, published: list[str]
) -> None:
    task = task_of(app)
    first = task.delay()
    task.apply_async(task_id="2", retries=1)
    assert published == [first.id, "2"]
    assert row_of(app).queued_task_id == first.id


def test_a_requeued_message_does_not_count_as_queued(app: Celery) -> None:
    """A message is requeued because its own run is in progress.

    It counts as running. If it counted as queued, ``enqueue_once`` could drop a new message about a
    change that the run no longer sees.
    """
    task = task_of(app, on_conflict="wait")
    assert runtime_of(app).store.acquire("singleton-state:sent", "a run", 60, "1") is not None
    for retries in (0, 1):
        request = Context(id="1", args=[], kwargs={}, retries=retries, called_directly=False)
        with pytest.raises(Ignore):
            requeue(task, request, "sent")
        assert row_of(app).queued_task_id is None


# -- connections


def test_a_connection_that_was_closed_meanwhile_sends_no_second_copy(
    server_url: str, published: list[str]
) -> None:
    """The server closes the client's idle connection after the first message was sent.

    For the second message the client connects again. It finds the first message queued, and
    publishes nothing.
    """
    for make in apps_on(server_url):
        app = make(broker_url="memory://")
        task = task_of(app)
        first = task.delay()
        with psycopg.connect(server_url.replace("+psycopg", ""), autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            assert task.delay().id == first.id
    assert published == [first.id]
