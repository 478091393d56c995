"""Threads and greenlets that a body starts, with or without the run's context variables."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state import singleton_task
from celery_singleton_state.runtime import runtime_of

ROOT = Path(__file__).parents[2]
KEY = "singleton-state:threads"


@dataclass
class Count:
    n: int = 0


def make(app: Celery, body: Callable[[Any], Any], **options: Any) -> Any:
    named = {"name": "threads", "shared": False, "state_schema": Count}
    return singleton_task(app, **named | options)(body)


def in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(30)


USES: dict[str, Callable[[Any], Any]] = {
    "state": lambda task: task.state,
    "fence": lambda task: task.fence,
    "lease_remaining": lambda task: task.lease_remaining,
    "checkpoint()": lambda task: task.checkpoint(),
    "transaction()": lambda task: task.transaction(),
}


@pytest.mark.parametrize("what", USES)
def test_the_error_in_a_thread_without_the_runs_context_says_how_to_pass_it(
    memory_app: Celery, what: str
) -> None:
    def body(self: Any) -> None:
        in_thread(lambda: USES[what](self))

    with pytest.raises(RuntimeError, match="copy_context") as caught:
        make(memory_app, body)()
    assert f"task threads: {what} is available only while its body runs" in str(caught.value)
    assert "executor.submit(contextvars.copy_context().run, function)" in str(caught.value)


def test_the_error_outside_any_run_does_not_mention_contexts(memory_app: Celery) -> None:
    def body(self: Any) -> None: ...

    task = make(memory_app, body)
    task()
    with pytest.raises(RuntimeError, match=r"state is available only while its body runs$"):
        _ = task.state


def by_thread(function: Callable[[], Any]) -> None:
    thread = threading.Thread(target=copy_context().run, args=(function,))
    thread.start()
    thread.join()


def by_executor(function: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(copy_context().run, function).result(30)


def by_asyncio(function: Callable[[], Any]) -> None:
    asyncio.run(asyncio.to_thread(function))


@pytest.mark.parametrize("start", [by_thread, by_executor, by_asyncio])
def test_a_thread_with_the_runs_context_can_do_what_the_body_can(
    app: Celery, start: Callable[..., None]
) -> None:
    seen: list[Any] = []

    def body(self: Any) -> int:
        def beside() -> None:
            self.state.n += 1
            self.checkpoint()
            with self.transaction():
                self.state.n += 1
            seen.append((self.fence, self.lease_remaining > 0))

        start(beside)
        seen.append((self.fence, True))
        return int(self.state.n)

    assert make(app, body)() == 2
    assert seen[0] == seen[1]
    row = runtime_of(app).store.peek(KEY)
    assert row is not None
    assert (row.value, row.last_outcome) == ('{"n":2}', "succeeded")


def test_checkpoints_of_several_threads_are_sent_one_after_the_other(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Thread A's checkpoint has got its write number, but is not sent yet.
    2. Thread B begins a checkpoint.
    3. B waits until A's checkpoint is saved.

    If B's checkpoint got a number and were sent first, the store would refuse A's checkpoint as
    late, and the lease would count as lost.
    """
    store = runtime_of(app).store
    save = store.save
    waits, begins = threading.Event(), threading.Event()
    together: list[int] = []
    sending = 0

    def save_slowly(lease: Any, write: Any) -> Any:
        nonlocal sending
        sending += 1
        together.append(sending)
        if write.number == 1:
            waits.set()
            assert begins.wait(30)
        try:
            return save(lease, write)
        finally:
            sending -= 1

    def body(self: Any) -> None:
        def second() -> None:
            assert waits.wait(30)
            self.state.n += 1
            begins.set()
            self.checkpoint()

        with ThreadPoolExecutor(5) as pool:
            others = [pool.submit(copy_context().run, second)]
            others += [pool.submit(copy_context().run, self.checkpoint) for _ in range(4)]
            for other in others:
                other.result(30)

    monkeypatch.setattr(store, "save", save_slowly)
    make(app, body)()
    assert together == [1] * 5
    row = store.peek(KEY)
    assert row is not None
    assert (row.value, row.last_outcome) == ('{"n":1}', "succeeded")


@pytest.mark.parametrize("what", USES)
def test_the_error_in_a_thread_that_outlives_its_run_says_that_the_run_is_over(
    memory_app: Celery, what: str
) -> None:
    contexts: list[Any] = []

    def body(self: Any) -> None:
        contexts.append(copy_context())

    task = make(memory_app, body)
    task()
    with pytest.raises(RuntimeError, match=r"only while its body runs.*a run that has ended"):
        in_thread(lambda: contexts[0].run(USES[what], task))


def test_a_transaction_that_is_open_when_the_run_ends_is_rolled_back(memory_app: Celery) -> None:
    """1. A thread of the body is within ``transaction()``.
    2. The body ends.
    3. The thread's commit is refused, although the lease has not expired.
    4. The run fails, and is released.
    """
    store = runtime_of(memory_app).store
    inside, go = threading.Event(), threading.Event()
    pool = ThreadPoolExecutor(1)
    left: list[Any] = []

    def body(self: Any) -> None:
        def beside() -> None:
            with self.transaction():
                self.state.n = 7
                inside.set()
                go.wait(30)

        left.append(pool.submit(copy_context().run, beside))
        assert inside.wait(30)
        release = store.release

        def release_later(*arguments: Any) -> Any:
            go.set()
            with pytest.raises(RuntimeError, match="the run has ended"):
                left[0].result(30)
            return release(*arguments)

        store.release = release_later  # type: ignore[method-assign]

    task = make(memory_app, body)
    with pytest.raises(RuntimeError, match=r"the body ended within transaction\(\)"):
        task()
    pool.shutdown()
    row = store.peek(KEY)
    assert row is not None
    assert (row.value, row.holder) == ("null", None)


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import gevent
from contextvars import copy_context
from celery import Celery
from celery_singleton_state import singleton_task
from dataclasses import dataclass

app = Celery("shop", broker="memory://")
app.conf.singleton_store_url = "sqlite:///store.db"

@dataclass
class Count:
    n: int = 0

@singleton_task(app, state_schema=Count)
def run(self):
    try:
        gevent.spawn(lambda: self.state).get()
    except RuntimeError as error:
        assert "copy_context" in str(error), error
    else:
        raise AssertionError("a greenlet without copy_context() has the run's context")

    def add():
        self.state.n += 1
        self.checkpoint()

    for greenlet in [gevent.spawn(copy_context().run, add) for _ in range(5)]:
        greenlet.get()
    return self.state.n

print(run())
"""


def test_greenlets_with_the_runs_context_can_save(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", GREENLETS],
        env={"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout == "5\n", ran.stderr
