"""The hook that counts events as Prometheus counters and a histogram, labelled by task.

The exporter calls this hook with the workers' events, because Prometheus cannot scrape the
processes of a prefork pool. A worker that is a single process can use this hook like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from celery_singleton_state.config.options import POLICIES
from celery_singleton_state.errors import SingletonErrorReason
from celery_singleton_state.history import Outcome
from celery_singleton_state.hooks import (
    Conflicted,
    Details,
    Failed,
    Lost,
    Released,
    Skipped,
    StateLoaded,
    StateSaved,
    TookOver,
    WriteRefused,
)
from celery_singleton_state.text.visible import as_printed

from .labels import OTHERS, UNKNOWN, Keys, bounded

#: The names of the operations that write a state.
WRITES = ("save", "checkpoint", "transaction")
#: The names of the operations that the store can refuse as stale.
REFUSED = (*WRITES, "release")
#: The names of the ways in which a run takes over a lease.
TAKEOVERS = ("expired", "died", "handoff")
OUTCOMES = frozenset(Outcome)
REASONS = frozenset(SingletonErrorReason)
#: Upper bounds of the histogram's buckets, in seconds: runs take from milliseconds to hours.
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0)
#: The longest duration that is counted, in seconds: a year. An event with a longer duration must be
#: forged, so it is ignored.
LONGEST = 366 * 86_400.0


class Counts:
    """A hook that counts events in the counters and the histogram of one registry.

    :param per_key: whether each singleton of a task has series of its own, labelled ``key``.
        Default: the singletons of a task are counted together, because a task may have any number
        of singletons.
    :param tasks: the names of the tasks that have series of their own. These series begin at 0,
        so that ``increase()`` sees the first event. All other tasks are counted together.
        Default: every task has series of its own, which suits a hook in a worker's process.
    :param keys: decides which singletons' keys have series of their own, if ``per_key`` is true.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        per_key: bool = False,
        tasks: Collection[str] | None = None,
        keys: Keys | None = None,
    ) -> None:
        self._per_key = per_key
        self._tasks = tasks
        self._keys = keys or Keys()
        labels = ("singleton", "key") if per_key else ("singleton",)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, (*labels, *more), registry=registry)

        self._durations = Histogram(
            "singleton_duration_seconds",
            "How long runs took, in seconds.",
            # The histogram is never labelled by key, because it has 16 series for each label value.
            ("singleton",),
            registry=registry,
            buckets=BUCKETS,
        )
        self._executions = counter(
            "singleton_executions_total", "Deliveries that ended, by outcome.", "outcome"
        )
        self._errors = counter(
            "singleton_state_errors_total", "Singleton errors of deliveries, by reason.", "reason"
        )
        self._operations = counter(
            "singleton_state_operations_total",
            "Loads and writes of states, by operation.",
            "operation",
        )
        self._conflicts = counter(
            "singleton_conflicts_total", "Deliveries that found the lease taken.", "policy"
        )
        self._takeovers = counter(
            "singleton_takeovers_total",
            "Runs that took the lease over from a run that did not end by itself.",
            "how",
        )
        self._lost = counter("singleton_lost_leases_total", "Runs that lost their lease.")
        self._refused = counter(
            "singleton_refused_writes_total", "Writes that the store refused as stale.", "operation"
        )

        self._ignored = Counter(
            "singleton_ignored_events_total",
            "Events that were ignored: forged or of another release, unreadable, or with an "
            "impossible duration.",
            registry=registry,
        )
        for task in map(as_printed, tasks or ()):
            self._durations.labels(task)
            if not per_key:
                self._begin(task)

    def _begin(self, task: str) -> None:
        """Create a task's series with the value 0, so that ``increase()`` sees the first event."""
        for outcome in Outcome:
            self._executions.labels(task, outcome)
        for reason in SingletonErrorReason:
            self._errors.labels(task, reason)
        for operation in ("load", *WRITES):
            self._operations.labels(task, operation)
        for operation in REFUSED:
            self._refused.labels(task, operation)
        for how in TAKEOVERS:
            self._takeovers.labels(task, how)
        self._lost.labels(task)

    def __call__(self, details: Details) -> None:
        count = _COUNTED.get(type(details))
        if count is not None:
            count(self, self._labels(details), details)

    def ignored(self) -> None:
        """Count an event that was ignored: it is unreadable or has an impossible duration."""
        self._ignored.inc()

    def _labels(self, details: Details) -> tuple[str, ...]:
        is_known = self._tasks is None or details.singleton in self._tasks
        task = as_printed(details.singleton) if is_known else UNKNOWN
        if not self._per_key:
            return (task,)
        return (task, self._keys.label(task, details.key) if is_known else OTHERS)

    def _observe(self, labels: tuple[str, ...], seconds: float) -> None:
        """Record a run's duration in seconds. If the duration is impossible, ignore the event.

        A single duration of NaN or 1e308 would make the histogram's sum useless for ever.
        """
        if 0 <= seconds <= LONGEST:
            self._durations.labels(labels[0]).observe(seconds)
        else:
            self.ignored()

    def _released(self, labels: tuple[str, ...], details: Released) -> None:
        self._observe(labels, details.seconds)
        self._executions.labels(*labels, bounded(details.outcome, OUTCOMES)).inc()

    def _was_lost(self, labels: tuple[str, ...], details: Lost) -> None:
        self._observe(labels, details.seconds)
        self._executions.labels(*labels, Outcome.LOST).inc()
        self._lost.labels(*labels).inc()

    def _skipped(self, labels: tuple[str, ...], details: Skipped) -> None:
        self._executions.labels(*labels, bounded(details.outcome, OUTCOMES)).inc()

    def _failed(self, labels: tuple[str, ...], details: Failed) -> None:
        self._errors.labels(*labels, bounded(details.reason, REASONS)).inc()

    def _loaded(self, labels: tuple[str, ...], details: StateLoaded) -> None:
        self._operations.labels(*labels, "load").inc()

    def _saved(self, labels: tuple[str, ...], details: StateSaved) -> None:
        self._operations.labels(*labels, bounded(details.operation, WRITES)).inc()

    def _conflicted(self, labels: tuple[str, ...], details: Conflicted) -> None:
        self._conflicts.labels(*labels, bounded(details.policy, POLICIES)).inc()

    def _took_over(self, labels: tuple[str, ...], details: TookOver) -> None:
        self._takeovers.labels(*labels, bounded(details.how, TAKEOVERS)).inc()

    def _was_refused(self, labels: tuple[str, ...], details: WriteRefused) -> None:
        self._refused.labels(*labels, bounded(details.operation, REFUSED)).inc()


_COUNTED: dict[type[Details], Callable[[Counts, tuple[str, ...], Any], None]] = {
    Released: Counts._released,
    Lost: Counts._was_lost,
    Skipped: Counts._skipped,
    Failed: Counts._failed,
    StateLoaded: Counts._loaded,
    StateSaved: Counts._saved,
    Conflicted: Counts._conflicted,
    TookOver: Counts._took_over,
    WriteRefused: Counts._was_refused,
}
