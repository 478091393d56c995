"""``enqueue_once``: what is published, seen from the client that sends, on every store."""

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


def test_when_it_has_run_the_next_one_is_published(app: Celery, published: list[str]) -> None:
    task = task_of(app)
    first = task.delay()
    task.apply(task_id=first.id)
    second = task.delay()
    assert published == [first.id, second.id]


def test_the_one_that_is_running_stands_for_it(app: Celery, published: list[str]) -> None:
    """Another thread sends while it runs."""
    inner: list[str] = []

    def body(self: Any) -> None:
        with ThreadPoolExecutor() as others:
            inner.append(others.submit(self.delay).result().id)

    task = singleton_task(app, name="sent", shared=False, enqueue_once=True)(body)
    first = task.delay()
    task.apply(task_id=first.id)
    assert inner == published == [first.id]


def test_a_run_may_send_its_next_one(app: Celery, published: list[str]) -> None:
    """celery-singleton #53: it does not stand for what it sends itself, only for what others do."""

    def body(self: Any, what: str = "") -> list[bool]:
        sent = [self.apply_async((what,), countdown=1).id for what in ("a", "b")]
        return [task_id == self.request.id for task_id in sent]

    task = singleton_task(app, name="sent", shared=False, enqueue_once=True, unique_on=["what"])(
        body
    )
    assert task.apply(("a",)).result == [False, False]
    assert len(published) == 2


def test_what_is_skipped_is_queued_no_more(app: Celery, published: list[str]) -> None:
    """Its message came while a direct call held the lease, and is gone."""
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
def test_what_goes_on_with_something_is_never_held_back(
    app: Celery, published: list[str], options: dict[str, Any]
) -> None:
    """celery-singleton #20: a retry is no second copy."""
    task = task_of(app)
    task.delay()
    if "link" in options:
        task.apply_async(link=task.si("callback"))
    elif "chain" in options:
        chain(task.si("a"), task.si("b")).apply_async()
    else:
        task.apply_async(**options)
    assert len(published) == 2


def test_a_lost_message_keeps_others_out_for_its_life_and_no_longer(
    app: Celery, published: list[str]
) -> None:
    """celery-singleton #29, a revoked task blocks for ever: one that expires has no other life."""
    task = task_of(app)
    first = task.apply_async(expires=0.5)
    wait_until(lambda: task.delay().id != first.id, "the next one is published")
    assert len(published) == 2


def test_one_that_a_worker_drops_is_queued_no_more(app: Celery, published: list[str]) -> None:
    """Celery says so with a signal, of a message that was revoked and of one that has expired."""
    task = task_of(app, unique_on=["what"])
    first, other = task.delay("a"), task.delay("b")
    dequeue_dropped(task, Context(id=first.id, args=["a"], kwargs={}))
    assert task.delay("a").id != first.id
    assert task.delay("b").id == other.id
    assert len(published) == 3


def test_what_else_a_worker_drops_is_left_alone(memory_app: Celery) -> None:
    @memory_app.task(shared=False, name="plain")
    def plain() -> None:
        """No singleton."""

    dequeue_dropped(plain, Context(id="1", args=[], kwargs={}))


def test_one_that_could_not_be_published_keeps_nobody_out(
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
def test_while_the_store_is_out_of_reach_all_are_published(
    app: Celery,
    published: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    verb: str,
) -> None:
    """The lease still lets only one run."""

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
    """The claim is carried out, its answer is lost, or a time limit interrupts it; and then the
    broker takes no message either.
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


def test_many_at_once_publish_one(app: Celery, published: list[str]) -> None:
    """All find nothing queued before any of them has noted its own."""
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
    """The store's, and what comes between a look and the claim that follows it."""

    def __init__(self, requests: Any, between: Callable[[int], None]) -> None:
        self._requests = requests
        self._between = between
        self.looks = 0

    def queued(self, key: str) -> Queued:
        found: Queued = self._requests.queued(key)
        self.looks += 1
        self._between(self.looks)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._requests, name)


