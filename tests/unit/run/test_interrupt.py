"""Interrupting bodies: each race forced, in the main thread and in another one."""

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

#: Calls a function in a thread of some kind.
Here = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def main_thread() -> Iterator[None]:
    """The signal's handler is as it was when the test has ended."""
    before = signal.getsignal(signal.SIGURG)
    yield
    interrupt._forget()
    signal.signal(signal.SIGURG, before)


@pytest.fixture(params=["main thread", "other thread"])
def here(request: pytest.FixtureRequest, main_thread: None) -> Iterator[Here]:
    if request.param == "main thread":
        yield lambda way: way()
    else:
        with ThreadPoolExecutor(1) as pool:
            yield lambda way: pool.submit(way).result(60)


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[type[BaseException] | None]:
    """The types of exceptions that Python ignored."""
    ignored: list[type[BaseException] | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: ignored.append(found.exc_type))
    return ignored


def call(body: Body, way: Callable[[], Any]) -> Any:
    return body.call(way, (), {})


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
    raise AssertionError("it went on")


def count_strikes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note each time that the thread of the calling body is to be interrupted."""
    stack, strikes = interrupt._stack_here(), list[int]()
    real_interrupt = stack.interrupt

    def counted() -> None:
        real_interrupt()
        strikes.append(1)

    monkeypatch.setattr(stack, "interrupt", counted)
    return strikes


def test_a_body_that_works_is_interrupted(here: Here) -> None:
    body = Body("s")

    def way() -> None:
        threading.Timer(0.1, body.interrupt, ["lost"]).start()
        work_on()

    with pytest.raises(HeartbeatFailed) as caught:
        here(lambda: call(body, way))
    assert type(caught.value) is HeartbeatFailed
    assert caught.value.args == ("s", "lost")
    assert type(pickle.loads(pickle.dumps(caught.value))) is HeartbeatFailed
    assert "work_on" in [entry.name for entry in caught.traceback], "where the body was"


def test_a_body_that_sleeps_is_interrupted(main_thread: None) -> None:
    """In the main thread only; in others it is when the sleep ends."""
    body = Body("s")
    started = time.monotonic()

    def way() -> None:
        threading.Timer(0.2, body.interrupt, ["lost"]).start()
        time.sleep(60)

    with pytest.raises(HeartbeatFailed):
        call(body, way)
    assert time.monotonic() < started + 60


def test_before_it_begins(here: Here) -> None:
    """The lease is lost while the state is still loaded; the body is never called."""
    body = Body("s")
    body.interrupt("lost")

    def way() -> None:
        raise AssertionError("it was called")

    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, way))


def test_after_it_ended_nothing_is_hit(here: Here) -> None:
    """The body ends; the lease is lost while the run releases."""

    def way() -> str:
        body = Body("s")
        call(body, lambda: None)
        body.interrupt("lost")
        work()
        return "released"

    assert here(way) == "released"


def test_what_was_sent_on_its_last_step_hits_nothing(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body's last line is done; it is interrupted; only then is the section left.

    In a thread, the exception arrives when the body's code has ended already.
    """
    body = Body("s")

    def way() -> str:
        stack = interrupt._stack_here()
        leave = stack.leave

        def interrupt_and_leave(depth: int) -> None:
            monkeypatch.setattr(stack, "leave", leave)
            body.interrupt("lost")
            if isinstance(stack, interrupt._OtherThread):
                # As if it had been sent just before, and had waited for its bytecode.
                stack._raise_in_thread(ctypes.py_object(RunInterrupted))
            work()
            leave(depth)

        monkeypatch.setattr(stack, "leave", interrupt_and_leave)
        assert call(body, lambda: "whole") == "whole"
        assert stack.sections == []
        work()
        return "released"

    assert here(way) == "released"


def test_what_a_body_calls_is_hit_only_when_it_has_ended(here: Here) -> None:
    """A's body calls singleton B; A is lost while B releases; B is not hit, and A is after it."""
    went: list[str] = []
    outer, inner = Body("outer"), Body("inner")

    def way() -> None:
        with Unbreakable():
            call(inner, lambda: went.append("inner body"))
            outer.interrupt("lost")
            work()
            went.append("inner released")
        work()
        went.append("outer went on")

    with pytest.raises(HeartbeatFailed) as caught:
        here(lambda: call(outer, way))
    assert caught.value.singleton == "outer"
    assert went == ["inner body", "inner released"]


