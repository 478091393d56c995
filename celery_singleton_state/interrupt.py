"""Breaking off the body of a run that lost its lease, and nothing but the body.

The exception is raised inside the body by what its pool offers:

- *In the main thread* of a process (prefork, solo): by a signal's handler, so that a sleep and a
  wait for a socket are broken as well. The signal is ``SIGURG``, which a process without a handler
  ignores; a handler that is there already is called, too.
- *In other threads*: CPython raises it before the thread's next bytecode. A call that waits in C
  is broken when it returns.
- *In greenlets* of gevent: the hub throws it, so that whatever waits is broken. A greenlet that
  computes lets nobody run, the heartbeat included.

What surrounds a body must not be hit: its own release, another task, a singleton that it calls. So
each thread keeps a stack of sections, bodies and what is not to be broken, and is struck only
while a body is on top. What could not strike then does when the body is on top again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any

from .errors import HeartbeatFailed


class Body:
    """A section that is broken off when its run is lost; as a context, entered and left once.

    :param singleton: the singleton's name, for the error.
    """

    def __init__(self, singleton: str) -> None:
        self._singleton = singleton
        self._why: str | None = None
        self._struck = False
        self._stack: _Stack | None = None
        self._depth = 0

    def break_off(self, why: str) -> None:
        """Break the body off, from any thread; before it is entered: when it is."""
        self._why = why
        if self._stack is not None:
            self._stack.strike()

    def __enter__(self) -> None:
        stack = self._stack = _stack_here()
        self._depth = len(stack.sections)
        stack.enter(self)
        try:
            stack.raise_if_due()
        except HeartbeatFailed:
            stack.leave(self._depth)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        stack = _stack_here()
        try:
            stack.leave(self._depth)
        except HeartbeatFailed:
            # Struck on its last step. It is struck once, so this time nothing comes between.
            stack.leave(self._depth)
            raise self.error() from None
        if self._struck and (kind is None or isinstance(error, HeartbeatFailed)):
            # It kept its end to itself, or was struck by an error of a class of its own, which
            # could not be pickled.
            raise self.error() from None

    @property
    def is_due(self) -> bool:
        """Whether it is to be broken off, and has not been."""
        return self._why is not None and not self._struck

    def error(self) -> HeartbeatFailed:
        """What it is broken off with, once."""
        self._struck = True
        return HeartbeatFailed(self._singleton, self._why or "")

    def error_class(self) -> type[HeartbeatFailed]:
        """The same as a class that needs no arguments; struck is who makes one of it."""
        arguments = self.error().args

        def init(failed: HeartbeatFailed) -> None:
            HeartbeatFailed.__init__(failed, *arguments)
            self._struck = True

        self._struck = False
        return type("HeartbeatFailed", (HeartbeatFailed,), {"__init__": init})


class Unbreakable:
    """A section that nothing breaks; a body around it that was to be broken is when it ends."""

    def __enter__(self) -> None:
        stack = _stack_here()
        self._depth = len(stack.sections)
        # Where no body is, nothing can be struck: most runs are called by no other.
        if self._depth:
            stack.enter(None)

    def __exit__(self, *_: object) -> None:
        if self._depth:
            stack = _stack_here()
            stack.leave(self._depth)
            stack.raise_if_due()


class _Stack:
    """A thread's sections, and the way to strike it."""

    def __init__(self) -> None:
        self.sections: list[Body | None] = []

    def due(self) -> Body | None:
        """The outermost body that is to be broken off now."""
        if not self.sections or self.sections[-1] is None:
            return None
        return next((body for body in self.sections if body is not None and body.is_due), None)

    def raise_if_due(self) -> None:
        """In the thread itself: break off what is due."""
        body = self.due()
        if body is not None:
            raise body.error()

    def strike(self) -> None:
        """From another thread: see to it that what is due is broken off."""
        raise NotImplementedError

    def enter(self, section: Body | None) -> None:
        """In the thread itself: come into a section."""
        self.sections.append(section)

    def leave(self, depth: int) -> None:
        """In the thread itself: leave all sections above a depth."""
        del self.sections[depth:]


class _MainThread(_Stack):
    """Struck by a signal, whose handler runs in the thread itself."""

    def __init__(self) -> None:
        super().__init__()
        self._ident = threading.get_ident()
        self._previous: Any = signal.signal(signal.SIGURG, self._on_signal)
        parents = getattr(self._previous, "__self__", None)
        if isinstance(parents, _MainThread):
            self._previous = parents._previous

    def strike(self) -> None:
        signal.pthread_kill(self._ident, signal.SIGURG)

    def _on_signal(self, number: int, frame: Any) -> None:
        if callable(self._previous):
            self._previous(number, frame)
        self.raise_if_due()


class _OtherThread(_Stack):
    """Struck by an exception that CPython raises at one of its next bytecodes.

    What was sent and did not come before the section ended is taken back.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._ident = ctypes.c_ulong(threading.get_ident())
        self._sent = False

    def strike(self) -> None:
        with self._lock:
            body = self.due()
            if body is not None:
                self._sent = True
                self._raise_in_thread(ctypes.py_object(body.error_class()))

    def enter(self, section: Body | None) -> None:
        with self._lock:
            super().enter(section)
            self._take_back()

    def leave(self, depth: int) -> None:
        with self._lock:
            super().leave(depth)
            self._take_back()

    def _take_back(self) -> None:
        if self._sent:
            self._raise_in_thread(None)
            self._sent = False

    def _raise_in_thread(self, error: Any) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(self._ident, error)


class _Greenlet(_Stack):
    """Struck by gevent's hub, between whose callbacks nothing else runs."""

    def __init__(self) -> None:
        super().__init__()
        import gevent

        self._hub = gevent.get_hub()
        self._greenlet = gevent.getcurrent()

    def strike(self) -> None:
        self._hub.loop.run_callback_threadsafe(self._throw)

    def _throw(self) -> None:
        body = self.due()
        if body is not None:
            self._greenlet.throw(body.error())


def _make_stack() -> _Stack:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        return _Greenlet()
    # Without the signal, on Windows, a main thread is struck as the others are.
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
    """In a forked child: it is in none of its parent's sections."""
    global _local
    _local = threading.local()


os.register_at_fork(after_in_child=_forget)
