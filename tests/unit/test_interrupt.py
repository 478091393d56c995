"""Breaking off bodies: each race forced, in the main thread and in another."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from celery_singleton_state import HeartbeatFailed, interrupt
from celery_singleton_state.interrupt import Body, Unbreakable

#: Runs a test's way in a thread of a kind.
Here = Callable[[Callable[[], Any]], Any]


@pytest.fixture(params=["main thread", "other thread"])
def here(request: pytest.FixtureRequest) -> Iterator[Here]:
    before = signal.getsignal(signal.SIGURG)
    if request.param == "main thread":
        yield lambda way: way()
    else:
        with ThreadPoolExecutor(1) as pool:
            yield lambda way: pool.submit(way).result(30)
    interrupt._forget()
    signal.signal(signal.SIGURG, before)


def work() -> None:
    """Enough bytecodes for whatever is to come."""
    for _ in range(1000):
        os.getpid()


def test_a_body_that_works_is_broken_off(here: Here) -> None:
    def way() -> None:
        body = Body("s")
        with body:
            body.break_off("lost")
            work()
            raise AssertionError("it went on")

    with pytest.raises(HeartbeatFailed) as caught:
        here(way)
    assert caught.value.args == ("s", "lost")
    assert type(pickle.loads(pickle.dumps(caught.value))) is HeartbeatFailed


def test_a_body_that_sleeps_is_broken_off() -> None:
    """In the main thread only; in others it is when the sleep ends."""
    before = signal.getsignal(signal.SIGURG)
    started = time.monotonic()

    def way() -> None:
        body = Body("s")
        with body:
            threading.Timer(0.2, body.break_off, ["lost"]).start()
            time.sleep(60)

    with pytest.raises(HeartbeatFailed):
        way()
    assert time.monotonic() < started + 60
    interrupt._forget()
    signal.signal(signal.SIGURG, before)


def test_before_it_begins(here: Here) -> None:
    """The lease is lost while the state is still loaded; the body is never entered."""

    def way() -> None:
        body = Body("s")
        body.break_off("lost")
        with body:
            raise AssertionError("it was entered")

    with pytest.raises(HeartbeatFailed):
        here(way)


def test_after_it_ended_nothing_is_hit(here: Here) -> None:
    """The body ends; the lease is lost while the run releases."""

    def way() -> str:
        body = Body("s")
        with body:
            pass
        body.break_off("lost")
        work()
        return "released"

    assert here(way) == "released"


def test_on_its_last_step(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body's last line is done; it is struck; only then is the section left.

    It ends as broken or as whole, and what follows is not hit.
    """

    def way() -> str:
        body = Body("s")
        stack = interrupt._stack_here()
        leave = stack.leave

        def strike_and_leave(depth: int) -> None:
            monkeypatch.setattr(stack, "leave", leave)
            body.break_off("lost")
            leave(depth)

        monkeypatch.setattr(stack, "leave", strike_and_leave)
        try:
            with body:
                pass
        except HeartbeatFailed:
            pass
        assert stack.sections == []
        work()
        return "released"

    assert here(way) == "released"


def test_what_a_body_calls_is_hit_only_when_it_has_ended(here: Here) -> None:
    """A's body calls singleton B; A is lost while B releases; B is not hit, and A is after it."""
    went: list[str] = []

    def way() -> None:
        outer, inner = Body("outer"), Body("inner")
        with outer:
            with Unbreakable():
                with inner:
                    went.append("inner body")
                outer.break_off("lost")
                work()
                went.append("inner released")
            work()
            went.append("outer went on")

    with pytest.raises(HeartbeatFailed) as caught:
        here(way)
    assert caught.value.singleton == "outer"
    assert went == ["inner body", "inner released"]


def test_a_body_within_a_lost_one_is_broken_off_with_it(here: Here) -> None:
    """A's body calls singleton B; A is lost while B's body works."""
    went: list[str] = []

    def way() -> None:
        outer, inner = Body("outer"), Body("inner")
        with outer, Unbreakable():
            try:
                with inner:
                    outer.break_off("lost")
                    work()
                    went.append("inner went on")
            finally:
                work()
                went.append("inner released")

    with pytest.raises(HeartbeatFailed) as caught:
        here(way)
    assert caught.value.singleton == "outer"
    assert went == ["inner released"]


def test_a_body_that_keeps_it_to_itself_is_struck_once(here: Here) -> None:
    went: list[str] = []

    def way() -> None:
        body = Body("s")
        with body:
            try:
                body.break_off("lost")
                work()
            except Exception:
                went.append("caught")
            work()
            went.append("went on")

    with pytest.raises(HeartbeatFailed):
        here(way)
    assert went == ["caught", "went on"]


def test_an_error_that_a_body_made_of_it_is_left(here: Here) -> None:
    def way() -> None:
        body = Body("s")
        with body:
            try:
                body.break_off("lost")
                work()
            except HeartbeatFailed as error:
                raise LookupError("mine") from error

    with pytest.raises(LookupError):
        here(way)


def test_what_was_sent_to_a_thread_and_did_not_come_is_taken_back() -> None:
    """The exception is set on the thread, which comes to its next section before it arrives.

    It must not arrive there; it does when the body is on top again.
    """
    went: list[str] = []

    def way() -> None:
        body = Body("s")
        stack: Any = interrupt._stack_here()
        send, sent = stack._raise_in_thread, []

        # Held back, as CPython may for as long as no bytecode looks for it.
        def hold_back(error: Any) -> None:
            sent.append(error)
            if error is None:
                sent.clear()

        stack._raise_in_thread = hold_back
        with body:
            body.break_off("lost")
            assert len(sent) == 1
            with Unbreakable():
                assert sent == []
                stack._raise_in_thread = send
                work()
                went.append("inner released")
            went.append("went on")

    with ThreadPoolExecutor(1) as pool, pytest.raises(HeartbeatFailed):
        pool.submit(way).result(30)
    assert went == ["inner released"]


def test_a_handler_that_is_there_already_is_called_too() -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGURG, lambda number, frame: called.append(number))

    def way() -> None:
        body = Body("s")
        with body:
            body.break_off("lost")
            work()

    try:
        interrupt._forget()
        with pytest.raises(HeartbeatFailed):
            way()
        assert called == [signal.SIGURG]
    finally:
        interrupt._forget()
        signal.signal(signal.SIGURG, before)