def test_a_body_within_a_lost_one_is_interrupted_with_it(here: Here) -> None:
    """A's body calls singleton B; A is lost while B's body works. B hands the exception on."""
    went: list[Any] = []
    outer, inner = Body("outer"), Body("inner")

    def inner_way() -> None:
        outer.interrupt("lost")
        work()
        went.append("inner went on")

    def way() -> None:
        with Unbreakable():
            try:
                call(inner, inner_way)
            except Exception:
                went.append("the outer run's error passed for the inner run's")
            except BaseException as error:
                went.append(error.args)
                raise
            finally:
                work()
                went.append("inner released")

    with pytest.raises(HeartbeatFailed) as caught:
        here(lambda: call(outer, way))
    assert caught.value.singleton == "outer"
    assert went == [("outer", "lost"), "inner released"]


def test_an_inner_body_that_is_lost_fails_in_the_outer_one(here: Here) -> None:
    """B, which A's body calls, is lost; A catches B's ``HeartbeatFailed`` and goes on."""
    outer, inner = Body("outer"), Body("inner")

    def inner_way() -> None:
        inner.interrupt("lost")
        work_on()

    def way() -> str:
        with contextlib.suppress(HeartbeatFailed), Unbreakable():
            call(inner, inner_way)
        work()
        return "outer went on"

    assert here(lambda: call(outer, way)) == "outer went on"


def test_a_body_that_tidies_up_a_lost_inner_one_is_hit_after_it(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B, which A's body calls, is lost; then A is, while B's body tidies up: that is not hit."""
    went: list[str] = []
    outer, inner = Body("outer"), Body("inner")

    def inner_way() -> None:
        strikes = count_strikes(monkeypatch)
        try:
            inner.interrupt("lost")
            work_on()
        finally:
            outer.interrupt("lost")
            before = len(strikes)
            wait_until(lambda: len(strikes) > before + 2, "it was to be interrupted")
            went.append("tidied up")

    def way() -> None:
        with contextlib.suppress(HeartbeatFailed), Unbreakable():
            call(inner, inner_way)
        work_on()

    with pytest.raises(HeartbeatFailed) as caught:
        here(lambda: call(outer, way))
    assert caught.value.singleton == "outer"
    assert went == ["tidied up"]


# -- swallowed interruptions: each body has its first one in the code that swallows it


def swallow_twice(lose: Callable[[], None]) -> None:
    """The third one is let through."""
    for _ in range(2):
        try:
            lose()
            work_on()
        except BaseException:
            pass
    work_on()


def swallow_and_keep(lose: Callable[[], None]) -> None:
    """As a future does, or a frame that the exception's own traceback refers to."""
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
    """C code that calls back, and prints what the callback raises."""

    def called_back() -> int:
        lose()
        work()
        return 0

    ctypes.CFUNCTYPE(ctypes.c_int)(called_back)()
    work_on()


def swallow_in_sqlite(lose: Callable[[], None]) -> None:
    """C code that makes an error of its own of what the callback raises."""

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
    """A timer's callback was to resolve a future; nothing else does."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)
        waited_for = loop.create_future()

        def on_time() -> None:
            lose()
            work()
            waited_for.set_result(None)

        def tick() -> None:
            # In threads the wait itself cannot be interrupted.
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


def test_what_a_body_catches(here: Here) -> None:
    """``except Exception`` lets the interruption pass; ``except BaseException`` sees it, and
    sees it again if it goes on.
    """
    body, caught = Body("s"), list[str]()

    def way() -> str:
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
        here(lambda: call(body, way))
    assert caught == ["RunInterrupted: s: lost"] * 2


def test_a_body_that_tidies_up_is_left_alone(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ``finally``, in a context manager's end, and in what these call; whatever they catch."""
    body, tidied = Body("s"), list[str]()

    def tidy_up(strikes: list[int], what: str) -> None:
        before = len(strikes)
        try:
            raise KeyError(what)
        except KeyError:
            wait_until(lambda: len(strikes) >= before + 3, "it was to be interrupted")
        tidied.append(what)

    @contextlib.contextmanager
    def resource(strikes: list[int]) -> Iterator[None]:
        try:
            yield
        finally:
            tidy_up(strikes, "resource")

    def way() -> None:
        strikes = count_strikes(monkeypatch)
        try:
            with resource(strikes):
                body.interrupt("lost")
                work_on()
        finally:
            tidy_up(strikes, "finally")

    # As long as it takes, but for the limit.
    monkeypatch.setattr(interrupt, "KEPT", 0.0)
    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, way))
    assert tidied == ["resource", "finally"]


