"""Dispatch events: a run emits an event, and a thread calls the hooks with it.

A run that emits an event must neither wait nor fail because of a hook. So the run only appends the
details to a queue, and a thread passes them to the hooks in order. The thread sleeps for a moment
before it reads the queue, so that a burst of short runs wakes it once. If the queue is full, the
newest events are dropped, and a warning is logged.
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

#: Seconds for which the thread sleeps after the first event, to handle a burst of events at once.
GATHER = 0.05
#: How many events the queue holds at most. Further events are dropped, with a warning.
LIMIT = 10_000
#: Seconds for which the end of the process waits for the queue to be emptied.
PATIENCE = 5.0


class Hook(Protocol):
    """A user's hook: a callable that gets the details of each event, in order.

    All hooks are called in one thread of their own. An error that a hook raises is logged. A slow
    hook delays the other hooks, but no run.
    """

    def __call__(self, details: Details, /) -> object: ...


class Dispatcher:
    """Emits the events of one app's singletons in this process.

    :param app: the Celery app.
    :param names: the users' hooks, each as a callable or as the dotted name of a callable. A class
        is instantiated once in each process. Left out: no hooks.
    """

    def __init__(self, app: Celery, names: Sequence[str | Hook] = ()) -> None:
        self._app = weakref.ref(app)
        self._names = names
        self._signals = SignalsHook()
        self._events = EventsHook(app)
        self._hooks: list[Hook] | None = None
        self._waiting: deque[Details] = deque()
        self._dropped = 0
        #: Whether the thread has been woken and has not read the queue since. A ``SimpleQueue``
        #: wakes the thread, because ``put`` is C code: an interruption of the emitting run cannot
        #: stop ``put`` half-way and leave a lock held.
        self._is_called = False
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def emit(
        self, singleton: str, key: str, task_id: str | None, kind: type[Details], **fields: Any
    ) -> None:
        """Emit an event: write its log line now, and queue its details for the hooks.

        The method never waits for a hook and never raises a hook's error. It creates no details
        object if there is no log line, hook, receiver of a signal, or event to be sent.

        :param singleton: the name of the task.
        :param key: the name of the singleton.
        :param task_id: the task id of the message; ``None`` for a direct call.
        :param kind: the class of the details.
        :param fields: the further fields of that class.
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
        """Log an event, call all hooks and send it as a Celery event, all before returning.

        A command uses this method just before it ends. The Celery event is sent even if Celery's
        switch for events is off.
        """
        log.write(details)
        self._call(self._signals, details)
        for hook in self._users_hooks():
            self._call(hook, details)
        self._call(self._events, details)
        self._events.flush()
        self._events.close()

    def close(self) -> None:
        """Empty the queue and end the thread; wait no longer than :data:`PATIENCE` seconds."""
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
            self._call_hooks()
        # Empty the queue once more: events can have come while the loop handled its last ones.
        self._call_hooks()
        self._events.close()

    def _call_hooks(self) -> None:
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
            logger.warning(
                "singletons: %d events were dropped, because the hooks are too slow and more than"
                " %d events were waiting for them",
                *(dropped, LIMIT),
            )

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
    """Check one item of the setting ``singleton_hooks``, and return it unchanged.

    :param value: a callable, or the dotted name of one.
    :raises ValueError: the value is not callable, or the name cannot be imported.
    """
    try:
        found = symbol_by_name(value)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"callables, or the dotted names of callables: {error}") from None
    if not callable(found):
        raise ValueError(f"callables, or the dotted names of callables; {value!r} is not callable")
    return value


def _made(name: str | Hook) -> Hook | None:
    try:
        found: Any = symbol_by_name(name) if isinstance(name, str) else name
        made: Hook = found() if isinstance(found, type) else found
        return made
    except Exception:
        logger.exception(
            "singletons: the hook %r of singleton_hooks cannot be used, and is not called", name
        )
        return None


_open: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def _close_all(**_: Any) -> None:
    for dispatcher in list(_open):
        dispatcher.close()


# After a fork, the child's copy of a dispatcher has no thread, and its locks may be held for ever.
# So the child must not close the dispatchers of its parent.
os.register_at_fork(after_in_child=_open.clear)
# Python calls no ``atexit`` functions in the processes of a prefork pool, so Celery's signal closes
# the dispatchers there.
celery_signals.worker_process_shutdown.connect(_close_all)
atexit.register(_close_all)
