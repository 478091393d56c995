"""Interrupt the body of a run that must end, and only the body.

:exc:`RunInterrupted` is raised inside the body, in the way that the worker's pool allows:

- *In the main thread* of a process (prefork, solo): a signal's handler raises it, so that it ends a
  sleep and a wait for a socket, too. The signal is ``SIGURG``, because a process without a handler
  ignores it. A handler that was installed before is called, too.
- *In other threads*: CPython raises it before the thread's next bytecode. A call that waits in C
  code is interrupted when it returns.
- *In greenlets* of gevent: the hub throws it, so that any wait is interrupted. A greenlet that
  computes lets no other greenlet run, the heartbeat included, and so cannot be interrupted.

Other code than the body may swallow the exception: a destructor, a callback of C code, an event
loop. Therefore a thread raises it again and again until the body ends. It pauses while an earlier
exception is on its way out of the body, because the body's ``finally`` blocks run then. When the
body has ended, :exc:`HeartbeatFailed` is raised in place of this exception, which Celery never
sees.

The code around a body must not be interrupted: the release of its lease, another task, the guard of
a singleton that the body calls. Therefore each thread keeps a stack of sections. A section is a
body, or a piece of code that must not be interrupted. A thread is interrupted only while a body is
the innermost section.
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

#: Seconds between the first and the second interruption of a body. Each further pause is longer by
#: the factor PAUSE_GROWTH, up to LONGEST_PAUSE.
FIRST_PAUSE = 0.05
PAUSE_GROWTH = 1.1
LONGEST_PAUSE = 1.0

#: Seconds that an interrupted body has for its ``except`` and ``finally`` blocks, before it is
#: interrupted again. The time is limited because these blocks may hang: ``asyncio.run``, for
#: example, waits for its tasks, and the interruption may have hit the event loop in the middle of a
#: task's step.
TIDY_UP = 10.0
#: Seconds after which an interruption counts as swallowed, if its exception object still exists but
#: no block of the body handles it. A future may keep the object, or a reference cycle may.
KEPT = 1.0

#: Functions in Python that acquire or release a lock for their callers. An interruption in one of
#: them would leave the lock held. Then every other thread that wants the lock would hang: a thread
#: that logs, or that uses the same event, queue or semaphore (they are made of conditions).
_LOCKING = frozenset[CodeType](
    function.__code__
    for function in (
        threading.Condition.__enter__,
        threading.Condition.__exit__,
        logging.Handler.acquire,
        logging.Handler.release,
        # The next two exist only before Python 3.13.
        getattr(logging, "_acquireLock", None),
        getattr(logging, "_releaseLock", None),
    )
    if function is not None
)


class RunInterrupted(BaseException):
    """Raised in the body of a run that lost its lease, or that was asked to hand over.

    This is a :exc:`BaseException`, so that ``except Exception`` does not catch it. Code that
    catches it to tidy up must raise it again.
    """

    def __init__(self, *args: str) -> None:
        super().__init__(*args)
        if not args:
            # PyThreadState_SetAsyncExc takes a class, and CPython instantiates it without arguments
            # in the interrupted thread. So this method finds the body and its reason to end.
            body = _stack_here().lost()
            if body is not None:
                self.args = body.interrupted_by(self)

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))


class Body:
    """A run's body, which is called once, and interrupted when the run must end.

    :param singleton: the singleton's name, for errors and log lines.
    """

    def __init__(self, singleton: str) -> None:
        self._singleton = singleton
        self._why: str | None = None
        #: Whether a thread was started that interrupts the body until it ends.
        self._is_repeated = False
        self._stack: _Stack | None = None
        self._interrupted_at: float | None = None
        self._interruption: Callable[[], RunInterrupted | None] = lambda: None
        #: Whether the body has begun and has not ended.
        self.is_on = False

    def interrupt(self, why: str) -> None:
        """Interrupt the body, again and again until it ends. Any thread may call this.

        If the body has not begun, it is interrupted when it begins.

        :param why: the reason, for the error.
        """
        self._why = why
        if not self.is_on or self._is_repeated or self._stack is None:
            return
        # The new thread also sends the first interruption. The caller may itself be the body's
        # thread, in the handler of another signal: an interruption from here could hit that thread
        # before it has started the new one.
        repeating = threading.Thread(target=self._repeat, name="singleton-interruption")
        repeating.daemon = True
        try:
            repeating.start()
            self._is_repeated = True
        except RuntimeError as error:
            logger.warning(
                "singleton %s: cannot start a thread to interrupt the body again and again, so it "
                "is interrupted once: %s",
                self._singleton,
                error,
            )
            self._stack.interrupt()

    def call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call the body and return its result.

        :param function: the body; called with ``args`` and ``kwargs``.
        :raises HeartbeatFailed: the body was interrupted, even if it returned or raised another
            error. Only errors that tell Celery or the worker what to do are raised unchanged:
            ``Retry``, ``Ignore``, ``Reject``, ``SystemExit``, ``KeyboardInterrupt`` and
            ``GreenletExit``.
        """
        stack = self._stack = _stack_here()
        depth = len(stack.sections)
        result, error = None, None
        # If another thread has sent an exception to this thread, CPython raises the exception when
        # this thread calls a function or returns from one. So no call may stand between the
        # function's return and `is_on = False`, nor before the second `try`.
        try:
            stack.enter(self)
            self.is_on = True
            # If `interrupt` was called before this point, it has only set `_why`, so check `_why`
            # here. No interruption is missed: `interrupt` sets `_why` before it reads `is_on`, and
            # here the order is the opposite.
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
            # This interruption was sent just before the body ended. No other one can follow it,
            # because `is_on` is false.
            stack.leave(depth)
        try:
            if self._interrupted_at is not None and not _passes(error):
                raise self._failure(error) from _cause(error)
            if error is not None:
                raise error
            return result
        finally:
            # Break a reference cycle: the error's traceback refers to this frame, which would refer
            # back to the error.
            error = None

    def _failure(self, error: BaseException | None) -> HeartbeatFailed:
        failure = HeartbeatFailed(self._singleton, self._why or "")
        # Keep the traceback, because it shows where the body was interrupted.
        return failure.with_traceback(error.__traceback__ if error is not None else None)

    def _repeat(self) -> None:
        pause = FIRST_PAUSE
        while self.is_on and self._stack is not None:
            self._stack.interrupt()
            time.sleep(pause)
            pause = min(pause * PAUSE_GROWTH, LONGEST_PAUSE)

    @property
    def is_lost(self) -> bool:
        """Whether the body must end, and has not ended yet."""
        return self.is_on and self._why is not None

    def is_leaving(self) -> bool:
        """Return whether an earlier interruption is probably still on its way out of the body."""
        interruption = self._interruption()
        if interruption is None or self._stack is None or self._interrupted_at is None:
            return False
        limit = TIDY_UP if self._stack.handles(interruption) else KEPT
        return time.monotonic() < self._interrupted_at + limit

    def interruption(self) -> RunInterrupted:
        """Make the exception, which the caller must raise in the body at once."""
        made = RunInterrupted(self._singleton, self._why or "")
        self.interrupted_by(made)
        return made

    def interrupted_by(self, interruption: RunInterrupted) -> tuple[str, str]:
        """Note that this exception is raised in the body, and return the exception's arguments."""
        self._interruption = weakref.ref(interruption)
        self._interrupted_at = time.monotonic()
        return self._singleton, self._why or ""


