"""Ticks that a beat passes over: many at a time, and never for long."""

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

#: Ticks of one entry that are owed at most; the older ones are missed.
MAX_OWED = 100_000
#: Seconds that a beat passes over ticks of one entry before other entries have their turn.
TURN = 0.05
DAY = timedelta(days=1)


def skip_ticks(
    asked: Schedule,
    due: datetime,
    until: datetime,
    due_after: Callable[[datetime], datetime],
    at_most: float = inf,
) -> tuple[int, datetime, bool]:
    """Go from a tick to the last one that is not later than a moment.

    :param due: the tick, not later than the moment.
    :param due_after: the schedule's first tick after a moment.
    :param at_most: how many ticks to leave behind at most.
    :returns: how many ticks were left behind, the tick that was reached, and whether that is as far
        as to go: with some schedules the time of one turn is over before.
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
    """How many ticks are owed beyond :data:`MAX_OWED`; 0 if that cannot be told at once.

    Of a crontab in a time zone whose clocks are changed it is about so many.

    :param due: the first tick that is owed.
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
    """A tick that follows, and how many ticks are left behind on the way to it: a day's, or one."""
    if type(asked) is crontab:
        ticks = _ticks_a_day(asked)
        if 1 < ticks <= at_most and (end := _end_of_day(asked, due)):
            return ticks, due_after(end)
    return 1, due_after(due)


def _end_of_day(cron: Schedule, due: datetime) -> datetime | None:
    """The last moment of a tick's day, if it is the day's first tick and clocks are not changed."""
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
    """How many ticks its day has up to a moment, that one included."""
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
