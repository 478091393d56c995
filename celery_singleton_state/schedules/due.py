"""Compute when a schedule is due after any given time. Celery computes that only for the present.

- An interval is counted from the given time.
- A crontab follows the local clocks of its time zone. When the clocks are put forward by an hour, a
  time in the skipped hour is due an hour later. When the clocks are put back, a time in the
  repeated hour is due only the first time. A crontab of every hour is the exception: it is due in
  every hour that passes. So it skips none, and it is due both times in the repeated hour.
- If a schedule's class overrides Celery's rules, that class decides, see ``own_rules``.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import celery
from celery import current_app, schedules
from celery.utils.time import timezone

from celery_singleton_state.compat import CRONTAB_METHODS

from . import own_rules
from .canonical_text import canonical_text
from .own_rules import NeverDue, estimated, has_own_is_due, overrides, shown, simulated

#: The types that :func:`as_schedule` accepts, besides any object that has a schedule's methods.
KINDS = (schedules.BaseSchedule, timedelta, int, float)

Schedule = own_rules.Schedule

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
#: The largest step by which local clocks are assumed to be put forward or back.
CHANGE = 2 * HOUR
#: How far ahead a crontab is searched before it counts as never due. A leap day that falls on one
#: given day of the week can be forty years away.
NEVER = own_rules.FOREVER
#: The longest interval that a schedule may have. A longer interval is a mistake, and would lead
#: past Python's last date.
LONGEST = timedelta(days=36525)
#: How much earlier :func:`_is_due_then` begins when it counts a schedule's due times once more, and
#: how many due times it counts at most. The first length is not a multiple of any likely interval,
#: so that a schedule with such an interval does not meet the same due time by chance.
ODD, ODD_STEPS = timedelta(seconds=17.77), 200

#: Whether Celery takes a crontab's time zone from the times that its ``nowfun`` returns. It did so
#: before version 5.7.
GOES_BY_NOWFUN = tuple(celery.VERSION[:2]) < (5, 7)


def next_runs(schedule: Any, n: int = 1, after: datetime | None = None) -> list[datetime]:
    """Return the next times at which a schedule is due, as datetimes in the schedule's time zone.

    :param schedule: as in ``beat_schedule``: a crontab, a solar event, a schedule of your own
        class, or an interval as a ``timedelta`` or a number of seconds. An interval is counted
        from ``after``.
    :param n: how many times to return, at least 1. The list is shorter if the schedule ends
        earlier, or if its class cannot tell the later times.
    :param after: a datetime with a time zone; only later times are returned. Left out: now.
    :raises ValueError: ``schedule``, ``n`` or ``after`` is not allowed, the schedule is never due,
        or its class cannot tell when it is due.
    """
    if n < 1:
        raise ValueError(f"next_runs(): n={n!r} is not allowed; it is at least 1")
    made = as_schedule(schedule)
    moment = _aware("next_runs(): after", after)
    zone = zone_of(made)
    times: list[datetime] = []
    for _ in range(n):
        try:
            moment = _checked_due(made, moment)
        except ValueError:
            if times:
                break
            raise
        times.append(moment.astimezone(zone))
    return times


def matches_now(schedule: Any, now: datetime | None = None) -> bool:
    """Whether a schedule is due in the present minute.

    :param schedule: a crontab, a solar event, or a schedule of your own class whose due times do
        not depend on its last run.
    :param now: a datetime with a time zone, in the minute to check. Left out: now.
    :raises ValueError: ``now`` has no time zone, ``schedule`` is not a schedule, or its due times
        depend on its last run, as those of an interval do.
    """
    made = as_schedule(schedule)
    if _is_interval(made) and not overrides(made, "is_due", "remaining_estimate"):
        raise ValueError(
            f"matches_now(): {shown(schedule)} is an interval, which has no times of its own"
        )
    moment = _aware("matches_now(): now", now)
    minute = moment.replace(second=0, microsecond=0)
    before = minute.astimezone(UTC) - timedelta.resolution
    if not overrides(made, "is_due", *CRONTAB_METHODS):
        return next_due(made, before) < minute + MINUTE
    try:
        due = _checked_due(made, before)
    except NeverDue:
        return False
    if not _is_due_then(made, due, before):
        raise ValueError(
            f"matches_now(): {shown(schedule)} is counted from its last run, and has no times of"
            " its own"
        )
    return due < minute + MINUTE


def _checked_due(schedule: Schedule, after: datetime) -> datetime:
    """Call :func:`next_due`, and raise any error of the schedule's class as a ``ValueError``."""
    try:
        return next_due(schedule, after)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{shown(schedule)} cannot tell when it is due: {type(error).__name__}: {error}"
        ) from error


