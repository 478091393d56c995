"""Skip the missed ticks of an entry: many at a time, and for a limited time in each turn."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta
from math import inf

from celery.schedules import crontab

from celery_singleton_state.lease.lease import clock
from celery_singleton_state.schedules.due import (
    CHANGE,
    MINUTE,
    Schedule,
    is_plain_interval,
    zone_of,
)

#: How many ticks of one entry a beat owes at most. Older ticks count as missed.
MAX_OWED = 100_000
#: Seconds for which a beat skips ticks of one entry before it goes on with other entries.
TURN = 0.05
DAY = timedelta(days=1)


def skip_ticks(
    asked: Schedule,
    due: datetime,
    until: datetime,
    due_after: Callable[[datetime], datetime],
    at_most: float = inf,
) -> tuple[int, datetime, bool]:
    """Find the last tick of a schedule that is not later than a given time.

    :param asked: the schedule.
    :param due: the tick from which to start. It is not later than ``until``.
    :param until: the given time.
    :param due_after: returns the schedule's first tick after a time.
    :param at_most: how many ticks to skip at most. Left out: no limit.
    :returns: how many ticks were skipped; the tick that was reached; and whether the search is
        finished. The search stops unfinished after :data:`TURN` seconds.
    """
    if is_plain_interval(asked):
        steps = int(min((until - due) // asked.run_every, at_most))
        return steps, due + steps * asked.run_every, True
    count, turn_ends = 0, clock() + TURN
    while count < at_most:
        if clock() > turn_ends:
            return count, due, False
        passed, following = _next(asked, due, due_after, at_most - count)
        if following > until and passed > 1:
            passed, following = 1, due_after(due)
        if following > until:
            break
        count, due = count + passed, following
    return count, due, True


def surplus(asked: Schedule, due: datetime, now: datetime) -> int:
    """Return how many more ticks than :data:`MAX_OWED` a schedule owes.

    The number is exact for an interval. For a crontab it is approximate if clocks were changed in
    its time zone. For any other schedule it is 0, because the ticks would have to be counted one by
    one.

    :param asked: the schedule.
    :param due: the first tick that is owed.
    :param now: the time up to which ticks are owed.
    """
    if is_plain_interval(asked):
        return max(0, int((now - due) // asked.run_every) + 1 - MAX_OWED)
    if type(asked) is not crontab or now - due < MAX_OWED * MINUTE:
        return 0
    cron: Schedule = asked
    first, last = due.astimezone(zone_of(cron)), now.astimezone(zone_of(cron))
    days = (first.date() + number * DAY for number in range((last.date() - first.date()).days))
    owed = _ticks_a_day(cron) * sum(_is_day_of(cron, day) for day in days)
    owed += _ticks_until(cron, last) - _ticks_until(cron, first) + 1
    return max(0, owed - MAX_OWED)


def _next(
    asked: Schedule, due: datetime, due_after: Callable[[datetime], datetime], at_most: float
) -> tuple[int, datetime]:
    """Return how many ticks to skip in one step, and the tick that follows them.

    The step is a whole day for a crontab at the first tick of a day, and otherwise one tick.
    """
    if type(asked) is crontab:
        ticks = _ticks_a_day(asked)
        if 1 < ticks <= at_most and (end := _end_of_day(asked, due)):
            return ticks, due_after(end)
    return 1, due_after(due)


def _end_of_day(cron: Schedule, due: datetime) -> datetime | None:
    """Return the end of a tick's day, if a crontab can skip that day in one step.

    :returns: ``None`` if the tick is not the first one of its day, or if clocks are changed around
        that day.
    """
    wall = due.astimezone(zone_of(cron))
    if (wall.hour, wall.minute) != (min(cron.hour), min(cron.minute)):
        return None
    start = due - wall.hour * 60 * MINUTE - wall.minute * MINUTE
    end = start + DAY
    zone = zone_of(cron)
    before, after = (start - CHANGE).astimezone(zone), (end + CHANGE).astimezone(zone)
    return end - timedelta.resolution if before.utcoffset() == after.utcoffset() else None


def _ticks_a_day(cron: Schedule) -> int:
    return len(cron.hour) * len(cron.minute)


def _ticks_until(cron: Schedule, wall: datetime) -> int:
    """Return how many ticks a crontab has from the start of a day up to a time, inclusive.

    :param wall: the time, in the crontab's time zone.
    """
    if not _is_day_of(cron, wall.date()):
        return 0
    count: int = len(cron.minute) * sum(hour < wall.hour for hour in cron.hour)
    if wall.hour in cron.hour:
        count += sum(minute <= wall.minute for minute in cron.minute)
    return count


def _is_day_of(cron: Schedule, day: date) -> bool:
    return (
        day.month in cron.month_of_year
        and day.day in cron.day_of_month
        and day.isoweekday() % 7 in cron.day_of_week
    )
