"""``enqueue_once``: what is published, seen from the client that sends, on every store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery, chain, signals
from celery.app.task import Context

from celery_singleton_state import enqueue, singleton_task
from celery_singleton_state.enqueue import dequeue_dropped
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Queued, StoreUnavailable
from tests.waiting import wait_until


@pytest.fixture
def app(app: Celery) -> Celery:
    app.conf.broker_url = "memory://"
    return app


@pytest.fixture
def published() -> Iterator[list[str]]:
    """The ids of all messages that were sent."""
    ids: list[str] = []

    def note(headers: dict[str, Any], **_: Any) -> None:
        ids.append(headers["id"])

    signals.before_task_publish.connect(note)
    yield ids
    signals.before_task_publish.disconnect(note)


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
    monkeypatch.setattr(runtime_of(app).store.wishes, verb, fail)
    task.delay()
    task.delay()
    assert len(published) == 2
    assert "it may be queued already: gone" in caplog.text


@pytest.mark.parametrize("error", [StoreUnavailable("the answer is lost"), TimeoutError()])
def test_a_claim_whose_message_was_not_sent_does_not_count(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The claim is carried out, its answer is lost, or a time limit interrupts it; and then the
    broker takes no message either.
    """
    task = task_of(app)
    wishes = runtime_of(app).store.wishes
    claim = wishes.claim

    def lose_answer(*arguments: Any) -> Any:
        claim(*arguments)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(wishes, "claim", lose_answer)
        patch.setattr("celery.app.task.Task.apply_async", lambda *_, **__: 1 / 0)
        with pytest.raises((ZeroDivisionError, TimeoutError)):
            task.delay()
    task.delay()
    assert len(published) == 1


def test_many_at_once_publish_one(app: Celery, published: list[str]) -> None:
    """All find nothing queued before any of them has noted its own."""
    task = task_of(app)
    runtime = runtime_of(app)
    runtime.store.check()
    together = threading.Barrier(4)

    def ask(n: int) -> Any:
        together.wait(10)
        return enqueue.enqueue(runtime, "singleton-state:sent", {}, published.append) and n

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert len(published) == 1
    assert task.delay().id == published[0]


class Wishes:
    """The store's, and what comes between a look and the claim that follows it."""

    def __init__(self, wishes: Any, between: Callable[[int], None]) -> None:
        self._wishes = wishes
        self._between = between
        self.looks = 0

    def queued(self, key: str) -> Queued:
        found: Queued = self._wishes.queued(key)
        self.looks += 1
        self._between(self.looks)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wishes, name)


def test_one_that_is_queued_between_the_look_and_the_claim_stands_for_it(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A looks, and nobody is queued; B looks, claims and publishes; A claims, is refused, and looks
    again.
    """
    task = task_of(app)
    store = runtime_of(app).store
    wishes = store.wishes

    def between(looks: int) -> None:
        if looks == 1:
            assert wishes.claim("singleton-state:sent", "b", 60, 0)

    monkeypatch.setattr(store, "wishes", Wishes(wishes, between))
    assert task.delay().id == "b"
    assert published == []


def test_a_queue_that_changes_at_every_look_keeps_nobody_out(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between each look and the claim another message is dequeued."""
    task = task_of(app)
    store = runtime_of(app).store
    wishes = store.wishes
    changing = Wishes(wishes, lambda looks: wishes.dequeue("singleton-state:sent", "other"))
    monkeypatch.setattr(store, "wishes", changing)
    assert published == [task.delay().id]
    assert changing.looks == enqueue.LOOKS


def test_a_claim_whose_answer_is_lost_is_repeated(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(app)
    wishes = runtime_of(app).store.wishes
    claim = wishes.claim
    answers = []

    def lose_the_first(*arguments: Any) -> bool:
        answers.append(claim(*arguments))
        if len(answers) == 1:
            raise StoreUnavailable("the answer is lost")
        return answers[-1]

    monkeypatch.setattr(wishes, "claim", lose_the_first)
    assert [task.delay().id for _ in range(2)] == published * 2
    assert answers == [True, True]


def test_a_life(app: Celery) -> None:
    assert enqueue._life({}) == 300
    assert enqueue._life({"countdown": 60}) == 360
    assert enqueue._life({"countdown": 60, "expires": 100}) == 100
