"""Find out when a schedule is due if its class overrides Celery's rules.

Celery asks a schedule only about the present, by calling ``is_due(last_run_at)``. This module asks
about any time: it copies the schedule and replaces the copy's ``nowfun`` by a clock that stands
still at that time. A class can read another clock instead, for example the host's. The answer of
such a class is about the present, so the due time is counted from the present.
"""

from __future__ import annotations

import math
import numbers
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from celery import schedules

#: The type of a schedule. It is ``Any``, because the type stubs of Celery lack most attributes.
Schedule = Any

#: Celery's classes of schedules. Methods of these classes do not count as a schedule's own rules.
CELERYS = (schedules.BaseSchedule, schedules.schedule, schedules.crontab, schedules.solar)
#: Modules of other packages with a crontab class whose ``is_due`` only converts its argument and
#: then calls Celery's ``is_due``. So the class does not count as having an ``is_due`` of its own.
ONLY_CONVERT = ("django_celery_beat.tzcrontab", "sqlalchemy_celery_beat.tzcrontab")

#: If a due time comes from the host's clock, it is rounded up to a multiple of this time. Otherwise
#: two calls would return different times for one due time, because time passes between the calls.
GRAIN = timedelta(seconds=0.1)
#: The longest time that a call of a schedule's method is assumed to take. This time is subtracted
#: before a due time is rounded up. So the duration of a call does not move the due time.
CALL = timedelta(seconds=0.01)
#: ``is_due`` answers how many seconds later it wants to be called again. This is the shortest time
#: that is waited if it answers more than 0 seconds.
LEAST = timedelta(seconds=0.01)
#: The time that is waited before the next call of ``is_due`` if it answers 0 seconds or less.
AT_ONCE = timedelta(seconds=1)
#: If ``is_due`` answers this many seconds or more, the schedule is never asked again.
#: django-celery-beat returns this number for that purpose.
NEVER_CHECK = 100_000_000
#: How far ahead of the given time a due time is searched before a schedule counts as never due.
FOREVER = timedelta(days=41 * 366)
#: The most calls of ``is_due`` to find one due time.
QUESTIONS = 50_000


class NeverDue(ValueError):
    """A schedule is not due after the given time.

    :param due: the only time at which the schedule is due, if it has only one.
    """

    def __init__(self, text: str, due: datetime | None = None) -> None:
        super().__init__(text)
        self.due = due


class Answer(NamedTuple):
    """The answer of a schedule's ``is_due``.

    :param due: whether the schedule is due.
    :param pause: how long to wait before the next call of ``is_due``; ``None`` if there is none.
    :param of_then: whether the schedule's class read the clock that it was given. If not, the
        answer is about the present.
    """

    due: bool
    pause: timedelta | None
    of_then: bool

    def again(self, at: datetime, now: datetime) -> datetime | None:
        """Return the time of the next call of ``is_due``; ``None`` if there is no next call.

        :param at: the time about which the schedule was asked.
        :param now: the present time. If the class read another clock, its answer counts from this
            time.
        """
        if self.pause is None:
            return None
        if self.of_then:
            return at + self.pause
        start = max(now, at)
        found = _rounded_up(start + self.pause - CALL)
        return found if found > start else found + GRAIN


def shown(schedule: Any) -> str:
    """Return the ``repr`` of a schedule for an error, or its class's name if ``repr`` fails."""
    try:
        return repr(schedule)
    except Exception:
        return f"<{type(schedule).__name__}>"


def overrides(schedule: Schedule, *methods: str) -> bool:
    """Whether a schedule has its own version of one of these methods, and not Celery's."""
    return any(_is_own(schedule, method) for method in methods)


def has_own_is_due(schedule: Schedule) -> bool:
    """Whether a schedule's class has an ``is_due`` with rules that are not Celery's."""
    module = getattr(getattr(type(schedule), "is_due", None), "__module__", None)
    return overrides(schedule, "is_due") and module not in ONLY_CONVERT


