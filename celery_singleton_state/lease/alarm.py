"""A thread that wakes when the earliest of some moments comes.

What is shorter than the wait is gone when it looks. It then lingers, looking now and then, and
sleeps for good only when nothing came in between: to wake it for each short run would cost each two
switches between threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Set
from typing import Generic, TypeVar

from .lease import clock

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Seconds that a thread waits after an error before it looks again.
AFTER_ERROR = 0.1
#: Seconds between two looks while there is nothing to wait for.
LINGER = 1.0


class Alarm(Generic[T]):
    """Calls back with those things whose moments have come.

    :param name: the thread's.
    :param things: watched over, and changed by others, under the lock.
    :param moment: when a thing is due, on :func:`~celery_singleton_state.lease.lease.clock`.
    :param ring: called in the thread, without the lock; a due thing it leaves as it was comes
        again at once.
    """

    def __init__(
        self,
        name: str,
        lock: threading.Lock,
        things: Set[T],
        moment: Callable[[T], float],
        ring: Callable[[list[T]], None],
    ) -> None:
        self._name = name
        self._changed = threading.Condition(lock)
        self._things = things
        self._moment = moment
        self._ring = ring
        self._wakes_at = float("inf")
        #: Whether there was anything since it last looked.
        self._used = False
        self._thread: threading.Thread | None = None
        self._closed = False

    def expect(self, thing: T) -> None:
        """See to it that a new thing is not slept through. The caller holds the lock."""
        self._used = True
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        elif self._moment(thing) < self._wakes_at:
            self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        try:
            while due := self._wait_until_due():
                try:
                    self._ring(due)
                except Exception:  # whatever it is, the other things still need this thread
                    logger.exception("singletons: thread %s goes on", self._name)
                    time.sleep(AFTER_ERROR)
        finally:
            with self._changed:
                self._thread = None

    def _wait_until_due(self) -> list[T]:
        """What is due, as soon as anything is; nothing when it was closed."""
        with self._changed:
            while not self._closed:
                due = [thing for thing in self._things if self._moment(thing) <= clock()]
                if due:
                    return due
                self._wakes_at = self._next_look()
                forever = self._wakes_at == float("inf")
                # Not for longer, because the wait's clock stands still while the host is suspended.
                left = min(self._wakes_at - clock(), LINGER)
                self._changed.wait(None if forever else left)
            return []

    def _next_look(self) -> float:
        if self._things:
            return min(map(self._moment, self._things))
        self._used, was_used = False, self._used
        return clock() + LINGER if was_used else float("inf")
