"""The data that the page shows, independent of how the data are read and drawn."""

from __future__ import annotations

from dataclasses import dataclass

from celery_singleton_state import history
from celery_singleton_state.beat.entry_state import EntryState
from celery_singleton_state.health import SingletonHealth
from celery_singleton_state.history import Outcome
from celery_singleton_state.store.base import Listed
from celery_singleton_state.text.visible import as_printed

#: The outcomes after which a singleton counts as failing.
FAILING = frozenset({Outcome.FAILED, Outcome.LOST})


@dataclass(frozen=True, slots=True)
class ShownSingleton:
    """One singleton of the page.

    :param row: the singleton's row; ``None`` if it never ran and has no row.
    :param runs: the runs of the row's history, oldest first.
    :param value: the state as JSON; ``None`` unless the operator gave ``--show-state``.
    """

    health: SingletonHealth
    row: Listed | None
    runs: tuple[history.Entry, ...]
    value: str | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """The singleton's marks, each of one or two words, the worst first."""
        row, marks = self.row, []
        if not self.health.healthy:
            marks.append("late")
        if row is not None and row.last_outcome in FAILING:
            marks.append("failing")
        if row is not None and row.acquired_at is not None and not row.held:
            marks.append("lease expired")
        if row is not None and row.held and not row.in_hold_period:
            marks.append("running")
        return tuple(marks) or ("healthy",)

    @property
    def printed_name(self) -> tuple[str, str]:
        """The name as commands print and accept it, in two parts: the task and the arguments."""
        name, task = self.health.singleton, self.health.task
        printed, head = as_printed(name), as_printed(task if name.startswith(task) else name)
        if not printed.startswith(head):
            head = printed
        return head, printed[len(head) :]

    @property
    def ran(self) -> bool:
        """Whether a run of the singleton has ended."""
        return self.row is not None and self.row.last_finished_at is not None

    @property
    def last_run(self) -> history.Entry | None:
        """The history's entry for the row's last outcome; ``None`` if the history has none."""
        run = next((run for run in reversed(self.runs) if history.is_run(run)), None)
        if run is None or self.row is None or run.outcome != self.row.last_outcome:
            return None
        return run


@dataclass(frozen=True, slots=True)
class ShownBeat:
    """The part of the page about beat: which beat leads, and the schedule.

    :param name: the name that the beats of this app share.
    :param leader: the holder of the leader's lease; ``None`` if no beat leads.
    :param fence: the last fence of the lease.
    :param leads_since: when the leader took the lease, in seconds since the epoch.
    :param upcoming: the entries that are due next, soonest first.
    :param entries: how many entries the schedule has.
    """

    name: str
    leader: str | None
    fence: int
    leads_since: float | None
    upcoming: tuple[EntryState, ...]
    entries: int


@dataclass(frozen=True, slots=True)
class Page:
    """The contents of one page.

    :param app: the name of the Celery app.
    :param now: the time by the store's clock, in seconds since the epoch.
    :param shown: the singletons that are drawn, worst first.
    :param total: how many singletons match the query.
    :param running, unhealthy: counts of all singletons, whether they match or not.
    :param query: the text that the visitor typed into the filter.
    :param beat: ``None`` if no beat has led yet.
    :param error: why the store could not be read; ``None`` if it was read.
    :param refresh: seconds between two requests of an open page.
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
