"""Interrupting the body of a run whose lease is lost, in the main thread and in another thread.

Each test forces the order of events that it is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import pickle
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry

from celery_singleton_state import HeartbeatFailed
from celery_singleton_state.run import interrupt
from celery_singleton_state.run.interrupt import Body, RunInterrupted, Unbreakable
from tests.helpers.waiting import wait_until

#: The type of a function that calls another one in the thread that a test is about.
Here = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def main_thread() -> Iterator[None]:
    """Restore the handler of ``SIGURG`` after the test."""
    before = signal.getsignal(signal.SIGURG)
    yield
    interrupt._forget()
    signal.signal(signal.SIGURG, before)


@pytest.fixture(params=["main thread", "other thread"])
def here(request: pytest.FixtureRequest, main_thread: None) -> Iterator[Here]:
    if request.param == "main thread":
        yield lambda code: code()
    else:
        with ThreadPoolExecutor(1) as pool:
            yield lambda code: pool.submit(code).result(60)


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[type[BaseException] | None]:
    """The types of the exceptions that Python could only print and ignore."""
    ignored: list[type[BaseException] | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: ignored.append(found.exc_type))
    return ignored


def call(body: Body, code: Callable[[], Any]) -> Any:
    return body.call(code, (), {})


def work() -> None:
    """Work for long enough for an interruption to arrive."""
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        os.getpid()


def work_on() -> None:
    """Work for longer than any test waits."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        work()
    raise AssertionError("the body was not interrupted")


def count_interruptions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows each time that the body in this thread is to be interrupted."""
    stack, interruptions = interrupt._stack_here(), list[int]()
    real_interrupt = stack.interrupt

    def counted() -> None:
        real_interrupt()
        interruptions.append(1)

    monkeypatch.setattr(stack, "interrupt", counted)
    return interruptions


def test_a_body_that_works_is_interrupted(here: Here) -> None:
    body = Body("s")

    def code() -> None:
        threading.Timer(0.1, body.interrupt, ["lost"]).start()
        work_on()

    with pytest.raises(HeartbeatFailed) as caught:
        here(lambda: call(body, code))
    assert type(caught.value) is HeartbeatFailed
    assert caught.value.args == ("s", "lost")
    assert type(pickle.loads(pickle.dumps(caught.value))) is HeartbeatFailed
    assert "work_on" in [entry.name for entry in caught.traceback], "where the body was"


def test_a_body_that_sleeps_is_interrupted(main_thread: None) -> None:
    """In the main thread, the sleep itself is interrupted. In another thread, the body is
    interrupted after its sleep.
    """
    body = Body("s")
    started = time.monotonic()

    def code() -> None:
        threading.Timer(0.2, body.interrupt, ["lost"]).start()
        time.sleep(60)

    with pytest.raises(HeartbeatFailed):
        call(body, code)
    assert time.monotonic() < started + 60


def test_a_body_whose_lease_is_lost_before_it_begins_is_not_called(here: Here) -> None:
    """The lease is lost while the run still loads its state."""
    body = Body("s")
    body.interrupt("lost")

    def code() -> None:
        raise AssertionError("it was called")

    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, code))


def test_a_run_is_not_interrupted_after_its_body(here: Here) -> None:
    """The body ends. The lease is lost while the run releases it."""

    def code() -> str:
        body = Body("s")
        call(body, lambda: None)
        body.interrupt("lost")
        work()
        return "released"

    assert here(code) == "released"


def test_an_interruption_at_the_end_of_the_body_is_dropped(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of the body is done. The body is interrupted. Only then does the thread leave
    the section of code in which the body may be interrupted.

    In another thread, the exception arrives when the body's code has already ended.
    """
    body = Body("s")

    def code() -> str:
        stack = interrupt._stack_here()
        leave = stack.leave

        def interrupt_and_leave(depth: int) -> None:
            monkeypatch.setattr(stack, "leave", leave)
            body.interrupt("lost")
            if isinstance(stack, interrupt._OtherThread):
                # The exception was set earlier, and CPython raises it only at a later bytecode.
                stack._raise_in_thread(ctypes.py_object(RunInterrupted))
            work()
            leave(depth)

        monkeypatch.setattr(stack, "leave", interrupt_and_leave)
        assert call(body, lambda: "whole") == "whole"
        assert stack.sections == []
        work()
        return "released"

    assert here(code) == "released"


