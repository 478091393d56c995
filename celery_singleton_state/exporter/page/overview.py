"""Read the status page's contents from the store: the singletons, worst first, and the schedule."""

from __future__ import annotations

import time
from collections.abc import Callable

from celery_singleton_state import history
from celery_singleton_state.beat.entry_state import EntryState, decode_rows
from celery_singleton_state.beat.leader import Leader
from celery_singleton_state.exporter.snapshot import Snapshot
from celery_singleton_state.health import SingletonHealth
from celery_singleton_state.runtime import Runtime
from celery_singleton_state.store.base import Listed, StoreError
from celery_singleton_state.text.visible import as_printed

from .model import FAILING, Page, ShownBeat, ShownSingleton

#: The most singletons, and the most schedule entries, that the page shows.
SHOWN, UPCOMING = 200, 8


class Overview:
    """Reads the status page's contents from the store.

    With one store, a page takes three statements: for the rows, for the histories and states of the
    singletons that the page shows, and for the schedule.

    :param take_snapshot: reads the rows; called for each page.
    :param shows_state: whether the page shows the singletons' states.
    """

    def __init__(
        self, runtime: Runtime, take_snapshot: Callable[[], Snapshot], shows_state: bool
    ) -> None:
        self._runtime = runtime
        self._take_snapshot = take_snapshot
        self._shows_state = shows_state
        self._leader = Leader(runtime.app)

    def page(self, query: str) -> Page:
        """Return the page's contents, with the singletons whose names contain the query."""
        seen = self._take_snapshot()
        try:
            return self._page(query, seen, self._shown(query, seen), self._beat(seen))
        except StoreError as error:
            return self._page(query, seen, (), None, str(error))

    def _page(
        self,
        query: str,
        seen: Snapshot,
        shown: tuple[ShownSingleton, ...],
        beat: ShownBeat | None,
        error: str | None = None,
    ) -> Page:
        rows = list(seen.rows.values())
        found = seen.health.singletons
        return Page(
            app=str(self._runtime.app.main or "celery"),
            now=max((row.read_at for row in rows), default=time.time()),
            shown=shown,
            total=sum(_matches(query, each.singleton) for each in found),
            running=sum(row.held and not row.in_hold_period for row in rows),
            unhealthy=sum(not each.healthy for each in found),
            query=query,
            beat=beat,
            error=error or seen.health.error,
        )

    def _shown(self, query: str, seen: Snapshot) -> tuple[ShownSingleton, ...]:
        matching = [each for each in seen.health.singletons if _matches(query, each.singleton)]
        matching.sort(key=lambda each: _rank(each, seen.rows.get(each.singleton)))
        chosen = matching[:SHOWN]
        rows = [row for each in chosen if (row := seen.rows.get(each.singleton))]
        contents: dict[str, tuple[str | None, str | None]] = {}
        for store, keys in self._runtime.by_store({row.key: row.task for row in rows}):
            contents |= store.contents(list(keys), self._shows_state)
        return tuple(_show(each, seen.rows.get(each.singleton), contents) for each in chosen)

    def _beat(self, seen: Snapshot) -> ShownBeat | None:
        row = seen.leader
        if row is None:
            return None
        states = sorted(decode_rows(self._leader.load()).values(), key=_by_tick)
        return ShownBeat(
            name=self._leader.name,
            leader=row.holder if row.held else None,
            fence=row.fence,
            leads_since=row.acquired_at if row.held else None,
            upcoming=tuple(state for state in states if state.next_tick)[:UPCOMING],
            entries=len(states),
        )


def _matches(query: str, name: str) -> bool:
    """Return whether a singleton's name contains the query, ignoring upper and lower case.

    The query can match the name as it is, or the name as the page prints it, with escapes.
    """
    return query.lower() in name.lower() or query.lower() in as_printed(name).lower()


def _show(
    health: SingletonHealth,
    row: Listed | None,
    contents: dict[str, tuple[str | None, str | None]],
) -> ShownSingleton:
    past, value = contents.get(row.key, (None, None)) if row else (None, None)
    return ShownSingleton(health, row, history.decode(past, health.singleton), value)


def _rank(health: SingletonHealth, row: Listed | None) -> tuple[bool, bool, bool, str]:
    """Return the key by which singletons are sorted on the page.

    Late singletons come first, then singletons that are failing or whose lease has expired, then
    running singletons, then all others. Singletons of equal rank are sorted by name.
    """
    has_expired = row is not None and row.holder is not None and not row.held
    failed = row is not None and row.last_outcome in FAILING
    runs = row is not None and row.held
    return health.healthy, not (failed or has_expired), not runs, health.singleton


def _by_tick(state: EntryState) -> tuple[bool, float]:
    moment = state.next_tick
    return moment is None, moment.timestamp() if moment else 0.0