def test_a_body_that_hangs_while_it_tidies_up_is_interrupted_in_that(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "TIDY_UP", 0.2)
    body = Body("s")

    def way() -> None:
        try:
            body.interrupt("lost")
            work_on()
        finally:
            work_on()

    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, way))


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
def test_whatever_a_body_makes_of_it_its_run_is_lost(
    here: Here, make: Callable[[RunInterrupted], None]
) -> None:
    body = Body("s")

    def way() -> None:
        try:
            body.interrupt("lost")
            work_on()
        except RunInterrupted as error:
            make(error)

    with pytest.raises(HeartbeatFailed) as caught:
        here(lambda: call(body, way))
    assert type(caught.value) is HeartbeatFailed
    assert isinstance(caught.value.__cause__, LookupError) == (make is make_another)


@pytest.mark.parametrize("kind", [Retry, Ignore, Reject, SystemExit, KeyboardInterrupt])
def test_what_tells_celery_what_to_do_passes(here: Here, kind: type[BaseException]) -> None:
    """The message of a retry is sent already; a worker that is to end must hear of it."""
    body = Body("s")

    def way() -> None:
        try:
            body.interrupt("lost")
            work_on()
        except RunInterrupted:
            pass
        raise kind

    with pytest.raises(kind):
        here(lambda: call(body, way))


@pytest.mark.parametrize("whose", ["logging's", "a condition's"])
def test_no_lock_is_left_behind(here: Here, monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    """A function in Python has just acquired a lock for the body when the body is interrupted.

    The function must not be hit there: every other thread that wants the lock would hang.
    """
    body, handler = Body("s"), logging.NullHandler()
    acquired, released = SimpleQueue[bool](), list[int]()
    # Functions in C, as a real lock's are.
    lock = SimpleNamespace(acquire=acquired.get, __enter__=acquired.get)
    condition: Any = threading.Condition()
    handler.lock = condition._lock = lock  # type: ignore[assignment]
    acquire = handler.acquire if whose == "logging's" else condition.__enter__

    def way() -> None:
        strikes = count_strikes(monkeypatch)

        def let_acquire() -> None:
            body.interrupt("lost")
            wait_until(lambda: len(strikes) > 2, "it was to be interrupted")
            acquired.put(True)

        # It asks for the lock long before.
        threading.Timer(0.1, let_acquire).start()
        acquire()
        try:
            work_on()
        finally:
            released.append(1)

    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, way))
    assert released == [1]


def test_what_was_sent_to_a_thread_and_did_not_come_is_taken_back() -> None:
    """The exception is set on the thread, which comes to its next section before it arrives.

    It must not arrive there; it does when the body is on top again.
    """
    went: list[str] = []
    body = Body("s")

    def way() -> None:
        stack: Any = interrupt._stack_here()
        send, sent = stack._raise_in_thread, []

        # Held back, as CPython may for as long as no bytecode looks for it.
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
        pool.submit(lambda: call(body, way)).result(30)
    assert went == ["inner released"]


def test_a_handler_that_is_there_already_is_called_too(main_thread: None) -> None:
    called: list[int] = []
    signal.signal(signal.SIGURG, lambda number, frame: called.append(number))
    body = Body("s")

    def way() -> None:
        body.interrupt("lost")
        work_on()

    interrupt._forget()
    with pytest.raises(HeartbeatFailed):
        call(body, way)
    assert called == [signal.SIGURG]


def test_nothing_repeats_when_the_body_has_ended(here: Here) -> None:
    body = Body("s")

    def way() -> None:
        body.interrupt("lost")
        work_on()

    with pytest.raises(HeartbeatFailed):
        here(lambda: call(body, way))
    wait_until(
        lambda: not any(each.name == "singleton-interruption" for each in threading.enumerate()),
        "the repeating thread ends",
    )