def test_a_body_that_called_a_singleton_is_interrupted_after_the_call(here: Here) -> None:
    """The body of A calls singleton B. A's lease is lost while B releases its own lease.

    B's release is not interrupted. A's body is interrupted when B has returned.
    """
    went: list[str] = []
    outer, inner = Body("outer"), Body("inner")

    def code() -> None:
        with Unbreakable():
            call(inner, lambda: went.append("inner body"))
            outer.interrupt("lost")
            work()
            went.append("inner released")
        work()
        went.append("outer went on")

    with pytest.raises(HeartbeatFailed) as caught:
        here(lambda: call(outer, code))
    assert caught.value.singleton == "outer"
    assert went == ["inner body", "inner released"]


def test_the_body_of_a_called_singleton_is_interrupted_with_its_caller(here: Here) -> None:
    """The body of A calls singleton B. A's lease is lost while B's body works.

    B's body is interrupted. B's run releases its lease and passes the exception on to A.
    """
    went: list[Any] = []
    outer, inner = Body("outer"), Body("inner")

    def inner_code() -> None:
        outer.interrupt("lost")
        work()
        went.append("inner went on")

    def code() -> None:
        with Unbreakable():
            try:
                call(inner, inner_code)
            except Exception:
                went.append("the outer run's error passed for the inner run's")
            except BaseException as error:
                went.append(error.args)
                raise
            finally:
                work()
                went.append("inner released")

    with pytest.raises(HeartbeatFailed) as caught:
        here(lambda: call(outer, code))
    assert caught.value.singleton == "outer"
    assert went == [("outer", "lost"), "inner released"]


def test_a_caller_can_catch_the_lost_lease_of_a_called_singleton(here: Here) -> None:
    """The body of A calls singleton B. B's lease is lost. A catches ``HeartbeatFailed`` and
    continues.
    """
    outer, inner = Body("outer"), Body("inner")

    def inner_code() -> None:
        inner.interrupt("lost")
        work_on()

    def code() -> str:
        with contextlib.suppress(HeartbeatFailed), Unbreakable():
            call(inner, inner_code)
        work()
        return "outer went on"

    assert here(lambda: call(outer, code)) == "outer went on"