def _is_due_then(schedule: Schedule, due: datetime, before: datetime) -> bool:
    """Whether a due time of a schedule does not depend on the time from which it was counted.

    To check this, the due times are counted once more, from a time earlier than ``before``. The
    first of these due times that is later than ``before`` must be ``due`` again.

    :param due: the due time that was found.
    :param before: the time from which ``due`` was counted.
    """
    moment = before - ODD
    for _ in range(ODD_STEPS):
        moment = next_due(schedule, moment)
        if moment > before:
            return abs(moment - due) < timedelta(seconds=1)
    return False


def next_due(schedule: Schedule, after: datetime, questions: int = own_rules.QUESTIONS) -> datetime:
    """Return the first time later than ``after`` at which a schedule is due, in UTC.

    :param questions: the most calls of ``is_due``, if the schedule's class has its own ``is_due``.
    :raises NeverDue: the schedule is not due after this time.
    :raises ValueError: the schedule's class cannot tell when the schedule is due.
    """
    after = after.astimezone(UTC)
    if is_plain_interval(schedule):
        plain: timedelta = schedule.run_every
        return after + plain
    if has_own_is_due(schedule):
        return simulated(schedule, after, questions)
    if isinstance(schedule, schedules.crontab) and not overrides(schedule, *CRONTAB_METHODS):
        return _next_of_crontab(schedule, after)
    return estimated(schedule, after)


def _next_of_crontab(cron: Schedule, after: datetime) -> datetime:
    moments = _every_hour if len(cron.hour) == 24 else _by_the_clock
    found = None
    for moment in moments(cron, after):
        # The times come in the order of the local clock. Of two times around a change of the
        # clocks, the later one by the local clock can be the earlier one in UTC. So the search goes
        # on until all further times are later in UTC, too.
        if found and moment > found + CHANGE:
            break
        if moment > after:
            found = min(found or moment, moment)
            if moments is _every_hour or _keeps_time(cron, after, found):
                break
    if found is None:
        raise NeverDue(f"{shown(cron)} is never due")
    return found


def spelled(schedule: Schedule) -> str:
    """Return a canonical text: two texts are equal if and only if the two schedules are equal."""
    if is_plain_interval(schedule):
        return f"every {schedule.run_every.total_seconds():.15g} s"
    zone = f" {zone_of(schedule)}" if isinstance(schedule, schedules.crontab) else ""
    return canonical_text(schedule, zone)


def is_plain_interval(schedule: Schedule) -> bool:
    """Whether a schedule is an ordinary interval, so that an addition gives the next due time."""
    return (
        isinstance(schedule, schedules.schedule)
        and "run_every" in vars(schedule)
        and not schedule.relative
        and not overrides(schedule, "is_due", "remaining_estimate", "now")
    )


def zone_of(schedule: Schedule) -> tzinfo:
    """Return the time zone in which a schedule's due times are computed."""
    nowfun = getattr(schedule, "nowfun", None)
    if GOES_BY_NOWFUN and nowfun and "tz" not in vars(schedule) and nowfun().tzinfo:
        found: tzinfo = nowfun().tzinfo
        return found
    named: tzinfo = timezone.get_timezone(getattr(schedule, "tz", None) or UTC)
    return named


def _by_the_clock(schedule: Schedule, after: datetime) -> Iterator[datetime]:
    """Yield the due times of a crontab in UTC, in the order in which local clocks show them.

    The first due times can be a little earlier than ``after``. When clocks are put forward, the due
    times do not ascend in UTC: a skipped local time is due an hour later, among later local times.
    """
    zone = zone_of(schedule)
    wall = after.astimezone(zone).replace(tzinfo=None, fold=0, second=0, microsecond=0)
    if not _keeps_time(schedule, after, after):
        wall -= CHANGE
    end = wall + NEVER
    while wall < end:
        if wall.month not in schedule.month_of_year:
            wall = (wall.replace(day=1) + timedelta(days=32)).replace(day=1, hour=0, minute=0)
        elif not _is_its_day(schedule, wall):
            wall = (wall + timedelta(days=1)).replace(hour=0, minute=0)
        elif wall.hour not in schedule.hour:
            wall = (wall + HOUR).replace(minute=0)
        else:
            if wall.minute in schedule.minute:
                yield _in_utc(wall, zone)
            wall += MINUTE


def _in_utc(wall: datetime, zone: tzinfo) -> datetime:
    """Convert a local time to UTC.

    If a local time comes twice, because clocks are put back, the first of the two times is meant.
    If a local time is skipped, it is converted as if the clocks had not been put forward.

    :param wall: the local time, without a time zone.
    """
    if not hasattr(zone, "localize"):
        return wall.replace(tzinfo=zone).astimezone(UTC)
    # A pytz time zone only converts correctly from UTC: if it is set on a local time, it stands for
    # the mean solar time of its city. So try the offsets of the day before and of the day after.
    day = timedelta(days=1)
    offsets = [_offset(zone, wall.replace(tzinfo=UTC) + each) for each in (-day, day)]
    moments = [wall.replace(tzinfo=UTC) - offset for offset in offsets]
    shown = [each for each in moments if each.astimezone(zone).replace(tzinfo=None) == wall]
    return min(shown, default=moments[0])


