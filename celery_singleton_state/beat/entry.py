"""An entry of the schedule: what it sends, which ticks it wants, and what has become of it."""

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
from celery.utils.time import maybe_make_aware

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

from .entry_checks import LONGEST, RULES, check, checked_rule
from .entry_state import NEVER, EntryState
from .misfires import skip_ticks, surplus
from .poll import Poll
from .under_way import UnderWay

logger = logger_of(__name__)

#: Seconds, as is :data:`ON_TIME`.
SKIP_IF_OLDER_THAN = 300.0
#: With ``catch_up="none"``, later is missed: what it takes at most until another beat leads.
ON_TIME = 10.0
#: After which it is counted again whether too many ticks of a crontab are owed.
COUNT_AGAIN = timedelta(hours=1)
#: Seconds; clocks that differ by more are not meant to be the same.
CLOCKS_DIFFER = 60
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class SingletonEntry(ScheduleEntry):
    """An entry as in ``beat_schedule``, with rules for ticks that were missed.

    :param skip_if_older_than: seconds after which a tick is too late to be sent. Left out: 300, or
        for a crontab Celery's ``beat_cron_starting_deadline`` if it is set; ``None``: never.
    :param catch_up: what is sent of several that were missed: the ``"latest"`` (default), ``"all"``
        in order, or ``"none"``, which sends nothing that is later than 10 s.
    :param next_from: what the next tick is counted from: the ``"schedule"`` (default), or the
        ``"last_run"``, the moment when the last one was sent.
    :raises ImproperlyConfigured: a value is not allowed, or the schedule cannot be asked.

    In the arguments of ``add_periodic_task`` they stand among the message's options.
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
        #: The key of its singleton's row, if its ticks are sent one by one.
        self.row_key: str | None = None
        #: The tick that was sent last, until that row says that it has ended.
        self.under_way: UnderWay | None = None
        #: Whether ``next_tick`` is one of many that are missed, the rest of which come in turns.
        self.is_passing = False
        self._count_again_at = EPOCH
        #: Whether no tick was sent since another beat may have led; whether one was passed over.
        self._is_resumed = self._has_passed = False
        #: Why the schedule has no next tick, if it has said so.
        self._end: Exception | None = None
        self._has_logged_end = False
        self._take_schedule()

    def _take_schedule(self) -> None:
        is_asked = has_own_is_due(self.schedule)
        self._poll = Poll(str(self.name), self.schedule) if is_asked else None
        #: The schedule as a text; of now, because a class may change itself when it is asked.
        self.spelled = spelled(self.schedule)

    def update(self, other: Any) -> None:
        """Take over what may be edited, and the rules for missed ticks."""
        super().update(other)
        self.__dict__.update({rule: vars(other)[rule] for rule in RULES if rule in vars(other)})
        self._take_schedule()

    # -- its state

    def begin(self, now: datetime) -> None:
        """Be due from now on, as an entry that nobody has seen before.

        Intervals lie on a grid that follows from the entry's name, so that many of the same length
        are not due all at once, and a schedule whose rows were lost goes on as it was.
        """
        if self._poll:
            passed = self._only_time(now)
            self._poll.begin(passed or now)
            self.next_tick = passed or self._poll.advance(now, now, now, take_first=True).tick
            self._say_if_ended()
            return
        counted_from = now
        if is_plain_interval(self.schedule):
            every = self.schedule.run_every
            part = zlib.crc32(str(self.name).encode()) / 2**32
            counted_from -= (now - EPOCH - part * every) % every
        self.next_tick = self._only_time(now) or self._due_after(counted_from)
        self._say_if_ended()

    def resume(self, state: EntryState, now: datetime) -> None:
        """Go on from what the store has.

        A schedule that is another than then is due at its first time after the last tick that lies
        ahead: what it would have made due until now was not missed.
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
        self._is_resumed, self._has_passed = True, False
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
        self._say_if_ended()

    def state(self) -> EntryState:
        """What is to be stored of it."""
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
        """Pass over the ticks that are due and not wanted any more; returns how many.

        ``next_tick``, which is due, is then one to be sent, or lies ahead, unless ``is_passing``.
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
            missed = self._pass(now - timedelta(seconds=patience)) if is_late else 0
            missed += self._skip_surplus(now)
        else:
            missed = self._pass_to_latest(now, patience)
        self._count_missed(missed)
        return missed

    def is_too_late(self, due: datetime, now: datetime) -> bool:
        """Whether a tick is too old to be sent."""
        return (now - due).total_seconds() > self.skip_if_older_than

    def give_up(self) -> None:
        """Wait no longer for the end of the tick that is under way; it counts as missed."""
        self.under_way = None
        self.missed_count += 1

    @property
    def tick_before(self) -> datetime | None:
        """The tick that was sent before the next one; ``None`` if that is not sure.

        The beat that led before may have sent more ticks than it recorded.
        """
        return None if self._has_passed else self.last_tick

    @property
    def _delay(self) -> timedelta:
        """After which a message of the entry may run, if its options say so."""
        countdown = (self.options or {}).get("countdown")
        return timedelta(seconds=countdown if isinstance(countdown, int | float) else 0)

    def _count_missed(self, missed: int) -> None:
        self._has_passed = self._has_passed or (self._is_resumed and missed > 0)
        self.missed_count += missed
        self._say_if_ended()

    def sent(self, now: datetime) -> None:
        """``next_tick`` was sent, or could not be, for a reason that is its own."""
        self.previous_tick, self.last_tick = self.tick_before, self.next_tick
        self._is_resumed = self._has_passed = False
        self.last_run_at = now
        self.total_run_count += 1
        if self.row_key:
            self.under_way = UnderWay(self.last_tick, self.row_key, now, self._delay)
        counted_from = now if self.next_from == "last_run" else None
        if self._poll:
            self.next_tick = self._poll.sent(self.last_tick, counted_from)
        else:
            self.next_tick = self._due_after(counted_from or self.last_tick)
        self._say_if_ended()

    def _advance(self, poll: Poll, now: datetime, patience: float) -> int:
        """Ask the schedule whether a tick is due; returns how many were missed."""
        oldest = EPOCH if patience == inf else now - timedelta(seconds=patience)
        was = self.next_tick
        found = poll.advance(was, now, oldest, take_first=self.catch_up == "all")
        self.next_tick, self.is_passing = found.tick, not found.is_through
        self._count_missed(found.missed)
        return found.missed

    def next_check(self, now: datetime) -> datetime:
        """When a beat is to look at the entry again; one that is due comes after all that are."""
        if self.under_way:
            return self.under_way.next_check(self.next_tick, now)
        return max(self.next_tick, now)

    def _pass(self, until: datetime) -> int:
        """Pass over all that are due before a moment."""
        return self._skip_ticks(until - timedelta.resolution, and_the_last=lambda: True)

    def _pass_to_latest(self, now: datetime, patience: float) -> int:
        def is_late() -> bool:
            return (now - self.next_tick).total_seconds() > patience

        return self._skip_ticks(now, and_the_last=is_late)

    def _skip_surplus(self, now: datetime) -> int:
        """Pass over the oldest ticks of more than are ever owed."""
        if self.is_passing or now < self._count_again_at or self.next_tick > now:
            return 0
        more = surplus(self.schedule, self.next_tick, now)
        if not more:
            # No schedule but an interval, which costs nothing to count, has more than one a minute.
            if not is_plain_interval(self.schedule):
                self._count_again_at = now + COUNT_AGAIN
            return 0
        return self._skip_ticks(now, and_the_last=lambda: False, at_most=more)

    def _skip_ticks(
        self, until: datetime, and_the_last: Callable[[], bool], at_most: float = inf
    ) -> int:
        """Go to the last tick up to a moment, or past it if that one is missed as well."""
        count, self.next_tick, is_through = skip_ticks(
            self.schedule, self.next_tick, until, self._due_after, at_most
        )
        self.is_passing = not is_through
        if is_through and and_the_last():
            self.next_tick = self._due_after(self.next_tick)
            count += 1
        return count

    def _only_time(self, now: datetime) -> datetime | None:
        """The time of a schedule that is due only once, if that time has passed."""
        if not overrides(self.schedule, "remaining_estimate"):
            return None
        try:
            estimated(self.schedule, now)
        except NeverDue as error:
            return error.due
        except Exception:  # said when the schedule is asked for its next tick
            return None
        return None

    def _due_after(self, moment: datetime) -> datetime:
        """The first tick after a moment.

        A schedule that cannot tell must not keep the others from theirs.
        """
        try:
            return next_due(self.schedule, moment)
        except Exception as error:
            self._end = error
            return NEVER

    def _say_if_ended(self) -> None:
        """Log once that the entry is due no more: loudly, unless it is the end of its schedule."""
        if self.next_tick is not NEVER or self._has_logged_end:
            self._has_logged_end = self.next_tick is NEVER
            return
        self._has_logged_end = True
        if self._end is None or isinstance(self._end, NeverDue):
            level = logging.WARNING if self.last_tick is None else logging.INFO
            why = self._end or "its schedule says that it is never due again"
            logger.log(level, "beat: %s is due no more: %s", self.name, why)
            return
        logger.error(
            "beat: the next tick of %s cannot be calculated, it is due no more until a beat takes"
            " over: %s",
            self.name,
            self._end,
            exc_info=None if isinstance(self._end, ValueError) else self._end,
        )


def warn_of_another_clock(name: str, schedule: Schedule) -> None:
    """Warn of a schedule whose ``nowfun`` is a clock that beats do not go by.

    :raises TypeError: the schedule's clock shows no time.
    """
    shows = schedule.now()
    if not isinstance(shows, datetime):
        raise TypeError(f"its clock, now(), shows {shows!r}, which is no datetime")
    if getattr(schedule, "nowfun", None) is None:
        return
    off = (maybe_make_aware(shows) - datetime.now(UTC)).total_seconds()
    if abs(off) > CLOCKS_DIFFER:
        logger.warning(
            "beat: the nowfun of %s is %d s off the clock, and is not used: beats go by the"
            " database's clock. Times without a time zone count as UTC; shift the schedule itself.",
            name,
            off,
        )


def _patience(fields: Mapping[str, Any]) -> float:
    """What is too late for an entry that does not say."""
    app, is_crontab = fields.get("app"), isinstance(fields.get("schedule"), crontab)
    deadline = app.conf.beat_cron_starting_deadline if app and is_crontab else None
    return float(deadline or SKIP_IF_OLDER_THAN)