def test_cleaning_up_in_a_called_singleton_is_not_interrupted(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body of A calls singleton B. B's lease is lost. While B's body cleans up, A's lease is
    lost.

    B's cleaning up is not interrupted. A's body is interrupted after it.
    """
    went: list[str] = []
    outer, inner = Body("outer"), Body("inner")

    def inner_code() -> None:
        interruptions = count_interruptions(monkeypatch)
        try:
            inner.interrupt("lost")
            work_on()
        finally:
            outer.interrupt("lost")
            before = len(interruptions)
            wait_until(lambda: len(interruptions) > before + 2, "the body is to be interrupted")
            went.append("tidied up")

    def code() -> None:
        with contextlib.suppress(HeartbeatFailed), Unbreakable():
            call(inner, inner_code)
        work_on()

    with pytest.raises(HeartbeatFailed) as caught:
        here(lambda: call(outer, code))
    assert caught.value.singleton == "outer"
    assert went == ["tidied up"]


# -- swallowed interruptions: each function below loses the lease in code that drops the exception


def swallow_twice(lose: Callable[[], None]) -> None:
    """Catch the first two interruptions. The third one ends the body."""
    for _ in range(2):
        try:
            lose()
            work_on()
        except BaseException:
            pass
    work_on()


def swallow_and_keep(lose: Callable[[], None]) -> None:
    """Catch the exception and keep a reference to it, as a future or a frame in its traceback
    does.
    """
    kept = []
    try:
        lose()
        work_on()
    except BaseException as error:
        kept.append(error)
    work_on()


class Destroyed:
    def __init__(self, lose: Callable[[], None]) -> None:
        self.lose = lose

    def __del__(self) -> None:
        self.lose()
        work()


def swallow_in_destructor(lose: Callable[[], None]) -> None:
    Destroyed(lose)
    work_on()


def swallow_in_c(lose: Callable[[], None]) -> None:
    """Be interrupted in a callback of C code, which prints the callback's exception and
    continues.
    """

    def called_back() -> int:
        lose()
        work()
        return 0

    ctypes.CFUNCTYPE(ctypes.c_int)(called_back)()
    work_on()


def swallow_in_sqlite(lose: Callable[[], None]) -> None:
    """Be interrupted in a callback of SQLite, which raises an error of its own instead."""

    def called_back() -> int:
        lose()
        work()
        return 0

    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.create_function("called_back", 0, called_back)
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("SELECT called_back()")
    work_on()


def swallow_in_event_loop(lose: Callable[[], None]) -> None:
    """Be interrupted in a timer's callback of an event loop, which drops the exception.

    Only this callback could have resolved the future that the body waits for.
    """

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)
        waited_for = loop.create_future()

        def on_time() -> None:
            lose()
            work()
            waited_for.set_result(None)

        def tick() -> None:
            # In another thread the loop's wait cannot be interrupted, so wake it now and then.
            loop.call_later(0.01, tick)

        loop.call_soon(tick)
        loop.call_later(0.01, on_time)
        await waited_for

    asyncio.run(main())


@pytest.mark.parametrize(
    "swallow",
    [
        swallow_twice,
        swallow_and_keep,
        swallow_in_destructor,
        swallow_in_c,
        swallow_in_sqlite,
        swallow_in_event_loop,
    ],
)
def test_a_body_whose_interruption_is_swallowed_is_interrupted_again(
    here: Here,
    unraisable: list[type[BaseException] | None],
    monkeypatch: pytest.MonkeyPatch,
    swallow: Callable[[Callable[[], None]], None],
) -> None:
    monkeypatch.setattr(interrupt, "KEPT", 0.2)
    body = Body("s")

    def lose() -> None:
        body.interrupt("lost")

    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, lambda: swallow(lose)))
    assert set(unraisable) <= {RunInterrupted}


def test_except_exception_does_not_catch_the_interruption(here: Here) -> None:
    """``except BaseException`` catches it. If the body continues, it is interrupted again."""
    body, caught = Body("s"), list[str]()

    def code() -> str:
        for _ in range(2):
            try:
                try:
                    body.interrupt("lost")
                    work_on()
                except Exception:
                    caught.append("Exception")
            except BaseException as error:
                caught.append(f"{type(error).__name__}: {error}")
        return "to its end"

    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, code))
    assert caught == ["RunInterrupted: s: lost"] * 2


def test_a_body_that_cleans_up_is_not_interrupted(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code cleans up in ``finally`` or at the end of a context manager, and in all that these call.

    Such code may raise and catch exceptions of its own.
    """
    body, tidied = Body("s"), list[str]()

    def tidy_up(interruptions: list[int], what: str) -> None:
        before = len(interruptions)
        try:
            raise KeyError(what)
        except KeyError:
            wait_until(lambda: len(interruptions) >= before + 3, "the body is to be interrupted")
        tidied.append(what)

    @contextlib.contextmanager
    def resource(interruptions: list[int]) -> Iterator[None]:
        try:
            yield
        finally:
            tidy_up(interruptions, "resource")

    def code() -> None:
        interruptions = count_interruptions(monkeypatch)
        try:
            with resource(interruptions):
                body.interrupt("lost")
                work_on()
        finally:
            tidy_up(interruptions, "finally")

    # KEPT limits how long code may keep the exception. This limit must not apply to cleaning up.
    monkeypatch.setattr(interrupt, "KEPT", 0.0)
    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, code))
    assert tidied == ["resource", "finally"]


def test_a_body_that_hangs_while_it_cleans_up_is_interrupted(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "TIDY_UP", 0.2)
    body = Body("s")

    def code() -> None:
        try:
            body.interrupt("lost")
            work_on()
        finally:
            work_on()

    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, code))


def make_another(error: RunInterrupted) -> None:
    raise LookupError("mine") from error


def make_group(error: RunInterrupted) -> None:
    raise BaseExceptionGroup("as a task group's", [error])


def make_cancelled(error: RunInterrupted) -> None:
    raise asyncio.CancelledError


def raise_it_elsewhere(error: RunInterrupted) -> None:
    future: Future[None] = Future()
    future.set_exception(error)
    future.result()


def return_whole(error: RunInterrupted) -> None:
    pass


