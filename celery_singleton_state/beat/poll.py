"""Entries whose schedule has an ``is_due`` of its own: the schedule is asked when Celery would.

Such a schedule cannot say in advance when it is due, only when to ask it again. So the entry's
``next_tick`` is the next time to ask. If the schedule says then that it is due, this time is the
tick. It is recorded before the schedule is asked, so that another leader asks about the same time
and sends the same tick.
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

#: How often a schedule is asked about the past before it is asked about the present.
QUESTIONS = 1000
#: When a schedule is asked again that could not be asked.
AGAIN = timedelta(seconds=60)


class Found(NamedTuple):
    """What an entry is to do next.

    :param tick: a tick to be sent, or a time to ask, which lies ahead.
    :param missed: how many ticks were passed over.
    :param is_through: whether the schedule was asked about all times until now.
    """

    tick: datetime
    missed: int
    is_through: bool = True


class Poll:
    """Asks a schedule whether it is due, and keeps what it counts from.

    :param name: the entry's.
    """

    def __init__(self, name: str, schedule: Schedule) -> None:
        self._name = name
        self._schedule = schedule
        #: What the schedule counts from.
        self.since: datetime | None = None
        #: A tick that the schedule has said is due, and when to ask it after that.
        self._found: datetime | None = None
        self._following = NEVER
        #: Whether the rest of the times until now comes in further turns, and how many came.
        self._is_passing = False
        self._asked = 0
        self._has_failed = False

    def begin(self, since: datetime) -> None:
        """Count from a moment."""
        self.since, self._found = since, None
        self._is_passing, self._asked = False, 0

    def advance(self, tick: datetime, now: datetime, oldest: datetime, take_first: bool) -> Found:
        """Ask the schedule about all times to ask until now, for no longer than a turn.

        :param tick: the first of these times, or what the last call found.
        :param oldest: ticks before it are too late to be sent.
        :param take_first: whether the first tick is wanted that is not too late, or else the last.
        """
        if tick == self._found and not self._is_passing:
            if tick >= oldest:
                return Found(tick, 0)
            following = self.advance(self._pass(tick), now, oldest, take_first)
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
        self._is_passing = at <= now and not has_asked_now and not is_wanted
        if not self._is_passing:
            self._asked = 0
        if found is None or found < oldest:
            self._found, self.since = None, last
            return Found(at, passed, not self._is_passing)
        # What was found is recorded, and not the time to go on from: another leader finds it, too.
        self._found, self._following = found, at
        return Found(found, passed - 1, not self._is_passing)

    def sent(self, tick: datetime, now: datetime | None) -> datetime:
        """A tick was sent; returns when the schedule is to be asked again.

        :param now: what the next tick is counted from; ``None``: the tick.
        """
        self._found, self.since = None, now or tick
        if now is None or self._following is NEVER:
            return self._following
        return self._following + (now - tick)

    def _pass(self, tick: datetime) -> datetime:
        """Pass over a tick that has become too late; returns when to ask again."""
        self._found, self.since = None, tick
        return self._following

    def _ask(self, last: datetime, at: datetime, now: datetime) -> tuple[bool, datetime]:
        """Whether a tick is due, and when to ask again.

        A schedule that fails is asked again later: what it needs, such as its table, may be back.
        """
        try:
            answer = ask(self._schedule, last, at)
        except Exception as error:
            if not self._has_failed:
                logger.error(
                    "beat: the schedule of %s cannot be asked whether it is due, it is asked again"
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
