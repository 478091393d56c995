"""A thread that wakes when the earliest of some moments comes.

What is shorter than the wait is gone when it looks: it wakes once a wait for all of that together,
and sleeps for good when a wait passed without any. To wake it for each short run would cost each
two switches between threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Set
from typing import Generic, TypeVar

from .lease import clock

T = TypeVar("T")

#: Seconds.
SHORTEST_WAIT = 0.05


class Alarm(Generic[T]):
    """Calls back with those things whose moments have come.

    :param name: the thread's.
    :param things: watched over, and changed by others, under the lock.
    :param moment: when a thing is due, on :func:`~celery_singleton_state.lease.clock`.
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
        #: Whether there was anything since it last looked, and the shortest wait of all.
        self._used = False
        self._wait = float("inf")
        self._thread: threading.Thread | None = None
        self._closed = False

    def expect(self, thing: T) -> None:
        """See to it that a new thing is not slept through. The caller holds the lock."""
        moment = self._moment(thing)
        self._used = True
        self._wait = min(self._wait, max(moment - clock(), SHORTEST_WAIT))
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        elif moment < self._wakes_at:
            self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._wait_until_due():
                    return
                due = [thing for thing in self._things if self._moment(thing) <= clock()]
            if due:
                self._ring(due)

    def _wait_until_due(self) -> bool:
        while not self._closed:
            self._wakes_at = self._next_look()
            delay = self._wakes_at - clock()
            if delay <= 0:
                return True
            self._changed.wait(None if delay == float("inf") else delay)
        return False

    def _next_look(self) -> float:
        if self._things:
            return min(map(self._moment, self._things))
        self._used, was_used = False, self._used
        return clock() + self._wait if was_used else float("inf")