def _offset(zone: tzinfo, moment: datetime) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta(0)


def _keeps_time(schedule: Schedule, start: datetime, end: datetime) -> bool:
    """Whether local clocks surely are neither put forward nor back from ``start`` to ``end``.

    The answer also covers some time before ``start`` and after ``end``. It is false if the two
    times are more than an hour apart.
    """
    if end - start > HOUR:
        return False
    zone = zone_of(schedule)
    return _offset(zone, start - CHANGE) == _offset(zone, end + CHANGE)


def _every_hour(schedule: Schedule, after: datetime) -> Iterator[datetime]:
    """Yield the due times of a crontab of every hour, in ascending order."""
    zone = zone_of(schedule)
    moment = after.replace(second=0, microsecond=0)
    end = moment + NEVER
    while moment < end:
        wall = moment.astimezone(zone)
        if wall.month not in schedule.month_of_year or not _is_its_day(schedule, wall):
            # Skip this day: go to 21 o'clock in one step, and from there hour by hour. One step to
            # midnight could end within the next day, because clocks may be put forward meanwhile.
            moment += HOUR * (21 - wall.hour) if wall.hour < 21 else MINUTE * (60 - wall.minute)
            continue
        if wall.minute in schedule.minute:
            yield moment
        moment += MINUTE


def _is_its_day(schedule: Schedule, wall: datetime) -> bool:
    return wall.day in schedule.day_of_month and wall.isoweekday() % 7 in schedule.day_of_week


def as_schedule(value: Any) -> Schedule:
    """Return the schedule that a value in ``beat_schedule`` stands for.

    :param value: a schedule, which is returned as it is, or an interval as a ``timedelta`` or a
        number of seconds.
    :raises ValueError: the value is not a schedule, or its class cannot tell when it is due.
    """
    if isinstance(value, bool) or not (isinstance(value, KINDS) or _looks_like_one(value)):
        raise ValueError(
            f"{shown(value)} is not a schedule; give a crontab, a solar event, a timedelta or a"
            " number of seconds"
        )
    made: Schedule = value
    if isinstance(value, timedelta | int | float):
        try:
            made = schedules.schedule(value, app=current_app)
        except (ValueError, OverflowError):
            raise ValueError(
                f"{shown(value)} is not a schedule: it is not a length of time"
            ) from None
    if not overrides(made, "is_due", "remaining_estimate"):
        _check(made, value)
    return made


def _looks_like_one(value: Any) -> bool:
    """Whether a value has the methods that Celery calls on a schedule, whatever its class."""
    methods = (getattr(value, name, None) for name in ("is_due", "now"))
    return not isinstance(value, type) and all(map(callable, methods))


def _check(made: Schedule, value: Any) -> None:
    """Check that Celery's rules can tell when a schedule is due.

    :param value: the value from which the schedule was made, for the error's text.
    :raises ValueError: Celery's rules cannot tell, for example because an interval is 0.
    """
    if not isinstance(made, (schedules.schedule, *TIMED)):
        raise ValueError(
            f"{shown(value)} cannot be asked when it is due: its class {type(made).__name__} has"
            " neither an is_due() nor a remaining_estimate() of its own; define one of them"
        )
    if not _is_interval(made) or isinstance(getattr(type(made), "run_every", None), property):
        return
    every = getattr(made, "run_every", None)
    if not isinstance(every, timedelta):
        raise ValueError(
            f"{type(made).__name__} has run_every={every!r}, which is not a timedelta: set it to a"
            " timedelta, or define is_due() or remaining_estimate() in its class"
        )
    if every <= timedelta(0):
        raise ValueError(f"{shown(value)} is not a schedule: an interval must be longer than 0")
    if every > LONGEST:
        raise ValueError(
            f"{shown(value)} is not a schedule: an interval must be no longer than 100 years"
        )


#: Celery's classes of schedules whose due times do not depend on their last run.
TIMED = (schedules.crontab, schedules.solar)


def _is_interval(schedule: Schedule) -> bool:
    return isinstance(schedule, schedules.schedule)


def _aware(what: str, moment: datetime | None) -> datetime:
    if moment is None:
        return datetime.now(UTC)
    if moment.tzinfo is None:
        raise ValueError(f"{what}={moment!r} is not allowed; it has no time zone, give it one")
    return moment