def estimated(schedule: Schedule, after: datetime) -> datetime:
    """Ask a schedule's ``remaining_estimate`` for the first due time after ``after``, in UTC.

    :raises NeverDue: the schedule is not due after this time.
    :raises ValueError: the schedule's class cannot tell when the schedule is due.
    """
    found = _estimate(schedule, after, after)
    if found is None:
        raise NeverDue(f"{shown(schedule)} is not due after {after}")
    if found > after:
        return found
    # The due time has passed. If the schedule gives the same answer when it is asked about a time
    # one day later, this is its only due time.
    if found == _estimate(schedule, after, after + timedelta(days=1)):
        raise NeverDue(f"{shown(schedule)} is due once, at {found}", found)
    raise ValueError(
        f"{shown(schedule)} cannot tell when it is due after {after}: it answers {found}"
    )


def simulated(schedule: Schedule, after: datetime, questions: int = QUESTIONS) -> datetime:
    """Find the first due time after ``after``, in UTC, by calling ``is_due`` as Celery would.

    :param questions: the most calls of ``is_due``.
    :raises NeverDue: the schedule is not due after this time.
    :raises ValueError: the schedule's class cannot tell when the schedule is due.
    """
    made, at = _at(schedule, after)[0], after
    for _ in range(questions):
        if at - after > FOREVER:
            raise NeverDue(f"{shown(schedule)} is not due until {at}")
        answer = ask(made, after, at)
        if answer.due and at > after:
            return at
        if answer.pause is None:
            raise NeverDue(f"{shown(schedule)} is not due after {at}")
        if not (answer.of_then or answer.due):
            return _present(made, after, answer)
        at += answer.pause
    raise ValueError(
        f"{shown(schedule)} cannot tell when it is due after {after}; it is not due until {at}"
    )


def ask(schedule: Schedule, last: datetime, at: datetime) -> Answer:
    """Ask a schedule whether it is due at a time.

    A copy of the schedule is asked. The attributes that ``is_due`` sets on it are copied back.

    :param last: the time of the last run, from which the schedule counts.
    :param at: the time about which the schedule is asked.
    :raises ValueError: ``is_due`` raised an error, or its answer is not one that Celery can use.
    """
    made, clock = _at(schedule, at)
    try:
        due, left = made.is_due(_as_last_run(schedule, last))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{shown(schedule)}: is_due() failed: {error}") from error
    finally:
        _keep(schedule, made)
    return Answer(bool(due), _pause(schedule, left), clock.was_read)


def _present(schedule: Schedule, after: datetime, answer: Answer) -> datetime:
    """Return the next due time of a schedule whose class reads another clock, such as the host's.

    :param answer: the answer of the schedule's ``is_due``, which is about the present.
    :raises ValueError: the class cannot tell when the schedule is due: it answers with the same
        pause whatever its last run was.
    """
    now = datetime.now(UTC)
    found = answer.again(now, now)
    if found is None or found <= after or ask(schedule, after, after).pause == answer.pause:
        raise ValueError(f"{shown(schedule)} cannot tell when it is due after {after}")
    return found


def _is_own(schedule: Schedule, method: str) -> bool:
    if method in getattr(schedule, "__dict__", ()):
        return True
    own = getattr(type(schedule), method, None)
    return own is not None and own not in [getattr(each, method, None) for each in CELERYS]


def _estimate(schedule: Schedule, after: datetime, at: datetime) -> datetime | None:
    """Return the due time that ``remaining_estimate`` gives; ``None`` if there is none.

    :param after: the time of the last run, from which the schedule counts.
    :param at: the time about which the schedule is asked.
    """
    left, of_then = _left(schedule, after, at)
    if left is None:
        return None
    # If a second call gives the same answer, the class reads no running clock, and the answer is
    # about ``at``.
    of_then = of_then or left == _left(schedule, after, at)[0]
    try:
        return at + left if of_then else _rounded_up(datetime.now(UTC) + left - CALL)
    except OverflowError:
        if left > timedelta(0):
            return None
        raise ValueError(
            f"{shown(schedule)} cannot tell when it is due: it answers {-left} ago"
        ) from None