def _passes(error: BaseException | None) -> bool:
    """Return whether an interrupted body's error is raised as it is, not as ``HeartbeatFailed``."""
    return (
        isinstance(error, TaskPredicate | SystemExit | KeyboardInterrupt)
        or type(error).__name__ == "GreenletExit"
    )


def _cause(error: BaseException | None) -> BaseException | None:
    return None if isinstance(error, RunInterrupted) else error


class Unbreakable:
    """A section of code that is not interrupted, as a context manager.

    If a body around the section must end, it is interrupted at the end of the section.
    """

    def __enter__(self) -> None:
        stack = _stack_here()
        self._depth = len(stack.sections)
        # A section without a body around it cannot be interrupted, so nothing is done for it. This
        # saves time, because few runs are called from another run's body.
        if self._depth:
            stack.enter(None)

    def __exit__(self, *_: object) -> None:
        if self._depth:
            stack = _stack_here()
            stack.leave(self._depth)
            stack.raise_if_due()


class _Stack:
    """The sections of one thread or greenlet, innermost last. Subclasses interrupt them.

    An item is a body, or ``None`` for a section that must not be interrupted.
    """

    def __init__(self) -> None:
        self.sections: list[Body | None] = []

    def lost(self) -> Body | None:
        """Return the outermost body that must end, if there is one and it may be interrupted.

        :returns: ``None`` also while the innermost section is not a body.
        """
        return next(iter(self._all_lost()), None)

    def _all_lost(self) -> list[Body]:
        top = self.sections[-1] if self.sections else None
        if top is None or not top.is_on:
            return []
        return [body for body in self.sections if body is not None and body.is_lost]

    def due(self) -> Body | None:
        """Return the outermost body that must be interrupted now, if there is one.

        There is none while an earlier interruption is on its way out of a body.
        """
        lost = self._all_lost()
        return None if not lost or any(body.is_leaving() for body in lost) else lost[0]

    def raise_if_due(self) -> None:
        """Interrupt the body that :meth:`due` returns, if any. Called in the stack's own thread."""
        body = self.due()
        if body is not None:
            raise body.interruption()

    def interrupt(self) -> None:
        """Interrupt the body that :meth:`due` returns, if any. Called in another thread."""
        raise NotImplementedError

    def handles(self, interruption: RunInterrupted) -> bool:
        """Return whether an ``except`` or ``finally`` block is handling this exception now."""
        raise NotImplementedError

    def enter(self, section: Body | None) -> None:
        """Begin a section: a body, or (``None``) code that must not be interrupted.

        Called in the stack's own thread.
        """
        self.sections.append(section)

    def leave(self, depth: int) -> None:
        """End all sections except the outermost ones.

        Called in the stack's own thread.

        :param depth: how many sections stay.
        """
        del self.sections[depth:]


