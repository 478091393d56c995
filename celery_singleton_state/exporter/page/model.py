"""What the page is given to show; how it came to be known is none of the page's business."""

from __future__ import annotations

from dataclasses import dataclass

from celery_singleton_state import history
from celery_singleton_state.beat.entry_state import EntryState
from celery_singleton_state.health import SingletonHealth
from celery_singleton_state.store.base import Listed


@dataclass(frozen=True, slots=True)
class ShownSingleton:
    """One singleton.

    :param row: ``None`` for one that never ran and has none.
    :param runs: the last runs, oldest first, as far as they were asked for.
    :param value: the state as JSON, only where the operator asked for it to be shown.
    """

    health: SingletonHealth
    row: Listed | None
    runs: tuple[history.Entry, ...]
    value: str | None = None


@dataclass(frozen=True, slots=True)
class ShownBeat:
    """The schedule and who leads it.

    :param leader: the holder of the beat lease, ``None`` when nobody leads.
    :param leads_since: seconds since the epoch.
    :param upcoming: the entries that are due next, soonest first.
    :param entries: how many there are in all.
    """

    name: str
    leader: str | None
    fence: int
    leads_since: float | None
    upcoming: tuple[EntryState, ...]
    entries: int


@dataclass(frozen=True, slots=True)
class Page:
    """All that one answer shows.

    :param now: seconds since the epoch by the store's clock.
    :param shown: the singletons that are drawn, worst first.
    :param total: how many there are that match the query.
    :param running, unhealthy: of all, whether they match or not.
    :param query: what the visitor typed into the filter.
    :param error: why nothing is known, where the store is out of reach.
    :param refresh: seconds between two looks.
    """

    app: str
    now: float
    shown: tuple[ShownSingleton, ...]
    total: int
    running: int
    unhealthy: int
    query: str
    beat: ShownBeat | None
    error: str | None
    refresh: int = 5
