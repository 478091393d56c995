"""When a schedule is due, asked of any moment; Celery's own schedules only know of now.

A crontab follows the clocks of its time zone. When they are put forward, what is due in the hour
that is left out is due as much later; when they are put back, what is due in the hour that comes
twice is due in the first one. Only a crontab of every hour counts hours that pass, and so leaves
out none and has the repeated one twice.

A schedule whose class has rules of its own is asked by these rules, see ``own_rules``.
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

KINDS = (schedules.BaseSchedule, timedelta, int, float)

Schedule = own_rules.Schedule

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
#: Clocks are changed by no more than this.
CHANGE = 2 * HOUR
#: Leap days are up to eight years apart, and those on one day of the week up to forty.
NEVER = own_rules.FOREVER
#: Longer intervals are mistakes, and lead out of the calendar.
LONGEST = timedelta(days=36525)
#: A time that is no multiple of any likely interval, and how many intervals may lie in it.
ODD, ODD_STEPS = timedelta(seconds=17.77), 200

#: Until Celery 5.7 a crontab went by the time zone of the times that its ``nowfun`` returned.
GOES_BY_NOWFUN = tuple(celery.VERSION[:2]) < (5, 7)


def next_runs(schedule: Any, n: int = 1, after: datetime | None = None) -> list[datetime]:
    """The next times at which a schedule is due, in its time zone.

    :param schedule: as in ``beat_schedule``: a crontab, a solar event, a schedule of one's own
        class, or an interval as a ``timedelta`` or a number of seconds. Intervals are counted from
        ``after``.
    :param n: how many times, at least 1. They are fewer if the schedule ends before, or its class
        cannot tell the others.
    :param after: aware, and not among them. None: now.
    :raises ValueError: ``n`` or ``after`` is not allowed, the schedule is never due, or its class
        cannot tell when it is.
    """
    if n < 1:
        raise ValueError(f"next_runs(): n={n!r} is not allowed; it is at least 1")
    asked = as_schedule(schedule)
    moment = _aware("next_runs(): after", after)
    zone = zone_of(asked)
    times: list[datetime] = []
    for _ in range(n):
        try:
            moment = _checked_due(asked, moment)
        except ValueError:
            if times:
                break
            raise
        times.append(moment.astimezone(zone))
    return times


def matches_now(schedule: Any, now: datetime | None = None) -> bool:
    """Whether a schedule is due in this minute.

    :param schedule: a crontab, a solar event, or a schedule of one's own class that has times of
        its own.
    :param now: aware. None: now.
    :raises ValueError: ``now`` is not aware, or the schedule is counted from its last run, as an
        interval is: it is due at no time of its own.
    """
    asked = as_schedule(schedule)
    if _is_interval(asked) and not overrides(asked, "is_due", "remaining_estimate"):
        raise ValueError(
            f"matches_now(): {shown(schedule)} is an interval, which has no times of its own"
        )
    moment = _aware("matches_now(): now", now)
    minute = moment.replace(second=0, microsecond=0)
    before = minute.astimezone(UTC) - timedelta.resolution
    if not overrides(asked, "is_due", *CRONTAB_METHODS):
        return next_due(asked, before) < minute + MINUTE
    try:
        due = _checked_due(asked, before)
    except NeverDue:
        return False
    if not _is_due_then(asked, due, before):
        raise ValueError(
            f"matches_now(): {shown(schedule)} is counted from its last run, and has no times of"
            " its own"
        )
    return due < minute + MINUTE


def _checked_due(asked: Schedule, after: datetime) -> datetime:
    """As :func:`next_due`; an error of the schedule's class is a ``ValueError``, too."""
    try:
        return next_due(asked, after)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{shown(asked)} cannot tell when it is due: {type(error).__name__}: {error}"
        ) from error


def _is_due_then(asked: Schedule, due: datetime, before: datetime) -> bool:
    """Whether a schedule is due at a time from wherever one counts.

    :param before: what the time was counted from.
    """
    moment = before - ODD
    for _ in range(ODD_STEPS):
        moment = next_due(asked, moment)
        if moment > before:
            return abs(moment - due) < timedelta(seconds=1)
    return False


def next_due(asked: Schedule, after: datetime, questions: int = own_rules.QUESTIONS) -> datetime:
    """The first time at which a schedule is due that is later than a moment, in UTC.

    :param questions: how often to ask a class with an ``is_due`` of its own at most.
    :raises NeverDue: there is none.
    :raises ValueError: the schedule's class cannot tell.
    """
    after = after.astimezone(UTC)
    if is_plain_interval(asked):
        plain: timedelta = asked.run_every
        return after + plain
    if has_own_is_due(asked):
        return simulated(asked, after, questions)
    if isinstance(asked, schedules.crontab) and not overrides(asked, *CRONTAB_METHODS):
        return _next_of_crontab(asked, after)
    return estimated(asked, after)


