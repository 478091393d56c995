"""Interrupting the body of a run that is not to go on, and nothing but the body.

:exc:`RunInterrupted` is raised inside the body, by what the worker's pool offers:

- *In the main thread* of a process (prefork, solo): by a signal's handler, so that a sleep and a
  wait for a socket end as well. The signal is ``SIGURG``, which a process without a handler
  ignores. A handler that is installed already is called, too.
- *In other threads*: CPython raises it before the thread's next bytecode. A call that waits in C
  is interrupted when it returns.
- *In greenlets* of gevent: the hub throws it, so that whatever waits is interrupted. A greenlet
  that computes lets no other greenlet run, the heartbeat included.

Code that is not the body's may swallow the exception: a destructor, a callback of C code, an event
loop. Therefore a thread raises it again and again until the body ends, but not while an earlier one
is on its way out, because the body's ``finally`` blocks run then. At its end the body raises
:exc:`HeartbeatFailed`: Celery never sees the private exception.

What surrounds a body must not be interrupted: its own release, another task, a singleton that it
calls. Therefore each thread keeps a stack of sections, which are bodies and what must not be
interrupted, and is interrupted only while a body is on top.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

from celery.exceptions import TaskPredicate

from celery_singleton_state.errors import HeartbeatFailed
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)

#: Seconds before a body is interrupted for the second time; then growing by the factor, to the
#: limit.
FIRST_PAUSE = 0.05
PAUSE_GROWTH = 1.1
LONGEST_PAUSE = 1.0

#: Seconds that a body has to tidy up before it is interrupted in that, too. They are limited
#: because what runs then may hang: ``asyncio.run`` waits for its tasks, and the interruption may
#: have hit the event loop just when it took up a step of one of them.
TIDY_UP = 10.0
#: Seconds after which an interruption counts as swallowed that is referred to and not handled. A
#: future may have taken it, or its traceback is part of a reference cycle.
KEPT = 1.0

#: Functions in Python that take or give back a lock for their callers. To interrupt one of them
#: would leave the lock held, and every other thread that wants it would hang: when it logs, or
#: uses the same event, queue or semaphore, which are made of conditions.
_LOCKING = frozenset[CodeType](
    function.__code__
    for function in (
        threading.Condition.__enter__,
        threading.Condition.__exit__,
        logging.Handler.acquire,
        logging.Handler.release,
        # Before Python 3.13.
        getattr(logging, "_acquireLock", None),
        getattr(logging, "_releaseLock", None),
    )
    if function is not None
)


class RunInterrupted(BaseException):
    """Interrupts the body of a run that lost its lease, or is asked to hand it over.

    It is not an :exc:`Exception`, so that ``except Exception`` lets it pass. Code that catches it
    to tidy up must raise it again.
    """

    def __init__(self, *args: str) -> None:
        super().__init__(*args)
        if not args:
            # CPython makes it without arguments, in the thread that it interrupts.
            body = _stack_here().lost()
            if body is not None:
                self.args = body.interrupted_by(self)

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))


class Body:
    """A run's body: called once, and interrupted when the run is not to go on.

    :param singleton: the singleton's name, for the error.
    """

    def __init__(self, singleton: str) -> None:
        self._singleton = singleton
        self._why: str | None = None
        #: Whether a thread interrupts it again and again.
        self._is_repeated = False
        self._stack: _Stack | None = None
        self._interrupted_at: float | None = None
        self._interruption: Callable[[], RunInterrupted | None] = lambda: None
        #: Whether the body's own code runs.
        self.is_on = False

    def interrupt(self, why: str) -> None:
        """Interrupt the body until it ends, from any thread. Before its call: when it is called."""
        self._why = why
        if not self.is_on or self._is_repeated or self._stack is None:
            return
        # A thread of its own strikes for the first time, too. The caller may be the body's thread,
        # in another signal's handler, and must not be hit before the thread is started.
        repeating = threading.Thread(target=self._repeat, name="singleton-interruption")
        repeating.daemon = True
        try:
            repeating.start()
            self._is_repeated = True
        except RuntimeError as error:
            logger.warning(
                "singleton %s: interrupted once only, and again at its next heartbeat: %s",
                self._singleton,
                error,
            )
            self._stack.interrupt()

    def call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call the body; returns what the function returned.

        :raises HeartbeatFailed: the body was interrupted, whatever it made of that. Only what tells
            Celery or the worker what to do passes: ``Retry``, ``Ignore``, ``Reject``,
            ``SystemExit``, ``KeyboardInterrupt`` and ``GreenletExit``.
        """
        stack = self._stack = _stack_here()
        depth = len(stack.sections)
        result, error = None, None
        # CPython interrupts at a call and at its return. So nothing comes between the function's
        # end and the assignment that ends the interruptions, nor before the second `try`.
        try:
            stack.enter(self)
            self.is_on = True
            # Whoever interrupts it says why first, and then looks whether it is on.
            if depth or self._why is not None:
                stack.raise_if_due()
            result = function(*args, **kwargs)
            self.is_on = False
        except BaseException as raised:
            self.is_on = False
            error = raised
        try:
            stack.leave(depth)
        except RunInterrupted:
            # It was sent to the thread just before the body ended. No other one can follow it.
            stack.leave(depth)
        try:
            if self._interrupted_at is not None and not _passes(error):
                raise self._failure(error) from _cause(error)
            if error is not None:
                raise error
            return result
        finally:
            # The traceback refers to this frame.
            error = None

    def _failure(self, error: BaseException | None) -> HeartbeatFailed:
        failure = HeartbeatFailed(self._singleton, self._why or "")
        # Where the body was.
        return failure.with_traceback(error.__traceback__ if error is not None else None)

    def _repeat(self) -> None:
        pause = FIRST_PAUSE
        while self.is_on and self._stack is not None:
            self._stack.interrupt()
            time.sleep(pause)
            pause = min(pause * PAUSE_GROWTH, LONGEST_PAUSE)

    @property
    def is_lost(self) -> bool:
        """Whether the body is to end, and has not yet."""
        return self.is_on and self._why is not None

    def is_leaving(self) -> bool:
        """Whether an interruption is on its way out of the body, as far as one can know."""
        interruption = self._interruption()
        if interruption is None or self._stack is None or self._interrupted_at is None:
            return False
        limit = TIDY_UP if self._stack.handles(interruption) else KEPT
        return time.monotonic() < self._interrupted_at + limit

    def interruption(self) -> RunInterrupted:
        """Make the exception, to be raised in the body at once."""
        made = RunInterrupted(self._singleton, self._why or "")
        self.interrupted_by(made)
        return made

    def interrupted_by(self, interruption: RunInterrupted) -> tuple[str, str]:
        """Note that an exception is raised in the body; returns the exception's arguments."""
        self._interruption = weakref.ref(interruption)
        self._interrupted_at = time.monotonic()
        return self._singleton, self._why or ""


