"""Share one result among all requests that wait for it.

A request that arrives while the work is in progress waits until the work has been done once more,
and shares that result with all other waiting requests. So a request never gets a result whose work
began before the request arrived. If the store hangs, 300 requests wait for two snapshots and not
for 300. And 60 scrapes at once take the memory and the processor time of two scrapes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from celery_singleton_state.lease.lease import clock

#: The longest time, in seconds, that a request waits while the work is done for other requests. The
#: store's time limits are shorter.
PATIENCE = 60.0
#: How many results are kept at most, one for each kind of request. When there are more, the result
#: that was computed longest ago is dropped.
KINDS = 8

T = TypeVar("T")


class NotNow(Exception):
    """A request gets no result now. The exception's text tells the client why."""


@dataclass(frozen=True, slots=True)
class _Done(Generic[T]):
    began_at: float
    result: Future[T]


class Shared(Generic[T]):
    """Does one piece of work at a time, and shares each result among the requests that wait for it.

    :param room: a semaphore that limits how many requests may wait or work. Several objects may
        share it. Default: no limit.
    """

    def __init__(self, room: threading.Semaphore | None = None) -> None:
        self._room = room
        self._lock = threading.Lock()
        #: Maps each kind to its last result, which waiting requests may still use.
        self._last: dict[Hashable, _Done[T]] = {}

    def get(
        self, kind: Hashable, work: Callable[[], T], is_wanted: Callable[[], bool] = lambda: True
    ) -> T:
        """Return the result of the work, or raise its error. Errors are shared like results.

        :param kind: identifies the result: requests with equal kinds share one result.
        :param is_wanted: a function that returns whether the client still waits. It is called if
            the request has waited, before the work is done for it.
        :raises NotNow: too many other requests wait, the wait takes too long, or the client no
            longer waits.
        """
        asked_at = clock()
        if self._room is not None and not self._room.acquire(blocking=False):
            raise NotNow("too many requests wait")
        try:
            return self._result(kind, work, is_wanted, asked_at).result()
        finally:
            if self._room is not None:
                self._room.release()

    def _result(
        self, kind: Hashable, work: Callable[[], T], is_wanted: Callable[[], bool], asked_at: float
    ) -> Future[T]:
        has_waited = not self._lock.acquire(blocking=False)
        if has_waited and not self._lock.acquire(timeout=PATIENCE):
            raise NotNow("too many requests wait, and the work for others takes too long")
        try:
            last = self._last.get(kind)
            if last is None or last.began_at < asked_at:
                if has_waited and not is_wanted():
                    raise NotNow("the client has closed its side of the connection")
                last = self._do(kind, work)
            return last.result
        finally:
            self._lock.release()

    def _do(self, kind: Hashable, work: Callable[[], T]) -> _Done[T]:
        # Drop the old result first, so that memory never holds the old and the new one together.
        self._last.pop(kind, None)
        done: _Done[Any] = _Done(clock(), Future())
        try:
            done.result.set_result(work())
        except Exception as error:
            done.result.set_exception(error)
        self._last[kind] = done
        while len(self._last) > KINDS:
            del self._last[next(iter(self._last))]
        return done
