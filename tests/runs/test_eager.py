"""Eager runs that fail over the store: which result or error the caller gets, and the row after."""

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
    """Another program's lock on the SQLite file: the store's statements fail until it is freed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def take(self) -> None:
        if self._connection is None:
            self._connection = sqlite3.connect(self.path, isolation_level=None)
            self._connection.execute("BEGIN IMMEDIATE")

    def free(self, *_: Any) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Lock]:
    made = Lock(f"{tmp_path}/store.db")
    yield made
    made.free()


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def app(make_app: Callable[..., Celery]) -> Celery:
    """Return an app that waits only briefly for the file's lock, so that statements fail soon.

    The tests' leases live for longer than the app waits.
    """
    return make_app(singleton_heartbeat_interval=0.1)


@pytest.fixture
def runs() -> list[int]:
    """Return a list to which each run adds the number that its state had at the start."""
    return []


@pytest.fixture
def make(app: Celery, runs: list[int]) -> Callable[..., Any]:
    """Return a function that makes a task.

    The task's body counts in its state, and then calls the function ``inside``.
    """

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
def test_a_failed_save_is_the_result_of_an_eager_run(
    app: Celery, make: Callable[..., Any], runs: list[int], lock: Lock, how: str
) -> None:
    """1. The body locks the file.
    2. The save fails, and so do all later tries.
    3. The lock is freed.
    4. The next run is not skipped, although the failed run has left its lease in the row.
    """
    task = make(lambda task: lock.take() if len(runs) == 1 else None)
    result = HOW[how](task)
    assert result.state == "FAILURE"
    assert isinstance(result.result, StatePersistFailed)
    assert runs == [0]
    lock.free()
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
def test_a_failed_save_is_raised_if_the_caller_wants_errors_raised(
    app: Celery, make: Callable[..., Any], runs: list[int], lock: Lock, how: str
) -> None:
    """The caller gets StatePersistFailed, not a ``Retry``, because no worker would carry it out."""
    after: list[Any] = []
    app.task(name="after", shared=False)(after.append)
    task = make(lambda task: lock.take())
    with pytest.raises(StatePersistFailed):
        RAISING[how](task)
    assert (runs, after) == ([0], [])


def test_an_eager_run_is_repeated_when_the_store_is_available_again(
    app: Celery,
    make: Callable[..., Any],
    runs: list[int],
    lock: Lock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first try could not release its lease, which would live for a minute. The second try
    releases that lease, and acquires it.
    """
    store = runtime_of(app).store
    acquire = store.acquire

    def acquire_later(*arguments: Any) -> Any:
        lock.free()
        return acquire(*arguments)

    monkeypatch.setattr(store, "acquire", acquire_later)
    task = make(lambda task: lock.take() if len(runs) == 1 else None)
    result = task.apply()
    assert (result.state, result.result, runs) == ("SUCCESS", "run 2", [0, 0])
    assert value(app) == '{"n":1}'


def test_an_eager_run_whose_save_was_carried_out_is_not_repeated(
    app: Celery, make: Callable[..., Any], runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The release is carried out, but its answer is lost.
    2. The next try finds the run in the row's history.
    3. The eager run ends with that run's result.
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
def test_an_eager_run_ends_although_the_store_stays_unavailable(
    app: Celery,
    make: Callable[..., Any],
    lock: Lock,
    retries: int | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run is repeated three times at most, whatever its retry policy allows.

    It does not wait for the policy's pauses of an hour.
    """
    policy = RetryPolicy(max_retries=retries, backoff=3600)
    task = make(retry_policy={"StateLoadFailed": policy})
    runtime_of(app).store.peek(KEY)
    caplog.set_level("INFO", "celery_singleton_state")
    lock.take()
    result = task.apply()
    assert (result.state, type(result.result)) == ("FAILURE", StateLoadFailed)
    repeated = caplog.text.count("the eager run is repeated")
    assert repeated == min(3, 3 if retries is None else retries)


def test_a_lost_lease_is_the_result_of_an_eager_run(
    app: Celery, make: Callable[..., Any], runs: list[int]
) -> None:
    """1. Another holder takes the lease over.
    2. The checkpoint fails.
    3. The run is repeated, and finds the lease taken.
    4. The result is the checkpoint's error, although the policy is "skip".
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


def test_an_eager_run_that_waited_for_the_lease_in_vain_is_not_repeated(
    app: Celery, make: Callable[..., Any], runs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Only failures over the store are repeated at once. Here the lease is taken all the time.

    The run fails after ``conflict_timeout``, and does not wait a second time.
    """
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
def test_earlier_tries_of_an_eager_run_are_freed_with_their_errors(
    app: Celery, monkeypatch: pytest.MonkeyPatch, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Tries are freed without the garbage collector.

    An error refers to the frames that it passed. Those frames must not keep earlier tries alive.
    """
    caplog.set_level("CRITICAL")  # caplog would keep each log record, and with it the error.
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
        # Celery itself keeps the error of the last try, and so the last try.
        freed = bodies if times == 3 else bodies[:-1]
        assert len(freed) > 1
        assert not any(each() for each in freed)
    finally:
        gc.enable()


def wrong(task: Any) -> None:
    task.state = "no count"


def test_a_state_that_does_not_fit_is_the_error_of_an_eager_run(
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
@pytest.mark.parametrize("is_available_again", [True, False])
def test_a_body_that_asks_for_an_eager_retry_gets_it_or_an_error(
    app: Celery,
    make: Callable[..., Any],
    runs: list[int],
    lock: Lock,
    ask: Callable[[Any], None],
    is_available_again: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1. The body asks for a retry.
    2. The release of its lease fails.
    3. Celery calls the retry within the first call. The row still names the first run.
    4. If the store is available again, the retry runs. Otherwise it ends with StateLoadFailed.
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
        if is_available_again:
            lock.free()

    task = make(inside, autoretry_for=(KeyError,))
    task.on_retry = on_retry
    result = task.apply()
    if is_available_again:
        assert (result.state, result.result, runs) == ("SUCCESS", "run 2", [0, 0])
        assert value(app) == '{"n":1}'
    else:
        assert (result.state, type(result.result), runs) == ("FAILURE", StateLoadFailed, [0])


def test_a_failed_checkpoint_is_the_result_of_an_eager_run(
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
    """The first call could not release its lease, which would live for a minute."""
    task = make(lambda task: lock.take() if len(runs) == 1 else None)
    with pytest.raises(SingletonError):
        task()
    lock.free()
    assert task() == "run 2"
    assert value(app) == '{"n":1}'


def test_retries_of_eager_runs_work_as_in_celery(
    app: Celery, make: Callable[..., Any], runs: list[int]
) -> None:
    task = make(lambda task: by_retry(task) if len(runs) < 3 else None)
    assert task.apply().get() == "run 3"
    task = make(by_retry, name="retried", max_retries=1)
    with pytest.raises(Retry):
        task.apply(throw=True)