def _passes(error: BaseException | None) -> bool:
    """Whether an error leaves an interrupted body as it is."""
    return (
        isinstance(error, TaskPredicate | SystemExit | KeyboardInterrupt)
        or type(error).__name__ == "GreenletExit"
    )


def _cause(error: BaseException | None) -> BaseException | None:
    return None if isinstance(error, RunInterrupted) else error


class Unbreakable:
    """A section that nothing interrupts. A lost body around it is interrupted when it ends."""

    def __enter__(self) -> None:
        stack = _stack_here()
        self._depth = len(stack.sections)
        # Outside of bodies nothing is interrupted: most runs are called by no other run.
        if self._depth:
            stack.enter(None)

    def __exit__(self, *_: object) -> None:
        if self._depth:
            stack = _stack_here()
            stack.leave(self._depth)
            stack.raise_if_due()


class _Stack:
    """A thread's sections, and the way to interrupt the thread."""

    def __init__(self) -> None:
        self.sections: list[Body | None] = []

    def lost(self) -> Body | None:
        """The outermost body that is to end, if a body is on top."""
        return next(iter(self._all_lost()), None)

    def _all_lost(self) -> list[Body]:
        top = self.sections[-1] if self.sections else None
        if top is None or not top.is_on:
            return []
        return [body for body in self.sections if body is not None and body.is_lost]

    def due(self) -> Body | None:
        """The outermost body that is to be interrupted now."""
        lost = self._all_lost()
        return None if not lost or any(body.is_leaving() for body in lost) else lost[0]

    def raise_if_due(self) -> None:
        """Interrupt the body that is due, called in the stack's own thread."""
        body = self.due()
        if body is not None:
            raise body.interruption()

    def interrupt(self) -> None:
        """Have the body that is due interrupted, called in another thread."""
        raise NotImplementedError

    def handles(self, interruption: RunInterrupted) -> bool:
        """Whether the thread is in an ``except`` or ``finally`` block that an exception entered."""
        raise NotImplementedError

    def enter(self, section: Body | None) -> None:
        """Come into a section, in the stack's own thread."""
        self.sections.append(section)

    def leave(self, depth: int) -> None:
        """Leave all sections above a depth, in the stack's own thread."""
        del self.sections[depth:]


