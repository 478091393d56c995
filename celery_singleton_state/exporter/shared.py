"""One piece of work for all requests that need its result at one time.

A request that comes while the work is under way waits for the next time, and shares it with all
requests that wait. They get nothing that is older than themselves. So 300 requests that meet a
store that hangs wait for two looks at it and not for 300, and 60 scrapes of a large exposition take
the memory and the processor time of two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from celery_singleton_state.lease.lease import clock

#: Seconds that a request waits for the work of others. The store's own time limits end earlier.
PATIENCE = 60.0
#: Results that are kept, of the kinds that were asked for last.
KINDS = 8

T = TypeVar("T")


class NotNow(Exception):
    """The work was not done for a request; the message says why, for its client."""


@dataclass(frozen=True, slots=True)
class _Done(Generic[T]):
    began_at: float
    result: Future[T]


class Shared(Generic[T]):
    """Does one piece of work at a time, of any kind.

    :param room: requests that may wait or work, taken together with those of others who have the
        same semaphore. Left out: any number.
    """

    def __init__(self, room: threading.Semaphore | None = None) -> None:
        self._room = room
        self._lock = threading.Lock()
        #: The last result of each kind, which requests may still wait for.
        self._last: dict[Hashable, _Done[T]] = {}

    def get(
        self, kind: Hashable, work: Callable[[], T], is_wanted: Callable[[], bool] = lambda: True
    ) -> T:
        """The result of the work, or what it raised: an error is shared as well.

        :param kind: what makes a result the same for another request.
        :param is_wanted: asked after a wait, before the work is done.
        :raises NotNow: too many others wait, it takes too long, or it is not wanted any more.
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
        # What is to be replaced need not be in memory beside what replaces it.
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
