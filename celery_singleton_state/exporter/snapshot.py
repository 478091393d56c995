"""One look at the store: what it holds of all singletons, and of the beats' lease."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from celery_singleton_state.beat.leader import key_of
from celery_singleton_state.health import Health, judge
from celery_singleton_state.lease.lease import clock
from celery_singleton_state.runtime import Runtime
from celery_singleton_state.store.base import Listed, StoreError


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen; one statement.

    :param rows: of the singletons, by name.
    :param leader: the row of the beats' lease, if any beat ever led.
    :param health: its ``error`` says why nothing was seen.
    """

    rows: dict[str, Listed]
    leader: Listed | None
    health: Health


class SharedLook:
    """Looks at the store for any number of requests at one time.

    A request that comes while a look is under way waits for the next look, and shares it with all
    requests that wait: they see nothing that is older than themselves, and 300 requests that meet
    a store that hangs wait for two looks and not for 300.
    """

    def __init__(self, take: Callable[[], Look]) -> None:
        self._take = take
        self._lock = threading.Lock()
        self._began_at = 0.0
        self._last: Future[Look] = Future()

    def __call__(self) -> Look:
        asked_at = clock()
        with self._lock:
            if not self._last.done() or self._began_at < asked_at:
                self._began_at, self._last = clock(), self._taken()
            last = self._last
        return last.result()

    def _taken(self) -> Future[Look]:
        """A look, or what it raised: an error is shared as well."""
        future: Future[Look] = Future()
        try:
            future.set_result(self._take())
        except Exception as error:
            future.set_exception(error)
        return future


def look(runtime: Runtime) -> Look:
    """Look now. A store that is out of reach is an answer, too."""
    prefix = runtime.settings.key_prefix
    beat = key_of(runtime.settings.beat_name)
    try:
        found = runtime.rows(prefix, also=beat)
    except StoreError as error:
        return Look({}, None, Health((), str(error)))
    rows = [row for row in found if row.key.startswith(prefix)]
    leader = next((row for row in found if row.key == beat), None)
    named = {row.key.removeprefix(prefix): row for row in rows}
    return Look(named, leader, judge(runtime, rows))