class _Thread(_Stack):
    def __init__(self) -> None:
        super().__init__()
        self._ident = threading.get_ident()

    def handles(self, interruption: RunInterrupted) -> bool:
        handled: Any = sys._current_exceptions().get(self._ident)
        if isinstance(handled, tuple):  # before Python 3.12
            handled = handled[1]
        # A chain that users made may be a ring.
        for _ in range(100):
            if handled is None or handled is interruption:
                break
            handled = handled.__context__
        return handled is interruption


class _MainThread(_Thread):
    """Interrupted by a signal, whose handler runs in the thread itself."""

    def __init__(self) -> None:
        super().__init__()
        self._previous: Any = signal.signal(signal.SIGURG, self._on_signal)
        parents = getattr(self._previous, "__self__", None)
        if isinstance(parents, _MainThread):
            self._previous = parents._previous

    def interrupt(self) -> None:
        if self.due() is not None:
            signal.pthread_kill(self._ident, signal.SIGURG)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if callable(self._previous):
            self._previous(number, frame)
        if not _is_locking(frame):
            self.raise_if_due()


class _OtherThread(_Thread):
    """Interrupted by an exception that CPython raises at one of the thread's next bytecodes.

    An exception that was sent and has not arrived is taken back before the section ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._sent = False

    def interrupt(self) -> None:
        with self._lock:
            # While nothing is under way, no exception can arrive between the look and the sending.
            self._take_back()
            frame = sys._current_frames().get(self._ident)
            if self.due() is not None and not _is_locking(frame):
                self._sent = True
                self._raise_in_thread(ctypes.py_object(RunInterrupted))

    def enter(self, section: Body | None) -> None:
        with self._lock:
            # First, so that an exception that arrives here leaves no section behind.
            self._take_back()
            super().enter(section)

    def leave(self, depth: int) -> None:
        with self._lock:
            self._take_back()
            super().leave(depth)

    def _take_back(self) -> None:
        if self._sent:
            self._raise_in_thread(None)
            self._sent = False

    def _raise_in_thread(self, error: Any) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._ident), error)


class _Greenlet(_Stack):
    """Interrupted by gevent's hub, between whose callbacks nothing else runs."""

    def __init__(self) -> None:
        super().__init__()
        import gevent

        self._hub = gevent.get_hub()
        self._greenlet = gevent.getcurrent()

    def handles(self, interruption: RunInterrupted) -> bool:
        # Nobody can look into a greenlet that waits: it may well do so to tidy up.
        return True

    def interrupt(self) -> None:
        self._hub.loop.run_callback_threadsafe(self._throw)

    def _throw(self) -> None:
        body = self.due()
        if body is not None:
            self._greenlet.throw(body.interruption())


def _is_locking(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code in _LOCKING


def _make_stack() -> _Stack:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        return _Greenlet()
    # Without the signal, on Windows, a main thread is interrupted as the other threads are.
    if hasattr(signal, "SIGURG") and threading.current_thread() is threading.main_thread():
        return _MainThread()
    return _OtherThread()


_local = threading.local()


def _stack_here() -> _Stack:
    try:
        stack: _Stack = _local.stack
    except AttributeError:
        stack = _local.stack = _make_stack()
    return stack


def _forget() -> None:
    """A forked child is in none of its parent's sections."""
    global _local
    _local = threading.local()


os.register_at_fork(after_in_child=_forget)