def _next_of_crontab(cron: Schedule, after: datetime) -> datetime:
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
        raise NeverDue(f"{shown(cron)} is never due")
    return found


def spelled(asked: Schedule) -> str:
    """A canonical text of a schedule: equal if and only if the schedules are equal."""
    if is_plain_interval(asked):
        return f"every {asked.run_every.total_seconds():.15g} s"
    zone = f" {zone_of(asked)}" if isinstance(asked, schedules.crontab) else ""
    return canonical_text(asked, zone)


def is_plain_interval(asked: Schedule) -> bool:
    """Whether a schedule is an interval that is counted from any moment."""
    return (
        isinstance(asked, schedules.schedule)
        and "run_every" in vars(asked)
        and not asked.relative
        and not overrides(asked, "is_due", "remaining_estimate", "now")
    )


def zone_of(asked: Schedule) -> tzinfo:
    """The time zone that a schedule's times are in."""
    nowfun = getattr(asked, "nowfun", None)
    if GOES_BY_NOWFUN and nowfun and "tz" not in vars(asked) and nowfun().tzinfo:
        found: tzinfo = nowfun().tzinfo
        return found
    named: tzinfo = timezone.get_timezone(getattr(asked, "tz", None) or UTC)
    return named


def _by_the_clock(asked: Schedule, after: datetime) -> Iterator[datetime]:
    """The times that a clock on the wall would show, from a little before a moment on.

    Where clocks are put forward, those that it leaves out come among those that follow.
    """
    zone = zone_of(asked)
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
                yield _in_utc(wall, zone)
            wall += MINUTE


def _in_utc(wall: datetime, zone: tzinfo) -> datetime:
    """The moment at which a clock on the wall shows a time, the first one if there are two.

    A time that the clock leaves out counts as if the clock had not been put forward.
    """
    if not hasattr(zone, "localize"):
        return wall.replace(tzinfo=zone).astimezone(UTC)
    # A time zone of pytz is only right about moments in UTC: without them it stands for the mean
    # solar time of its city.
    day = timedelta(days=1)
    offsets = [_offset(zone, wall.replace(tzinfo=UTC) + each) for each in (-day, day)]
    moments = [wall.replace(tzinfo=UTC) - offset for offset in offsets]
    shown = [each for each in moments if each.astimezone(zone).replace(tzinfo=None) == wall]
    return min(shown, default=moments[0])


def _offset(zone: tzinfo, moment: datetime) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta(0)


def _keeps_time(asked: Schedule, start: datetime, end: datetime) -> bool:
    """Whether the clocks are surely not changed between two moments or close to them."""
    if end - start > HOUR:
        return False
    zone = zone_of(asked)
    return _offset(zone, start - CHANGE) == _offset(zone, end + CHANGE)


def _every_hour(asked: Schedule, after: datetime) -> Iterator[datetime]:
    """The times of a crontab that does not look at the hour, as they pass."""
    zone = zone_of(asked)
    moment = after.replace(second=0, microsecond=0)
    end = moment + NEVER
    while moment < end:
        wall = moment.astimezone(zone)
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

    :raises ValueError: it is none, or nobody could tell when it is due.
    """
    if isinstance(value, bool) or not (isinstance(value, KINDS) or _looks_like_one(value)):
        raise ValueError(
            f"{shown(value)} is no schedule; a crontab, a solar event, a timedelta or seconds are"
        )
    made: Schedule = value
    if isinstance(value, timedelta | int | float):
        try:
            made = schedules.schedule(value, app=current_app)
        except (ValueError, OverflowError):
            raise ValueError(f"{shown(value)} is no schedule: it is no length of time") from None
    if not overrides(made, "is_due", "remaining_estimate"):
        _check(made, value)
    return made


def _looks_like_one(value: Any) -> bool:
    """Whether a value that is no schedule of Celery's can be asked like one, as Celery does."""
    methods = (getattr(value, name, None) for name in ("is_due", "now"))
    return not isinstance(value, type) and all(map(callable, methods))


def _check(made: Schedule, value: Any) -> None:
    """:raises ValueError: Celery's own rules cannot tell when this schedule is due."""
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
            f"{type(made).__name__} has run_every={every!r}, which is no timedelta: give it one, or"
            " define is_due() or remaining_estimate() in its class"
        )
    if every <= timedelta(0):
        raise ValueError(f"{shown(value)} is no schedule: an interval is longer than 0")
    if every > LONGEST:
        raise ValueError(f"{shown(value)} is no schedule: an interval is no longer than 100 years")


#: Celery's schedules that have times of their own.
TIMED = (schedules.crontab, schedules.solar)


def _is_interval(asked: Schedule) -> bool:
    return isinstance(asked, schedules.schedule)


def _aware(what: str, moment: datetime | None) -> datetime:
    if moment is None:
        return datetime.now(UTC)
    if moment.tzinfo is None:
        raise ValueError(f"{what}={moment!r} is not allowed; it has no time zone")
    return moment