class _Thread(_Stack):
    """The sections of a thread. CPython can tell which exception a thread is handling."""

    def __init__(self) -> None:
        super().__init__()
        self._ident = threading.get_ident()

    def handles(self, interruption: RunInterrupted) -> bool:
        handled: Any = sys._current_exceptions().get(self._ident)
        if isinstance(handled, tuple):  # type, error and traceback, before Python 3.12
            handled = handled[1]
        # The loop is limited because users' code can set `__context__`, and may make a ring.
        for _ in range(100):
            if handled is None or handled is interruption:
                break
            handled = handled.__context__
        return handled is interruption


class _MainThread(_Thread):
    """The main thread's sections. A signal interrupts them: its handler runs in this thread."""

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
    """Another thread's sections, which are interrupted by ``PyThreadState_SetAsyncExc``.

    CPython then raises the exception at one of the thread's next bytecodes. An exception that has
    not arrived when a section ends is withdrawn, so that it does not hit the code after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._sent = False

    def interrupt(self) -> None:
        with self._lock:
            # Withdraw an earlier exception first, so that it cannot arrive between the check below
            # and the new exception.
            self._take_back()
            frame = sys._current_frames().get(self._ident)
            if self.due() is not None and not _is_locking(frame):
                self._sent = True
                self._raise_in_thread(ctypes.py_object(RunInterrupted))

    def enter(self, section: Body | None) -> None:
        with self._lock:
            # Withdraw a sent exception before the section begins. If the exception arrives
            # meanwhile, it still hits the body around the section, for which it was sent.
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
    """The sections of a gevent greenlet; the hub interrupts them in a callback.

    No other greenlet runs during a callback, so the check and the interruption need no lock.
    """

    def __init__(self) -> None:
        super().__init__()
        import gevent

        self._hub = gevent.get_hub()
        self._greenlet = gevent.getcurrent()

    def handles(self, interruption: RunInterrupted) -> bool:
        # Python cannot tell which exception a waiting greenlet handles. Assume that it handles this
        # one, because the greenlet may be tidying up.
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
    # Windows has no SIGURG, so its main thread is interrupted as other threads are.
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
    """In a forked child: begin with no sections, because the parent's do not apply here."""
    global _local
    _local = threading.local()


os.register_at_fork(after_in_child=_forget)
