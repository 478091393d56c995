"""The gauges that are read from the store at each scrape.

They show leases, ages, last runs, health, and whether a beat leads.
"""

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
    """The values of the gauges for all rows of one task, or for the row of one key.

    Numbers of rows are added up. A time is the newest of all rows, and an age is the largest.
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
    """Return the larger number, but ignore ``other`` if it is not finite.

    Otherwise one corrupt row with an infinite time would hide the values of all other rows.
    """
    return max(one, other) if math.isfinite(other) else one


#: For each gauge its name, its help text, and a function that returns the gauge's value. If the
#: value is ``None``, the gauge is left out of the exposition.
GAUGES: tuple[tuple[str, str, Callable[[Sums], float | None]], ...] = (
    ("singleton_keys", "Singletons of the task, one for each key.", lambda s: s.rows),
    ("singleton_leases_held", "Leases that are held now.", lambda s: s.held),
    ("singleton_unhealthy_keys", "Singletons that are not healthy.", lambda s: s.unhealthy),
    ("singleton_healthy", "Whether all singletons of the task are healthy: 1 or 0.",
     lambda s: not s.unhealthy),
    ("singleton_expected_interval_seconds", "The task's option expected_interval, in seconds.",
     lambda s: s.expected_interval),
    ("singleton_last_execution_timestamp_seconds",
     "When the last run ended, in seconds since the epoch.", lambda s: s.last_execution or None),
    ("singleton_last_success_timestamp_seconds",
     "When the last successful run ended, in seconds since the epoch.",
     lambda s: s.last_success or None),
    ("singleton_heartbeat_age_seconds",
     "Seconds since the last renewal; the largest of all held leases.", lambda s: s.heartbeat_age),
    ("singleton_running_seconds", "Seconds since the oldest active run began.",
     lambda s: s.running),
)  # fmt: skip


class Gauges(Collector):
    """The collector of all gauges. It takes one snapshot of the store for each scrape.

    :param take_snapshot: reads the store; called at each scrape.
    :param broker_is_up: a function that returns whether events are received.
    :param per_key: whether each singleton has series of its own. Default: the singletons of a task
        share one set of series.
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
        #: Tasks that the log has warned of because of too many keys. Each is logged only once.
        self._warned: set[str] = set()

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing, so that no registry reads the store when this collector is registered.

        A registry with ``auto_describe`` would call ``collect`` if this method were missing.
        """
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
            yield _one("singleton_beat_fence", "The fence of the leader's lease.", row.fence)

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
    """Return when a row's last successful run ended, in seconds since the epoch.

    0 if neither the row's last run nor a run in its history was successful.
    """
    if row.last_outcome == Outcome.SUCCEEDED:
        return row.last_finished_at or 0.0
    runs = history.decode(row.history, row.key)
    return max((run.finished for run in runs if run.outcome == Outcome.SUCCEEDED), default=0.0)
