"""The data that the page shows, independent of how the data are read and drawn."""

from __future__ import annotations

from dataclasses import dataclass

from celery_singleton_state import history
from celery_singleton_state.beat.entry_state import EntryState
from celery_singleton_state.health import SingletonHealth
from celery_singleton_state.history import Outcome
from celery_singleton_state.store.base import Listed
from celery_singleton_state.text.visible import as_printed

#: The outcomes of a last run after which a singleton counts as failing.
FAILING = frozenset({Outcome.FAILED, Outcome.LOST})


@dataclass(frozen=True, slots=True)
class ShownSingleton:
    """One singleton that the page shows.

    :param row: the singleton's row; ``None`` if the singleton has never run and has no row.
    :param runs: the runs of the row's history, oldest first.
    :param value: the state as JSON; ``None`` unless the operator gave ``--show-state``.
    """

    health: SingletonHealth
    row: Listed | None
    runs: tuple[history.Entry, ...]
    value: str | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """The words for the singleton's condition, such as ``late`` or ``running``, worst first."""
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
        """The singleton's name as commands print and accept it, split into task and arguments."""
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
        """The last run's entry in the history; ``None`` if the history does not have that run."""
        run = next((run for run in reversed(self.runs) if history.is_run(run)), None)
        if run is None or self.row is None or run.outcome != self.row.last_outcome:
            return None
        return run


@dataclass(frozen=True, slots=True)
class ShownBeat:
    """The part of the page about beat: which beat leads, and the schedule.

    :param name: the name that the beats of this app share.
    :param leader: the holder of the leader's lease; ``None`` if no beat leads.
    :param fence: the newest fence of the leader's lease.
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
    :param now: the time by the store's clock, in seconds since the epoch; by this host's clock if
        the store has no rows.
    :param shown: the singletons that the page shows, worst first.
    :param total: how many singletons match the query.
    :param running, unhealthy: how many singletons are running or unhealthy, whether or not they
        match the query.
    :param query: the text that the visitor typed into the filter.
    :param beat: the part of the page about beat; ``None`` if no beat has led yet.
    :param error: why the store could not be read; ``None`` if it was read.
    :param refresh: seconds after which an open page fetches itself again.
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
