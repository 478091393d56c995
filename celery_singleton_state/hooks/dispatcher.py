"""The one door: what happens is told here, and handed to all who look on.

Who tells is in mid-run, and must neither wait nor fail. So the details only join a queue, and a
thread hands them on, in order; it sleeps a little first, so that a burst of short runs wakes it
once. A queue that grows over its limit loses what is newest, and says so.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from celery import signals as celery_signals
from kombu.utils.imports import symbol_by_name

from celery_singleton_state.text.visible import logger_of

from . import log
from .details import Details
from .events import EventsHook, switch
from .signals import SIGNALS, SignalsHook

if TYPE_CHECKING:
    from celery import Celery

logger = logger_of(__name__)

#: Seconds that the first details of a burst wait for the others.
GATHER = 0.05
#: Details that wait at most.
LIMIT = 10_000
#: Seconds that the process's end waits for them.
PATIENCE = 5.0


class Hook(Protocol):
    """Looks on: called with each details object, in order, in a thread of its own.

    What it raises is logged. A slow one delays the other hooks and no run.
    """

    def __call__(self, details: Details, /) -> object: ...


class Dispatcher:
    """Where one app's process tells what happens.

    :param names: hooks of users, each a callable or the name of one; a class is instantiated, in
        each process that uses it.
    """

    def __init__(self, app: Celery, names: Sequence[str | Hook] = ()) -> None:
        self._app = weakref.ref(app)
        self._names = names
        self._signals = SignalsHook()
        self._events = EventsHook(app)
        self._hooks: list[Hook] | None = None
        self._waiting: deque[Details] = deque()
        self._dropped = 0
        #: Whether the thread has been called since it last looked. It is called by a queue in C,
        #: because whoever tells can be interrupted at any moment, and must leave no lock behind.
        self._is_called = False
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def emit(
        self, singleton: str, key: str, task_id: str | None, kind: type[Details], **fields: Any
    ) -> None:
        """Something happened to a singleton. Never waits, never raises.

        The arguments are those of the details object, which is made only if anybody looks on.
        """
        level, signal = log.LEVELS.get(kind), SIGNALS.get(kind)
        is_logged = level is not None and log.logger.isEnabledFor(level)
        is_wanted = self._names or (signal is not None and signal.receivers) or switch[0]
        if not (is_logged or is_wanted):
            return
        details = kind(singleton=singleton, key=key, task_id=task_id, **fields)
        if is_logged:
            log.write(details)
        if not is_wanted:
            return
        if len(self._waiting) >= LIMIT:
            self._dropped += 1
            return
        self._waiting.append(details)
        if not self._is_called:
            self._is_called = True
            self._calls.put(None)
            if self._thread is None:
                self._start()

    def publish(self, details: Details) -> None:
        """Tell it here and now, and as an event whatever the switch says: for a command's end."""
        log.write(details)
        self._call(self._signals, details)
        for hook in self._users_hooks():
            self._call(hook, details)
        self._call(self._events, details)
        self._events.flush()
        self._events.close()

    def close(self) -> None:
        """Hand on what waits, for a few seconds at most, and end the thread."""
        self._closed.set()
        self._calls.put(None)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(PATIENCE)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and not self._closed.is_set():
                thread = threading.Thread(target=self._run, name="singleton-hooks", daemon=True)
                thread.start()
                self._thread = thread
                _open.add(self)

    # -- in the thread

    def _run(self) -> None:
        while not self._closed.is_set():
            self._calls.get()
            self._closed.wait(GATHER)
            self._is_called = False
            self._hand_on()
        # What came while the last ones were handed on.
        self._hand_on()
        self._events.close()

    def _hand_on(self) -> None:
        hooks: list[Hook] = [self._signals, *self._users_hooks()]
        while self._waiting:
            details = self._waiting.popleft()
            for hook in hooks:
                self._call(hook, details)
            if switch[0]:
                self._call(self._events, details)
        self._events.flush()
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            logger.warning("singletons: hooks are too slow, and were not told %d things", dropped)

    def _users_hooks(self) -> list[Hook]:
        if self._hooks is None:
            self._hooks = [hook for hook in map(_made, self._names) if hook is not None]
        return self._hooks

    def _call(self, hook: Hook, details: Details) -> None:
        try:
            hook(details)
        except Exception:
            logger.exception("singletons: a hook failed: %r", hook)


def check_hook(value: Any) -> Any:
    """:raises ValueError: it is neither a callable nor the name of one."""
    try:
        found = symbol_by_name(value)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"callables, or the names of some: {error}") from None
    if not callable(found):
        raise ValueError(f"callables, or the names of some; {value!r} is none")
    return value


def _made(name: str | Hook) -> Hook | None:
    try:
        found: Any = symbol_by_name(name) if isinstance(name, str) else name
        made: Hook = found() if isinstance(found, type) else found
        return made
    except Exception:
        logger.exception("singletons: hook %r cannot be used", name)
        return None


_open: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def _close_all(**_: Any) -> None:
    for dispatcher in list(_open):
        dispatcher.close()


# A child's copies of its parent's doors have no thread, and locks in whatever state.
os.register_at_fork(after_in_child=_open.clear)
# A process of a prefork pool ends without what Python does at exit.
celery_signals.worker_process_shutdown.connect(_close_all)
atexit.register(_close_all)