@pytest.mark.parametrize(
    "make", [make_another, make_group, make_cancelled, raise_it_elsewhere, return_whole]
)
def test_a_run_is_lost_whatever_its_body_does_with_the_interruption(
    here: Here, make: Callable[[RunInterrupted], None]
) -> None:
    body = Body("s")

    def code() -> None:
        try:
            body.interrupt("lost")
            work_on()
        except RunInterrupted as error:
            make(error)

    with pytest.raises(HeartbeatFailed) as caught:
        here(lambda: call(body, code))
    assert type(caught.value) is HeartbeatFailed
    assert isinstance(caught.value.__cause__, LookupError) == (make is make_another)


@pytest.mark.parametrize("kind", [Retry, Ignore, Reject, SystemExit, KeyboardInterrupt])
def test_exceptions_that_instruct_celery_pass(here: Here, kind: type[BaseException]) -> None:
    """``Retry`` means that the retry's message is sent, and ``SystemExit`` ends a worker. Celery
    must get such exceptions, although the run is lost.
    """
    body = Body("s")

    def code() -> None:
        try:
            body.interrupt("lost")
            work_on()
        except RunInterrupted:
            pass
        raise kind

    with pytest.raises(kind):
        here(lambda: call(body, code))


@pytest.mark.parametrize("whose", ["logging's", "a condition's"])
def test_an_interruption_leaves_no_lock_acquired(
    here: Here, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """The body is interrupted when a Python function has just acquired a lock for it.

    The exception must not be raised in this function. Otherwise the lock would stay acquired, and
    every other thread that needs it would hang.
    """
    body, handler = Body("s"), logging.NullHandler()
    acquired, released = SimpleQueue[bool](), list[int]()
    # Like the methods of a real lock, these are C functions.
    lock = SimpleNamespace(acquire=acquired.get, __enter__=acquired.get)
    condition: Any = threading.Condition()
    handler.lock = condition._lock = lock  # type: ignore[assignment]
    acquire = handler.acquire if whose == "logging's" else condition.__enter__

    def code() -> None:
        interruptions = count_interruptions(monkeypatch)

        def let_acquire() -> None:
            body.interrupt("lost")
            wait_until(lambda: len(interruptions) > 2, "the body is to be interrupted")
            acquired.put(True)

        # Before this timer fires, the body waits for the lock.
        threading.Timer(0.1, let_acquire).start()
        acquire()
        try:
            work_on()
        finally:
            released.append(1)

    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, code))
    assert released == [1]


def test_an_interruption_that_is_still_pending_is_withdrawn() -> None:
    """The exception is set on the thread. Before it is raised, the thread enters a section that
    must not be interrupted.

    The exception is not raised there, but when the body's own code continues.
    """
    went: list[str] = []
    body = Body("s")

    def code() -> None:
        stack: Any = interrupt._stack_here()
        send, sent = stack._raise_in_thread, []

        # CPython, too, may raise the exception late: only some bytecodes check for it.
        def hold_back(error: Any) -> None:
            sent.append(error)
            if error is None:
                sent.clear()

        stack._raise_in_thread = hold_back
        body.interrupt("lost")
        wait_until(lambda: sent, "the exception is sent")
        with Unbreakable():
            assert sent == []
            stack._raise_in_thread = send
            work()
            went.append("inner released")
        went.append("went on")

    with ThreadPoolExecutor(1) as pool, pytest.raises(HeartbeatFailed):
        pool.submit(lambda: call(body, code)).result(30)
    assert went == ["inner released"]


def test_an_earlier_signal_handler_is_called_too(main_thread: None) -> None:
    called: list[int] = []
    signal.signal(signal.SIGURG, lambda number, frame: called.append(number))
    body = Body("s")

    def code() -> None:
        body.interrupt("lost")
        work_on()

    interrupt._forget()
    with pytest.raises(HeartbeatFailed):
        call(body, code)
    assert called == [signal.SIGURG]


def test_the_repeating_thread_ends_with_the_body(here: Here) -> None:
    body = Body("s")

    def code() -> None:
        body.interrupt("lost")
        work_on()

    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, code))
    wait_until(
        lambda: not any(each.name == "singleton-interruption" for each in threading.enumerate()),
        "the repeating thread ends",
    )
