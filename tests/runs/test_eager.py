"""Eager runs that fail over the store: what the caller is told, and what the row holds."""

from __future__ import annotations

import gc
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import Retry

from celery_singleton_state import (
    HeartbeatFailed,
    LeaderHandoffFailed,
    RetryPolicy,
    SchemaDecodeFailed,
    SingletonError,
    StateLoadFailed,
    StatePersistFailed,
    singleton_task,
)
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import StoreUnavailable

KEY = "singleton-state:called"


class Count(TypedDict):
    n: int


class Lock:
    """Another program's lock on the store's file: statements fail until it is given up."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def take(self) -> None:
        if self._connection is None:
            self._connection = sqlite3.connect(self.path, isolation_level=None)
            self._connection.execute("BEGIN IMMEDIATE")

    def give_up(self, *_: Any) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Lock]:
    made = Lock(f"{tmp_path}/store.db")
    yield made
    made.give_up()


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def app(make_app: Callable[..., Celery]) -> Celery:
    """An app that waits only briefly for the file's lock; its leases live for longer."""
    return make_app(singleton_heartbeat_interval=0.1)


@pytest.fixture
def runs() -> list[int]:
    """What each run of the body started from."""
    return []


@pytest.fixture
def make(app: Celery, runs: list[int]) -> Callable[..., Any]:
    """Makes a task that counts, and whose body does something else besides."""

    def made(inside: Callable[[Any], Any] = lambda task: None, **options: Any) -> Any:
        def body(self: Any, *_: Any) -> str:
            runs.append(self.state["n"])
            self.state["n"] += 1
            inside(self)
            return f"run {len(runs)}"

        named = {"name": "called", "shared": False, "lease_ttl": 60.0, "retry_jitter": False}
        own = {"state_schema": Count, "initial_state": {"n": 0}}
        return singleton_task(app, **named | own | options)(body)

    return made


def value(app: Celery) -> str:
    row = runtime_of(app).store.peek(KEY)
    assert row is not None
    return row.value


def always_eager(task: Any) -> Any:
    task.app.conf.task_always_eager = True
    return task.delay()


def propagating(task: Any) -> Any:
    task.app.conf.task_eager_propagates = True
    return always_eager(task)


HOW: dict[str, Callable[[Any], Any]] = {
    "apply": lambda task: task.apply(),
    "always eager": always_eager,
    "a group": lambda task: group(task.si()).apply().results[0],
}


@pytest.mark.parametrize("how", HOW)
def test_a_save_that_fails_in_an_eager_run_is_its_result(
    app: Celery, make: Callable[..., Any], runs: list[int], lock: Lock, how: str
) -> None:
    """The file is locked from the body on: neither the save nor any later try succeeds.

    When the lock is gone, the next run is not skipped for the lease that the failed run left.
    """
    task = make(lambda task: lock.take() if len(runs) == 1 else None)
    result = HOW[how](task)
    assert result.state == "FAILURE"
    assert isinstance(result.result, StatePersistFailed)
    assert runs == [0]
    lock.give_up()
    assert task.apply().result == "run 2"
    assert value(app) == '{"n":1}'


RAISING: dict[str, Callable[[Any], Any]] = {
    "throw": lambda task: task.apply(throw=True),
    "propagates": propagating,
    "called directly": lambda task: task(),
    "a chain": lambda task: chain(task.si(), task.app.signature("after")).apply().get(),
    "a chord": lambda task: chord([task.si()], task.app.signature("after")).apply().get(),
}


@pytest.mark.parametrize("how", RAISING)
def test_it_is_raised_where_the_caller_wants_errors_raised(
    app: Celery, make: Callable[..., Any], runs: list[int], lock: Lock, how: str
) -> None:
    """What is raised is the error, and not a ``Retry`` that nobody carries out."""
    after: list[Any] = []
    app.task(name="after", shared=False)(after.append)
    task = make(lambda task: lock.take())
    with pytest.raises(StatePersistFailed):
        RAISING[how](task)
    assert (runs, after) == ([0], [])


