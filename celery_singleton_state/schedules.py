"""When a schedule is due, asked of any moment; Celery's own schedules only know of now.

A crontab follows the clocks of its time zone. When they are put forward, what is due in the hour
that is left out is due as much later; when they are put back, what is due in the hour that comes
twice is due in the first one. Only a crontab of every hour counts hours that pass, and so leaves
out none and has the repeated one twice.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

from celery import current_app, schedules

KINDS = (schedules.BaseSchedule, timedelta, int, float)

#: A schedule of Celery's, whose types leave out most of what one has.
Schedule = Any

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
#: Clocks are changed by no more than this.
CHANGE = 2 * HOUR
#: Leap days are up to eight years apart, and those on one day of the week up to forty.
NEVER = timedelta(days=41 * 366)


def next_runs(schedule: Any, n: int = 1, after: datetime | None = None) -> list[datetime]:
    """The next times at which a schedule is due, in its time zone.

    :param schedule: as in ``beat_schedule``: a crontab, a solar event, or an interval as a
        ``timedelta`` or a number of seconds, which is counted from ``after``.
    :param n: how many times, at least 1.
    :param after: aware, and not among them. None: now.
    :raises ValueError: ``n`` or ``after`` is not allowed, or the schedule is never due.
    """
    if n < 1:
        raise ValueError(f"next_runs(): n={n!r} is not allowed; it is at least 1")
    asked = as_schedule(schedule)
    moment = _aware("next_runs(): after", after, asked)
    times = []
    for _ in range(n):
        moment = next_due(asked, moment)
        times.append(moment.astimezone(asked.tz))
    return times


def matches_now(schedule: Any, now: datetime | None = None) -> bool:
    """Whether a schedule is due in this minute.

    :param schedule: a crontab or a solar event.
    :param now: aware. None: now.
    :raises ValueError: ``now`` is not aware, or the schedule is an interval: that is counted from
        its last run, and is due at no time of its own.
    """
    asked = as_schedule(schedule)
    if _is_interval(asked):
        raise ValueError(
            f"matches_now(): {schedule!r} is an interval, which has no times of its own"
        )
    moment = _aware("matches_now(): now", now, asked)
    minute = moment.replace(second=0, microsecond=0)
    return next_due(asked, minute - timedelta.resolution) < minute + MINUTE


def next_due(asked: Schedule, after: datetime) -> datetime:
    """The first time after a moment at which a schedule is due, in UTC.

    :raises ValueError: it is never due.
    """
    after = after.astimezone(UTC)
    if is_plain_interval(asked):
        plain: timedelta = asked.run_every
        return after + plain
    if not isinstance(asked, schedules.crontab):
        left: timedelta = _frozen(asked, after).remaining_estimate(after)
        return after + left
    cron: Schedule = asked
    moments = _every_hour if len(cron.hour) == 24 else _by_the_clock
    found = None
    for moment in moments(cron, after):
        # Where clocks are changed, what comes later on the wall can be due earlier.
        if found and moment > found + CHANGE:
            break
        if moment > after:
            found = min(found or moment, moment)
            if moments is _every_hour or _keeps_time(cron, after, found):
                break
    if found is None:
        raise ValueError(f"{asked!r} is never due")
    return found


def spelled(asked: Schedule) -> str:
    """A schedule as a text that is another where the schedule is another."""
    if is_plain_interval(asked):
        return f"every {asked.run_every.total_seconds():.15g} s"
    made, arguments, *_ = asked.__reduce__()
    plain = ", ".join(repr(value) for value in arguments if not callable(value))
    zone = f" {asked.tz}" if isinstance(asked, schedules.crontab) else ""
    return re.sub(r" at 0x[0-9a-f]+", "", f"{made.__name__}({plain}){zone}")


def is_plain_interval(asked: Schedule) -> bool:
    """Whether a schedule is an interval that is counted from any moment."""
    return type(asked) is schedules.schedule and not asked.relative


def _by_the_clock(asked: Schedule, after: datetime) -> Iterator[datetime]:
    """The times that a clock on the wall would show, from a little before a moment on.

    Where clocks are put forward, those that it leaves out come among those that follow.
    """
    zone: tzinfo = asked.tz
    wall = after.astimezone(zone).replace(tzinfo=None, fold=0, second=0, microsecond=0)
    if not _keeps_time(asked, after, after):
        wall -= CHANGE
    end = wall + NEVER
    while wall < end:
        if wall.month not in asked.month_of_year:
            wall = (wall.replace(day=1) + timedelta(days=32)).replace(day=1, hour=0, minute=0)
        elif not _is_its_day(asked, wall):
            wall = (wall + timedelta(days=1)).replace(hour=0, minute=0)
        elif wall.hour not in asked.hour:
            wall = (wall + HOUR).replace(minute=0)
        else:
            if wall.minute in asked.minute:
                yield wall.replace(tzinfo=zone).astimezone(UTC)
            wall += MINUTE


def _keeps_time(asked: Schedule, start: datetime, end: datetime) -> bool:
    """Whether the clocks are surely not changed between two moments or close to them."""
    if end - start > HOUR:
        return False
    zone: tzinfo = asked.tz
    before, after = (start - CHANGE).astimezone(zone), (end + CHANGE).astimezone(zone)
    return before.utcoffset() == after.utcoffset()


def _every_hour(asked: Schedule, after: datetime) -> Iterator[datetime]:
    """The times of a crontab that does not look at the hour, as they pass."""
    moment = after.replace(second=0, microsecond=0)
    end = moment + NEVER
    while moment < end:
        wall = moment.astimezone(asked.tz)
        if wall.month not in asked.month_of_year or not _is_its_day(asked, wall):
            # Short of midnight by more than clocks are ever put forward, and then by the hour.
            moment += HOUR * (21 - wall.hour) if wall.hour < 21 else MINUTE * (60 - wall.minute)
            continue
        if wall.minute in asked.minute:
            yield moment
        moment += MINUTE


def _is_its_day(asked: Schedule, wall: datetime) -> bool:
    return wall.day in asked.day_of_month and wall.isoweekday() % 7 in asked.day_of_week


def as_schedule(value: Any) -> Schedule:
    """What may stand in ``beat_schedule`` as a schedule, as one.

    :raises ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, KINDS):
        raise ValueError(
            f"{value!r} is no schedule; a crontab, a solar event, a timedelta or seconds are"
        )
    made: Schedule = value
    if not isinstance(value, schedules.BaseSchedule):
        made = schedules.schedule(value, app=current_app)
    if _is_interval(made) and made.run_every <= timedelta(0):
        raise ValueError(f"{value!r} is no schedule: an interval is longer than 0")
    return made


def _is_interval(asked: Schedule) -> bool:
    return isinstance(asked, schedules.schedule) and not isinstance(asked, schedules.crontab)


def _aware(what: str, moment: datetime | None, asked: Schedule) -> datetime:
    if moment is None:
        return datetime.now(UTC)
    if moment.tzinfo is None:
        raise ValueError(f"{what}={moment!r} is not allowed; it has no time zone")
    return moment


def _frozen(asked: Schedule, now: datetime) -> Schedule:
    """The schedule at a moment that it takes for now."""
    app = asked.app
    # Celery's schedules leave their app behind when they are copied.
    asked = copy.copy(asked)
    asked.app = app
    asked.nowfun = lambda: now
    return asked