def test_one_that_is_queued_between_the_look_and_the_claim_stands_for_it(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A looks, and nobody is queued; B looks, claims and publishes; A claims, is refused, and looks
    again.
    """
    task = task_of(app)
    store = runtime_of(app).store
    requests = store.requests

    def between(looks: int) -> None:
        if looks == 1:
            assert requests.claim("singleton-state:sent", "b", 60, 0)

    monkeypatch.setattr(store, "requests", RowRequests(requests, between))
    assert task.delay().id == "b"
    assert published == []


def test_a_queue_that_changes_at_every_look_keeps_nobody_out(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between each look and the claim another message is dequeued."""
    task = task_of(app)
    store = runtime_of(app).store
    requests = store.requests
    changing = RowRequests(
        requests, lambda looks: requests.dequeue("singleton-state:sent", "other")
    )
    monkeypatch.setattr(store, "requests", changing)
    assert published == [task.delay().id]
    assert changing.looks == enqueue_once.ATTEMPTS


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


# -- while a run goes on


@pytest.mark.parametrize(
    ("policy", "published_beside_run"),
    [("skip", 0), ("raise", 0), ("wait", 1), ("replace", 1), ("coalesce", 1)],
)
def test_a_change_during_a_run_brings_one_more_run_where_the_policy_does(
    app: Celery, published: list[str], policy: str, published_beside_run: int
) -> None:
    """Version 1 runs when 2 and 3 are sent: with these policies the first of them is queued."""
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
    """Options of a message, and the seconds for which it then counts as queued."""
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
    """Whichever of Celery's ways says when it may run, or until when."""
    memory_app.conf.update(timezone=zone, enable_utc=zone == "UTC")
    task = task_of(memory_app)
    options, life = ways_to_say_when(datetime.now(UTC))[way]
    first = task.apply_async(**options)
    assert row_of(memory_app).queued_in == pytest.approx(life, abs=10)
    assert task.delay().id == first.id
    assert published == [first.id]


@pytest.mark.parametrize("how", ["attribute", "annotation", "set"])
def test_a_task_says_itself_when_its_messages_expire(memory_app: Celery, how: str) -> None:
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
def test_what_celery_refuses_it_refuses_itself(memory_app: Celery, options: dict[str, Any]) -> None:
    """And nothing counts as queued."""
    task = task_of(memory_app, unique_on=["what"])

    @memory_app.task(name="plain", shared=False)
    def plain(what: str = "") -> None:
        """No singleton."""

    assert error_of(task, options) == error_of(plain, options)
    store = runtime_of(memory_app).store
    rows = [store.peek(row.key) for row in store.list("")]
    assert [row.queued_task_id for row in rows if row] in ([], [None])


# -- a task id of one's own


def test_a_task_id_of_ones_own_is_queued_once(app: Celery, published: list[str]) -> None:
    task = task_of(app)
    assert [task.apply_async(task_id="nightly").id for _ in range(3)] == ["nightly"] * 3
    assert published == ["nightly"]
    task.apply(task_id="nightly")
    task.apply_async(task_id="nightly")
    assert published == ["nightly"] * 2


def test_two_that_claim_for_the_same_task_id_at_once_send_one_message(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A looks, and nobody is queued; B looks, claims and publishes the same id; A claims, and must
    not take B's claim for its own.
    """
    task = task_of(app)
    store = runtime_of(app).store
    requests = store.requests

    def between(looks: int) -> None:
        if looks == 1:
            task.apply_async(task_id="nightly")

    monkeypatch.setattr(store, "requests", RowRequests(requests, between))
    assert task.apply_async(task_id="nightly").id == "nightly"
    assert published == ["nightly"]


def test_a_tick_whose_beat_died_before_it_sent_it_is_sent(
    app: Celery, published: list[str]
) -> None:
    """Beat A claims for its tick, and dies; beat B sends the same tick, which has the same id."""
    task = task_of(app)
    assert runtime_of(app).store.requests.claim("singleton-state:sent", "tick", 60, 0)
    task.apply_async(task_id="tick", headers={ENTRY: "nightly", DUE: "2026-01-01T00:00:00+00:00"})
    assert published == ["tick"]


# -- ends without a run


def test_a_tick_that_was_done_before_is_queued_no_more(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beat A sends a tick, and dies before it has noted that; the tick runs. Another message takes
    the lease. Beat B sends the same tick.
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
    """A message ends before its delivery."""

    abstract = True
    ends_with: BaseException

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        raise self.ends_with


@pytest.fixture
def watched() -> Iterator[None]:
    """What a worker follows."""
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
def test_one_that_ends_before_its_delivery_is_queued_no_more(
    app: Celery, ends_with: BaseException, stays: bool
) -> None:
    task = task_of(app, base=type("Base", (Unlucky,), {"ends_with": ends_with, "abstract": True}))
    first = task.delay()
    task.apply(task_id=first.id)
    assert (task.delay().id == first.id) is stays


@pytest.mark.usefixtures("watched")
def test_one_whose_process_dies_before_its_delivery_is_queued_no_more(app: Celery) -> None:
    """The worker's own process says so, of a hard time limit, too."""
    task = task_of(app)
    first = task.delay()
    signals.task_failure.send(
        sender=task, task_id=first.id, exception=TimeLimitExceeded(), args=(), kwargs={}
    )
    assert task.delay().id != first.id


@pytest.mark.parametrize("unique_on", [None, ["what"]])
@pytest.mark.usefixtures("watched")
def test_one_that_a_worker_cannot_read_is_queued_no_more(app: Celery, unique_on: Any) -> None:
    task = task_of(app, unique_on=unique_on)
    first = task.delay("a")
    headers = {"task": "sent", "id": first.id}
    message = SimpleNamespace(headers=headers, payload=[["a"], {}, {}])
    consumer = Mock(app=app)
    signals.task_rejected.send(sender=consumer, message=message, exc=None)
    assert task.delay("a").id != first.id


@pytest.mark.usefixtures("watched")
def test_a_run_costs_no_further_request(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it succeeds or fails."""
    task = task_of(app)
    monkeypatch.setattr(runtime_of(app).store.requests, "dequeue", lambda *_: 1 / 0)
    assert task.apply(("a",), task_id="1").get() == "a"
    failing = task_of(app, name="failing")
    failing.run = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        failing.apply(task_id="2").get()


@pytest.mark.usefixtures("watched")
def test_one_that_the_store_failed_is_queued_no_more(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It got no lease, and was not retried."""
    task = task_of(app, retry_reasons=[])
    first = task.delay()

    def fail(*_: Any) -> None:
        raise StoreUnavailable("gone")

    with monkeypatch.context() as patched:
        patched.setattr(runtime_of(app).store, "acquire", fail)
        with pytest.raises(StateLoadFailed):
            task.apply(task_id=first.id).get()
    assert task.delay().id != first.id


def test_the_result_of_a_message_that_failed_is_not_handed_out(
    app: Celery, published: list[str]
) -> None:
    """No worker of ours had it: one that did not know the task, say, stored its failure."""
    task = task_of(app)
    first = task.delay()
    app.backend.mark_as_failure(first.id, NotRegistered("sent"))
    second = task.delay()
    assert second.id != first.id
    assert task.delay().id == second.id
    assert published == [first.id, second.id]


def test_a_task_id_that_was_used_before_is_queued_all_the_same(
    app: Celery, published: list[str]
) -> None:
    """Yesterday's result is stored under it."""
    task = task_of(app)
    app.backend.store_result("nightly", None, "SUCCESS")
    assert {task.apply_async(task_id="nightly").id for _ in range(2)} == {"nightly"}
    assert published == ["nightly"]


# -- retries


def test_a_retry_that_waits_counts_as_queued(app: Celery, published: list[str]) -> None:
    """It is sent although its own run goes on, and holds back what others send until it runs."""

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


def test_a_retry_that_cannot_be_sent_is_queued_no_more(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(app)
    with monkeypatch.context() as patched:
        patched.setattr(app.amqp, "send_task_message", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            task.apply_async(task_id="1", retries=1, countdown=60)
    assert row_of(app).queued_task_id is None


def test_a_retry_is_sent_beside_another_that_is_queued(app: Celery, published: list[str]) -> None:
    task = task_of(app)
    first = task.delay()
    task.apply_async(task_id="2", retries=1)
    assert published == [first.id, "2"]
    assert row_of(app).queued_task_id == first.id


def test_a_message_that_is_put_back_does_not_count(app: Celery) -> None:
    """Its own run goes on. It counts as one that runs, and a change meanwhile must not be lost."""
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
    """A firewall or the server closes connections that nobody uses."""
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
