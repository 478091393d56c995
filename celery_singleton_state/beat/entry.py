"""The schedule entries of ``SingletonScheduler``: their rules for missed ticks, and their state."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any

from celery.beat import ScheduleEntry
from celery.exceptions import ImproperlyConfigured
from celery.schedules import crontab

from celery_singleton_state.schedules.due import (
    Schedule,
    as_schedule,
    is_plain_interval,
    next_due,
    spelled,
)
from celery_singleton_state.schedules.own_rules import (
    NeverDue,
    estimated,
    has_own_is_due,
    overrides,
)
from celery_singleton_state.text.visible import logger_of

from .entry_checks import LONGEST, RULES, check, checked_rule, warn_of_another_clock
from .entry_state import NEVER, EntryState
from .misfires import skip_ticks, surplus
from .poll import Poll
from .under_way import UnderWay

logger = logger_of(__name__)

#: The default of ``skip_if_older_than`` in seconds.
SKIP_IF_OLDER_THAN = 300.0
#: Seconds after which a tick counts as missed with ``catch_up="none"``. After a leader has died,
#: another beat takes over within this time.
ON_TIME = 10.0
#: The time after which a beat counts the owed ticks of a crontab again, if the last count has found
#: no more than :data:`~.misfires.MAX_OWED`. A count costs time, so a beat does not count at each
#: tick.
COUNT_AGAIN = timedelta(hours=1)
#: The time at which the grid begins on which the ticks of intervals lie.
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class SingletonEntry(ScheduleEntry):
    """An entry of ``beat_schedule`` with rules for ticks that were missed.

    :param name: the name of the entry.
    :param task: the name of the task.
    :param options: the options of ``apply_async`` for the entry's messages. The three rules below
        may stand among them, as ``add_periodic_task`` passes them.
    :param fields: Celery's other fields of an entry, such as ``schedule`` and ``args``, and the
        three rules below.
    :param skip_if_older_than: seconds (or a ``timedelta``) after which a tick is too late to be
        sent. ``None`` means that no tick is too late. Left out: 300; for a crontab, Celery's
        ``beat_cron_starting_deadline`` if that is set.
    :param catch_up: which of several missed ticks are sent: ``"latest"`` (only the newest),
        ``"all"`` (all of them in order) or ``"none"`` (no tick that is more than 10 s late). Left
        out: ``"latest"``.
    :param next_from: from where the next tick is counted: ``"schedule"`` (from the last tick) or
        ``"last_run"`` (from the time when the last tick was sent). Left out: ``"schedule"``.
    :raises ImproperlyConfigured: a value is not allowed, or the schedule cannot tell its ticks.
    """

    schedule: Schedule

    def __init__(
        self,
        name: str | None = None,
        task: str | None = None,
        options: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        check(name, task, options, fields)
        options = dict(options or {})

        def rule(option: str, default: Any) -> Any:
            value = fields.pop(option, options.pop(option, default))
            return checked_rule(name, option, value)

        limit: float | None = rule("skip_if_older_than", _patience(fields))
        self.skip_if_older_than = inf if limit is None or limit > LONGEST else limit
        self.catch_up: str = rule("catch_up", "latest")
        self.next_from: str = rule("next_from", "schedule")
        try:
            as_schedule(fields.get("schedule"))
            super().__init__(name=name, task=task, options=options, **fields)
            warn_of_another_clock(str(name), self.schedule)
        except Exception as error:
            raise ImproperlyConfigured(f"schedule entry {name!r}: {error}") from error
        self.last_run_at: datetime | None = None
        self.last_tick: datetime | None = None
        self.missed_count = 0
        self.previous_tick: datetime | None = None
        #: The key of the singleton's row that shows when a tick has ended. ``None`` if ticks are
        #: sent without waiting for the end of the tick before.
        self.row_key: str | None = None
        #: The tick that was sent last, until the singleton's row shows that the tick has ended;
        #: then ``None``.
        self.under_way: UnderWay | None = None
        #: Whether more missed ticks are left to skip. Each call of :meth:`miss` skips a part of
        #: them, so that no entry delays the others for long. ``next_tick`` must not be sent then.
        self.is_passing = False
        self._count_again_at = EPOCH
        #: ``_is_resumed`` tells whether this beat has resumed the entry from the store and has sent
        #: no tick of the entry since. The store may lack the last ticks of the beat before.
        #: ``_has_skipped`` tells whether this beat has skipped a tick in this time.
        self._is_resumed = self._has_skipped = False
        #: The error that the schedule raised when it was asked for its next tick; ``None`` if it
        #: raised no error.
        self._end: Exception | None = None
        self._has_logged_end = False
        self._take_schedule()

    def _take_schedule(self) -> None:
        is_asked = has_own_is_due(self.schedule)
        self._poll = Poll(str(self.name), self.schedule) if is_asked else None
        #: The schedule as a text. The text is made once, because a schedule of a user's class may
        #: change when it is asked whether it is due.
        self.spelled = spelled(self.schedule)

    def update(self, other: Any) -> None:
        """Copy the fields that a user can edit, and the rules for missed ticks, from ``other``."""
        super().update(other)
        self.__dict__.update({rule: vars(other)[rule] for rule in RULES if rule in vars(other)})
        self._take_schedule()

    # -- its state

    def begin(self, now: datetime) -> None:
        """Set the first tick of an entry that the store does not know.

        The ticks of an interval lie on a grid that is derived from the entry's name. So many
        entries with the same interval are not due at the same time, and an entry whose row was lost
        keeps its grid.

        :param now: the time by the store's clock.
        """
        if self._poll:
            passed = self._only_time(now)
            self._poll.begin(passed or now)
            self.next_tick = passed or self._poll.advance(now, now, now, take_first=True).tick
            self._log_if_ended()
            return
        counted_from = now
        if is_plain_interval(self.schedule):
            every = self.schedule.run_every
            part = zlib.crc32(str(self.name).encode()) / 2**32
            counted_from -= (now - EPOCH - part * every) % every
        self.next_tick = self._only_time(now) or self._due_after(counted_from)
        self._log_if_ended()

    def resume(self, state: EntryState, now: datetime) -> None:
        """Restore the entry's state from the store.

        If the schedule has changed since, the next tick is the first one of the new schedule that
        lies ahead. Earlier ticks of the new schedule do not count as missed.

        :param state: the state that the store has.
        :param now: the time by the store's clock.
        """
        self.last_tick = state.last_tick
        self.last_run_at = state.last_run_at
        self.total_run_count = state.total_run_count
        self.missed_count = state.missed_count
        self.previous_tick = state.previous_tick
        self.under_way = None
        if state.under_way and self.row_key and self.last_tick:
            sent = self.last_run_at or now
            self.under_way = UnderWay(self.last_tick, state.under_way, sent, self._delay)
        self._is_resumed, self._has_skipped = True, False
        if self._poll and state.schedule == self.spelled:
            self.next_tick = state.next_tick or NEVER
            self._poll.begin(state.since or self.next_tick)
        elif self._poll:
            self.begin(now)
        elif state.schedule == self.spelled:
            self.next_tick = state.next_tick or self._due_after(now)
        elif self.last_tick is None:
            self.begin(now)
        else:
            self.next_tick = self._due_after(self.last_tick)
            if self.next_tick <= now:
                self.next_tick = self._due_after(now)
        self._log_if_ended()

    def state(self) -> EntryState:
        """Return the entry's state as the store keeps it."""
        return EntryState(
            entry=str(self.name),
            task=str(self.task),
            schedule=self.spelled,
            next_tick=None if self.next_tick is NEVER else self.next_tick,
            last_tick=self.last_tick,
            last_run_at=self.last_run_at,
            total_run_count=self.total_run_count,
            missed_count=self.missed_count,
            previous_tick=self.previous_tick,
            under_way=self.under_way.key if self.under_way else None,
            since=self._poll.since if self._poll else None,
        )

    # -- its ticks

    def miss(self, now: datetime) -> int:
        """Skip the due ticks that the rules for missed ticks exclude, and count them as missed.

        Call it only if ``next_tick`` is due. After the call ``next_tick`` is either a tick to be
        sent or lies ahead, unless ``is_passing`` is true.

        :param now: the time by the store's clock.
        :returns: how many ticks were skipped.
        """
        self.is_passing = False
        patience = self.skip_if_older_than
        if self.catch_up == "none":
            patience = min(patience, ON_TIME)
        if self._poll:
            return self._advance(self._poll, now, patience)
        is_late = (now - self.next_tick).total_seconds() > patience
        if self.next_from == "last_run":
            missed = 1 if is_late else 0
            if is_late:
                self.next_tick = self._due_after(now)
        elif self.catch_up == "all":
            missed = self._skip_before(now - timedelta(seconds=patience)) if is_late else 0
            missed += self._skip_surplus(now)
        else:
            missed = self._skip_to_latest(now, patience)
        self._count_missed(missed)
        return missed

    def is_too_late(self, due: datetime, now: datetime) -> bool:
        """Whether a tick is too old to be sent."""
        return (now - due).total_seconds() > self.skip_if_older_than

    def give_up(self) -> None:
        """Stop waiting for the end of the tick that was sent last, and count it as missed."""
        self.under_way = None
        self.missed_count += 1

    @property
    def tick_before(self) -> datetime | None:
        """The tick that was sent before ``next_tick``; ``None`` if this beat cannot be sure of it.

        A beat that has skipped ticks since it took over cannot be sure: the leader before it may
        have sent some of these ticks without recording them.
        """
        return None if self._has_skipped else self.last_tick

    @property
    def _delay(self) -> timedelta:
        """The ``countdown`` of the entry's messages; zero if the entry has none."""
        countdown = (self.options or {}).get("countdown")
        return timedelta(seconds=countdown if isinstance(countdown, int | float) else 0)

    def _count_missed(self, missed: int) -> None:
        self._has_skipped = self._has_skipped or (self._is_resumed and missed > 0)
        self.missed_count += missed
        self._log_if_ended()

    def sent(self, now: datetime) -> None:
        """Record that ``next_tick`` was sent, and calculate the one after it.

        Call it also if the tick's own message can never be sent, so that the tick is not tried
        again.

        :param now: the time of the sending, by the store's clock.
        """
        self.previous_tick, self.last_tick = self.tick_before, self.next_tick
        self._is_resumed = self._has_skipped = False
        self.last_run_at = now
        self.total_run_count += 1
        if self.row_key:
            self.under_way = UnderWay(self.last_tick, self.row_key, now, self._delay)
        counted_from = now if self.next_from == "last_run" else None
        if self._poll:
            self.next_tick = self._poll.sent(self.last_tick, counted_from)
        else:
            self.next_tick = self._due_after(counted_from or self.last_tick)
        self._log_if_ended()

    def _advance(self, poll: Poll, now: datetime, patience: float) -> int:
        """Ask a schedule that overrides ``is_due`` for its due ticks; return how many were missed.

        :param patience: seconds after which a tick is too late to be sent.
        """
        oldest = EPOCH if patience == inf else now - timedelta(seconds=patience)
        was = self.next_tick
        found = poll.advance(was, now, oldest, take_first=self.catch_up == "all")
        self.next_tick, self.is_passing = found.tick, not found.is_through
        self._count_missed(found.missed)
        return found.missed

    def next_check(self, now: datetime) -> datetime:
        """Return when a beat has to check the entry again.

        For an entry that is due, the result is ``now`` and not its earlier due time. Other due
        entries, with due times before ``now``, then get their turn first.
        """
        if self.under_way:
            return self.under_way.next_check(self.next_tick, now)
        return max(self.next_tick, now)

    def _skip_before(self, until: datetime) -> int:
        """Skip all ticks before a time; return how many."""
        return self._skip_ticks(until - timedelta.resolution, and_the_last=lambda: True)

    def _skip_to_latest(self, now: datetime, patience: float) -> int:
        def is_late() -> bool:
            return (now - self.next_tick).total_seconds() > patience

        return self._skip_ticks(now, and_the_last=is_late)

    def _skip_surplus(self, now: datetime) -> int:
        """Skip the oldest owed ticks if there are more than :data:`~.misfires.MAX_OWED`.

        :returns: how many ticks were skipped.
        """
        if self.is_passing or now < self._count_again_at or self.next_tick > now:
            return 0
        more = surplus(self.schedule, self.next_tick, now)
        if not more:
            # The owed ticks of an interval are counted each time, because that costs nothing. The
            # owed ticks of other kinds of schedules are counted only now and then. These schedules
            # have at most one tick a minute, so that between two counts the owed ticks cannot
            # exceed ``MAX_OWED`` by much.
            if not is_plain_interval(self.schedule):
                self._count_again_at = now + COUNT_AGAIN
            return 0
        return self._skip_ticks(now, and_the_last=lambda: False, at_most=more)

    def _skip_ticks(
        self, until: datetime, and_the_last: Callable[[], bool], at_most: float = inf
    ) -> int:
        """Set ``next_tick`` to the last tick up to a time, or to the tick after that one.

        :param until: the time.
        :param and_the_last: returns whether that last tick, now in ``next_tick``, is skipped, too.
        :param at_most: how many ticks to skip at most before the last one.
        :returns: how many ticks were skipped.
        """
        count, self.next_tick, is_through = skip_ticks(
            self.schedule, self.next_tick, until, self._due_after, at_most
        )
        self.is_passing = not is_through
        if is_through and and_the_last():
            self.next_tick = self._due_after(self.next_tick)
            count += 1
        return count

    def _only_time(self, now: datetime) -> datetime | None:
        """Return the due time of a schedule that is due only once, if that time has passed."""
        if not overrides(self.schedule, "remaining_estimate"):
            return None
        try:
            estimated(self.schedule, now)
        except NeverDue as error:
            return error.due
        except Exception:  # the beat logs this error when it asks for the schedule's next tick
            return None
        return None

    def _due_after(self, moment: datetime) -> datetime:
        """Return the first tick after a time; :data:`NEVER` if there is none.

        A schedule that raises an error counts as never due, so that the beat goes on with its other
        entries.
        """
        try:
            return next_due(self.schedule, moment)
        except Exception as error:
            self._end = error
            return NEVER

    def _log_if_ended(self) -> None:
        """Log once that the entry is never due again.

        The level of the log line is ERROR if the schedule has failed, WARNING if the entry has
        never been sent, and INFO otherwise.
        """
        if self.next_tick is not NEVER or self._has_logged_end:
            self._has_logged_end = self.next_tick is NEVER
            return
        self._has_logged_end = True
        if self._end is None or isinstance(self._end, NeverDue):
            level = logging.WARNING if self.last_tick is None else logging.INFO
            why = self._end or "its schedule has no next tick"
            logger.log(level, "beat: %s is never due again: %s", self.name, why)
            return
        logger.error(
            "beat: the next tick of %s cannot be calculated, so it is not sent until a beat takes"
            " over: %s",
            self.name,
            self._end,
            exc_info=None if isinstance(self._end, ValueError) else self._end,
        )


def _patience(fields: Mapping[str, Any]) -> float:
    """Return the default of ``skip_if_older_than`` for an entry with these fields, in seconds."""
    app, is_crontab = fields.get("app"), isinstance(fields.get("schedule"), crontab)
    deadline = app.conf.beat_cron_starting_deadline if app and is_crontab else None
    return float(deadline or SKIP_IF_OLDER_THAN)