def _left(schedule: Schedule, after: datetime, at: datetime) -> tuple[timedelta | None, bool]:
    """Return the answer of ``remaining_estimate``, and whether the method read the given clock."""
    made, clock = _at(schedule, at)
    left = made.remaining_estimate(_as_last_run(schedule, after))
    if left is not None and not isinstance(left, timedelta):
        raise ValueError(
            f"{shown(schedule)}: remaining_estimate() returned {left!r}, not a timedelta"
        )
    return left, clock.was_read


def _pause(schedule: Schedule, left: Any) -> timedelta | None:
    """Convert the seconds that ``is_due`` answers to the time until the next call of ``is_due``.

    ``None`` if ``is_due`` need not be called again.
    """
    if isinstance(left, timedelta):
        left = left.total_seconds()
    if left is None:
        return None
    if isinstance(left, bool) or not isinstance(left, numbers.Real) or math.isnan(left):
        raise ValueError(
            f"{shown(schedule)}: is_due() returned {left!r} as the time until its next call, not a"
            " number of seconds"
        )
    seconds = float(left)
    if seconds >= NEVER_CHECK:
        return None
    return max(timedelta(seconds=seconds), LEAST) if seconds > 0 else AT_ONCE


class _Clock:
    """A ``nowfun`` that always returns the same time, and records whether it was called."""

    def __init__(self, moment: datetime) -> None:
        self._moment = moment
        self.was_read = False

    def __call__(self) -> datetime:
        self.was_read = True
        return self._moment


def _at(schedule: Schedule, moment: datetime) -> tuple[Schedule, _Clock]:
    """Return a copy of a schedule whose clock stands still at a time, and that clock.

    The clock returns the time in the same time zone as the schedule's own clock.
    """
    zone = schedule.now().tzinfo
    if not overrides(schedule, "is_due", "remaining_estimate", "now"):
        zone = _zoneinfo_of(zone)
    # If the schedule's own clock returns times without a time zone, Celery takes them for UTC.
    shown = moment.astimezone(zone) if zone else moment.astimezone(UTC).replace(tzinfo=None)
    clock = _Clock(shown)
    if not hasattr(schedule, "__dict__"):
        # No clock can be set on an object without a __dict__. So the object itself is asked, and
        # its answer is about the present.
        return schedule, clock
    made = _copy(schedule)
    made.nowfun = clock
    return made, clock


def _zoneinfo_of(zone: tzinfo | None) -> tzinfo | None:
    """Replace a pytz time zone by the ``zoneinfo`` one, because Celery adds days to local times.

    With a pytz time zone, such a sum would keep the UTC offset of the day before.
    """
    name = getattr(zone, "zone", None) if hasattr(zone, "localize") else None
    if not isinstance(name, str):
        return zone
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        return zone


def _copy(schedule: Schedule) -> Schedule:
    """Copy a schedule with all its attributes.

    ``copy.copy`` is not used, because it calls ``__reduce__``. Most classes inherit that method
    from Celery's schedules, and Celery's method leaves out the arguments that a class adds.
    """
    made = object.__new__(type(schedule))
    made.__dict__.update(vars(schedule))
    return made


def _keep(schedule: Schedule, made: Schedule) -> None:
    """Write the attributes of a schedule's copy back to the schedule, except for the clock."""
    if made is schedule:
        return
    noted = {name: value for name, value in vars(made).items() if name != "nowfun"}
    schedule.__dict__.update(noted)


def _as_last_run(schedule: Schedule, moment: datetime) -> datetime:
    """Return the time of a last run as Celery stores it: as the schedule's clock shows the time."""
    made, clock = _at(schedule, moment)
    shown: datetime = made.now()
    if clock.was_read:
        return shown
    zone = shown.tzinfo
    passed = moment - datetime.now(UTC)
    if zone is None:
        return shown + passed
    return (shown.astimezone(UTC) + passed).astimezone(zone)


def _rounded_up(moment: datetime) -> datetime:
    return moment + -(moment - datetime.min.replace(tzinfo=UTC)) % GRAIN
