"""What the store tells at a scrape: leases, ages, last runs, health, and who leads beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from celery_singleton_state import history
from celery_singleton_state.config.options import options_of
from celery_singleton_state.history import Outcome
from celery_singleton_state.runtime import Runtime
from celery_singleton_state.store.base import Listed
from celery_singleton_state.text.visible import as_printed

from .labels import OTHERS, UNKNOWN, Keys, known_tasks
from .snapshot import Snapshot


@dataclass(slots=True)
class Sums:
    """What the rows of one task, or of one key, come to.

    A moment is the newest of theirs, an age the largest.
    """

    rows: int = 0
    held: int = 0
    unhealthy: int = 0
    expected_interval: float | None = None
    last_execution: float = 0.0
    last_success: float = 0.0
    heartbeat_age: float = 0.0
    running: float = 0.0

    def add(self, row: Listed | None, healthy: bool, ttl: float) -> None:
        self.unhealthy += not healthy
        if row is None:
            return
        self.rows += 1
        self.last_execution = _larger(self.last_execution, row.last_finished_at or 0.0)
        self.last_success = _larger(self.last_success, last_success(row))
        if row.held and row.acquired_at is not None:
            self.held += 1
            self.heartbeat_age = _larger(self.heartbeat_age, ttl - (row.expires_in or 0.0))
            self.running = _larger(self.running, row.read_at - row.acquired_at)


def _larger(one: float, other: float) -> float:
    """The larger number; one odd row must not hide with an infinity what the others come to."""
    return max(one, other) if math.isfinite(other) else one


#: Name, help, and the value of each gauge; it is left out where that is ``None``.
GAUGES: tuple[tuple[str, str, Callable[[Sums], float | None]], ...] = (
    ("singleton_keys", "Singletons that the task has, one for each key.", lambda s: s.rows),
    ("singleton_leases_held", "Leases that are held by a run now.", lambda s: s.held),
    ("singleton_unhealthy_keys", "Singletons that are not healthy.", lambda s: s.unhealthy),
    ("singleton_healthy", "Whether all singletons of the task are healthy: 1 or 0.",
     lambda s: not s.unhealthy),
    ("singleton_expected_interval_seconds", "Seconds between runs as the task expects them.",
     lambda s: s.expected_interval),
    ("singleton_last_execution_timestamp_seconds", "When the last run ended, since the epoch.",
     lambda s: s.last_execution or None),
    ("singleton_last_success_timestamp_seconds",
     "When the last run that succeeded ended, since the epoch.", lambda s: s.last_success or None),
    ("singleton_heartbeat_age_seconds", "Since the oldest renewal of a lease that is held.",
     lambda s: s.heartbeat_age),
    ("singleton_running_seconds", "Since the longest run that is active began.",
     lambda s: s.running),
)  # fmt: skip


class Gauges(Collector):
    """Asks the store at each scrape, with one statement.

    :param look: looks at the store, at each scrape.
    :param broker_is_up: whether events are received.
    """

    def __init__(
        self,
        runtime: Runtime,
        take_snapshot: Callable[[], Snapshot],
        broker_is_up: Callable[[], bool],
        per_key: bool = False,
    ) -> None:
        self._runtime = runtime
        self._take_snapshot = take_snapshot
        self._broker_is_up = broker_is_up
        self._per_key = per_key
        #: Tasks that have had the warning of too many keys.
        self._warned: set[str] = set()

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing: to be asked at registration would be a look at the store."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        seen = self._take_snapshot()
        yield _one("singleton_store_up", "Whether the store answers.", seen.health.error is None)
        yield _one("singleton_broker_up", "Whether events are received.", self._broker_is_up())
        if seen.health.error is not None:
            return
        yield from self._of_beat(seen)
        yield from self._of_tasks(seen)

    def _of_beat(self, seen: Snapshot) -> Iterator[GaugeMetricFamily]:
        row = seen.leader
        leads = row is not None and row.held
        family = GaugeMetricFamily(
            "singleton_beat_leading", "Whether a beat leads: 1 or 0.", labels=("beat",)
        )
        family.add_metric((as_printed(self._runtime.settings.beat_name),), float(leads))
        if row is not None:
            yield family
            yield _one("singleton_beat_fence", "Fence of the beats' lease.", row.fence)

    def _of_tasks(self, seen: Snapshot) -> Iterator[GaugeMetricFamily]:
        sums: dict[tuple[str, ...], Sums] = {}
        keys = Keys(self._runtime.settings.key_prefix, warned=self._warned)
        tasks = known_tasks(self._runtime.app)
        for each in seen.health.singletons:
            is_known = each.task in tasks
            labels: tuple[str, ...] = (as_printed(each.task) if is_known else UNKNOWN,)
            if self._per_key:
                key = keys.label(each.task, each.singleton) if is_known else OTHERS
                labels = (*labels, key)
            row = seen.rows.get(each.singleton)
            found = sums.setdefault(labels, Sums(expected_interval=self._expected(each.task)))
            found.add(row, each.healthy, self._ttl(each.task))
        names = ("singleton", "key") if self._per_key else ("singleton",)
        for name, text, value in GAUGES:
            family = GaugeMetricFamily(name, text, labels=names)
            for labels, found in sums.items():
                if (number := value(found)) is not None:
                    family.add_metric(labels, float(number))
            yield family

    def _expected(self, task: str) -> float | None:
        own = options_of(self._runtime.app.tasks.get(task))
        return own.expected_interval if own else None

    def _ttl(self, task: str) -> float:
        own = options_of(self._runtime.app.tasks.get(task))
        return (own.lease_ttl if own else None) or self._runtime.settings.lease_ttl


def _one(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))


def last_success(row: Listed) -> float:
    """When the last run that succeeded ended, as far as the history goes back; 0 if none did."""
    if row.last_outcome == Outcome.SUCCEEDED:
        return row.last_finished_at or 0.0
    runs = history.decode(row.history, row.key)
    return max((run.finished for run in runs if run.outcome == Outcome.SUCCEEDED), default=0.0)
