"""Poll a schedule whose class overrides ``is_due``, at the times at which Celery would ask it.

Such a schedule cannot tell in advance when it is due. It can only tell when to ask it again. So the
entry's ``next_tick`` is the next time to ask. If the schedule answers that it is due, that time is
the tick. The time is recorded before the schedule is asked, so that another leader asks whether the
schedule was due at that same time, and sends the same tick.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from celery_singleton_state.lease.lease import clock
from celery_singleton_state.schedules.own_rules import Schedule, ask
from celery_singleton_state.text.visible import logger_of

from .entry_state import NEVER
from .misfires import TURN

logger = logger_of(__name__)

#: The largest number of past times at each of which a schedule is asked whether it was due. After
#: these, the schedule is asked about the present time, and the past times that are left are
#: skipped.
QUESTIONS = 1000
#: The pause before a schedule that raised an error is asked again whether it is due.
AGAIN = timedelta(seconds=60)


class Found(NamedTuple):
    """The result of polling a schedule.

    :param tick: a tick to be sent, or the next time to ask, which lies ahead.
    :param missed: how many ticks were skipped.
    :param is_through: whether the polling has reached the present time. If not, later turns
        continue it.
    """

    tick: datetime
    missed: int
    is_through: bool = True


class Poll:
    """Asks the schedule of one entry whether it is due, and remembers its last due time.

    :param name: the name of the entry, for the log.
    """

    def __init__(self, name: str, schedule: Schedule) -> None:
        self._name = name
        self._schedule = schedule
        #: The time from which the schedule counts: its last due time, or when a beat first saw it.
        self.since: datetime | None = None
        #: A due tick that was found and not sent yet; and the time at which to ask the schedule for
        #: the next tick after it.
        self._found: datetime | None = None
        self._following = NEVER
        #: Whether the polling has not reached the present time yet, so that later turns continue
        #: it; and how often the schedule was asked in all these turns.
        self._is_skipping = False
        self._asked = 0
        self._has_failed = False

    def begin(self, since: datetime) -> None:
        """Start to count from a time, and forget a tick that was found before."""
        self.since, self._found = since, None
        self._is_skipping, self._asked = False, 0

    def advance(self, tick: datetime, now: datetime, oldest: datetime, take_first: bool) -> Found:
        """Find the schedule's due ticks up to now, for no longer than one turn.

        The schedule is asked, at one time after another, whether it was due then.

        :param tick: the first time at which to ask, or the tick that the last call found.
        :param now: the time by the store's clock.
        :param oldest: the time before which ticks are too late to be sent.
        :param take_first: true to find the first tick that is not too late; false to find the last.
        """
        if tick == self._found and not self._is_skipping:
            if tick >= oldest:
                return Found(tick, 0)
            following = self.advance(self._skip(tick), now, oldest, take_first)
            return following._replace(missed=following.missed + 1)
        passed, found, at, last = 0, None, tick, self.since or tick
        if tick == self._found:
            passed, found, at, last = 1, tick, self._following, tick
        turn_ends, has_asked_now, is_wanted = clock() + TURN, False, False
        while at <= now and not has_asked_now and not is_wanted and clock() <= turn_ends:
            has_asked_now = self._asked == QUESTIONS
            at = now if has_asked_now else at
            self._asked += 1
            is_due, again = self._ask(last, at, now)
            if is_due:
                passed, found, self.since, last = passed + 1, at, last, at
                is_wanted = take_first and at >= oldest
            at = again
        self._is_skipping = at <= now and not has_asked_now and not is_wanted
        if not self._is_skipping:
            self._asked = 0
        if found is None or found < oldest:
            self._found, self.since = None, last
            return Found(at, passed, not self._is_skipping)
        # Return the found tick, and not the time to ask next. The entry records what is returned,
        # and another leader must find the same tick.
        self._found, self._following = found, at
        return Found(found, passed - 1, not self._is_skipping)

    def sent(self, tick: datetime, now: datetime | None) -> datetime:
        """Record that a tick was sent; return when to ask the schedule again.

        :param tick: the tick.
        :param now: the time from which the next tick is counted; ``None``: the time of the tick.
        """
        self._found, self.since = None, now or tick
        if now is None or self._following is NEVER:
            return self._following
        return self._following + (now - tick)

    def _skip(self, tick: datetime) -> datetime:
        """Skip a tick that has become too late; return when to ask the schedule again."""
        self._found, self.since = None, tick
        return self._following

    def _ask(self, last: datetime, at: datetime, now: datetime) -> tuple[bool, datetime]:
        """Return whether the schedule is due at a time, and when to ask it again.

        A schedule that raises an error is asked again later, because the cause may be gone by then.

        :param last: the schedule's last due time.
        :param at: the time at which the schedule may be due.
        :param now: the time by the store's clock.
        """
        try:
            answer = ask(self._schedule, last, at)
        except Exception as error:
            if not self._has_failed:
                logger.error(
                    "beat: the schedule of %s cannot be asked whether it is due, and is asked again"
                    " every %d s: %s",
                    self._name,
                    AGAIN.total_seconds(),
                    error,
                    exc_info=not isinstance(error, ValueError),
                )
            self._has_failed = True
            return False, now + AGAIN
        self._has_failed = False
        again = answer.again(at, now)
        return answer.due, NEVER if again is None else again