def test_a_store_that_comes_back_has_the_eager_run_repeated(
    app: Celery,
    make: Callable[..., Any],
    runs: list[int],
    lock: Lock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The row still names the first try, whose lease lives for a minute; the second try gives it
    back and takes it.
    """
    store = runtime_of(app).store
    acquire = store.acquire

    def acquire_later(*arguments: Any) -> Any:
        lock.give_up()
        return acquire(*arguments)

    monkeypatch.setattr(store, "acquire", acquire_later)
    task = make(lambda task: lock.take() if len(runs) == 1 else None)
    result = task.apply()
    assert (result.state, result.result, runs) == ("SUCCESS", "run 2", [0, 0])
    assert value(app) == '{"n":1}'


def test_a_save_whose_answer_is_lost_is_not_repeated(
    app: Celery, make: Callable[..., Any], runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release is carried out, and no answer to it comes. The next try finds it in the row's
    history, and ends with the result of the body that was saved.
    """
    store = runtime_of(app).store
    release, peek = store.release, store.peek
    silent: list[bool] = []

    def silence(lease: Any, ended: Any, write: Any = None) -> Any:
        if write is None:
            return release(lease, ended)
        if not silent:
            release(lease, ended, write)
            silent.append(True)
        raise StoreUnavailable("cut")

    monkeypatch.setattr(store, "release", silence)
    result = make().apply()
    assert (result.state, result.result, runs) == ("SUCCESS", "run 1", [0])
    row = peek(KEY)
    assert row is not None
    assert (row.value, row.holder) == ('{"n":1}', None)


@pytest.mark.parametrize("retries", [None, 1])
def test_an_eager_run_over_an_unavailable_store_ends(
    app: Celery,
    make: Callable[..., Any],
    lock: Lock,
    retries: int | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever its policy allows, it is repeated three times at most, and never nested."""
    policy = RetryPolicy(max_retries=retries, backoff=3600)
    task = make(retry_policy={"StateLoadFailed": policy})
    runtime_of(app).store.peek(KEY)
    caplog.set_level("INFO", "celery_singleton_state")
    lock.take()
    result = task.apply()
    assert (result.state, type(result.result)) == ("FAILURE", StateLoadFailed)
    repeated = caplog.text.count("the eager run is repeated")
    assert repeated == min(3, 3 if retries is None else retries)


def test_a_lost_lease_of_an_eager_run_is_its_result(
    app: Celery, make: Callable[..., Any], runs: list[int]
) -> None:
    """Somebody else has the lease when the run is repeated: a repeated run is not skipped as if
    nothing had been asked of it.
    """
    store = runtime_of(app).store

    def lose(task: Any) -> None:
        row = store.peek(KEY)
        assert row is not None
        store.give_back(KEY, str(row.holder))
        assert store.acquire(KEY, "somebody:1:a.1", 60, "other") is not None
        task.checkpoint()

    task = make(lose, retry_reasons=["HeartbeatFailed"], on_conflict="skip")
    result = task.apply()
    assert (result.state, type(result.result), runs) == ("FAILURE", HeartbeatFailed, [0])


def test_only_what_failed_over_the_store_is_repeated_at_once(
    app: Celery, make: Callable[..., Any], runs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Who has waited for a lease in vain does not wait for it again."""
    assert runtime_of(app).store.acquire(KEY, "somebody:1:a.1", 60, "other") is not None
    caplog.set_level("INFO", "celery_singleton_state")
    reasons = ["StateLoadFailed", "StatePersistFailed", "LeaderHandoffFailed"]
    result = make(retry_reasons=reasons, on_conflict="wait", conflict_timeout=0.1).apply()
    assert (result.state, type(result.result), runs) == ("FAILURE", LeaderHandoffFailed, [])
    assert "is repeated" not in caplog.text


@dataclass
class Number:
    n: int = 0


@pytest.mark.parametrize("times", [3, 1000])
def test_the_errors_of_earlier_tries_are_freed_with_their_runs(
    app: Celery, monkeypatch: pytest.MonkeyPatch, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Without help of the garbage collector: an error has the frames that it passed, and these
    have the earlier tries.
    """
    caplog.set_level("CRITICAL")  # what is logged is kept, with its error
    bodies: list[weakref.ref[Any]] = []
    real, left = runtime_of(app).store.release, [times]

    def release(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise StoreUnavailable("cut")
        return real(*arguments)

    def body(self: Any) -> None:
        bodies.append(weakref.ref(self._run_for("")))

    task = singleton_task(app, name="called", shared=False, state_schema=Number)(body)
    monkeypatch.setattr(runtime_of(app).store, "release", release)
    gc.collect()
    gc.disable()
    try:
        state = task.apply().state
        assert state == ("SUCCESS" if times == 3 else "FAILURE")
        # Celery itself keeps the last error.
        freed = bodies if times == 3 else bodies[:-1]
        assert len(freed) > 1
        assert not any(each() for each in freed)
    finally:
        gc.enable()


def wrong(task: Any) -> None:
    task.state = "no count"


def test_a_state_that_does_not_fit_is_the_result(
    app: Celery, make: Callable[..., Any], runs: list[int]
) -> None:
    result = make(wrong).apply()
    assert (result.state, type(result.result), runs) == ("FAILURE", SchemaDecodeFailed, [0])
    row = runtime_of(app).store.peek(KEY)
    assert row is not None
    assert not row.held


def by_retry(task: Any) -> None:
    raise task.retry(countdown=0)


def by_autoretry(task: Any) -> None:
    raise KeyError("again")


def in_a_transaction(task: Any) -> None:
    with task.transaction():
        raise task.retry(countdown=0)


@pytest.mark.parametrize("ask", [by_retry, by_autoretry, in_a_transaction])
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_body_that_asks_for_an_eager_retry_gets_it_or_an_error(
    app: Celery,
    make: Callable[..., Any],
    runs: list[int],
    lock: Lock,
    ask: Callable[[Any], None],
    comes_back: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first run's release fails. Celery calls the retry within the first call, and the row
    still names the first run, which has ended.
    """

    def inside(task: Any) -> None:
        if len(runs) == 1:
            if ask is not in_a_transaction:
                lock.take()
            else:
                monkeypatch.setattr(store, "release", refuse)
            ask(task)

    store = runtime_of(app).store
    release = store.release

    def refuse(*_: Any) -> Any:
        lock.take()
        raise StoreUnavailable("cut")

    def on_retry(*_: Any) -> None:
        monkeypatch.setattr(store, "release", release)
        if comes_back:
            lock.give_up()

    task = make(inside, autoretry_for=(KeyError,))
    task.on_retry = on_retry
    result = task.apply()
    if comes_back:
        assert (result.state, result.result, runs) == ("SUCCESS", "run 2", [0, 0])
        assert value(app) == '{"n":1}'
    else:
        assert (result.state, type(result.result), runs) == ("FAILURE", StateLoadFailed, [0])


def test_a_checkpoint_that_fails_in_an_eager_run_is_its_result(
    app: Celery, make: Callable[..., Any], runs: list[int], lock: Lock
) -> None:
    def inside(task: Any) -> None:
        lock.take()
        task.checkpoint()

    result = make(inside).apply()
    assert (result.state, type(result.result), runs) == ("FAILURE", StatePersistFailed, [0])


def test_a_direct_call_after_a_failed_one_is_not_skipped(
    app: Celery, make: Callable[..., Any], runs: list[int], lock: Lock
) -> None:
    """The lease that the first call left lives for a minute."""
    task = make(lambda task: lock.take() if len(runs) == 1 else None)
    with pytest.raises(SingletonError):
        task()
    lock.give_up()
    assert task() == "run 2"
    assert value(app) == '{"n":1}'


def test_plain_retries_go_on_as_celery_does_them(
    app: Celery, make: Callable[..., Any], runs: list[int]
) -> None:
    task = make(lambda task: by_retry(task) if len(runs) < 3 else None)
    assert task.apply().get() == "run 3"
    task = make(by_retry, name="retried", max_retries=1)
    with pytest.raises(Retry):
        task.apply(throw=True)
