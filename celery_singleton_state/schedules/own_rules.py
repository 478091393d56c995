"""Schedules with rules of their own: ask their class when they are due.

Celery asks a schedule only about the present, by ``is_due(last_run_at)``. Here a class is asked
about any moment: its ``nowfun`` is replaced, in a copy of the schedule, by a clock that stands at
that moment. A class may look at another clock instead, its host's for example. Such a class is
believed about the present, and what it answers is counted from the present.
"""

from __future__ import annotations

import math
import numbers
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from celery import schedules

#: A schedule of Celery's, whose types leave out most of what one has.
Schedule = Any

CELERYS = (schedules.BaseSchedule, schedules.schedule, schedules.crontab, schedules.solar)
#: Packages whose time zone aware crontab has an ``is_due`` that only converts its argument.
ONLY_CONVERT = ("django_celery_beat.tzcrontab", "sqlalchemy_celery_beat.tzcrontab")

#: Times that come from a host's clock differ by how long a call takes: they are rounded to this.
GRAIN = timedelta(seconds=0.1)
#: How long a call may take.
CALL = timedelta(seconds=0.01)
#: The least time between two questions.
LEAST = timedelta(seconds=0.01)
#: When a class is asked again that says at once.
AT_ONCE = timedelta(seconds=1)
#: Seconds that mean never; django-celery-beat says so.
NEVER_CHECK = 100_000_000
#: No class is asked about moments that are later than this.
FOREVER = timedelta(days=41 * 366)
#: How often a class is asked for one due time that lies ahead.
QUESTIONS = 50_000


class NeverDue(ValueError):
    """A schedule has no due time after a moment.

    :param due: the only time at which the schedule is due, if it has only one.
    """

    def __init__(self, text: str, due: datetime | None = None) -> None:
        super().__init__(text)
        self.due = due


class Answer(NamedTuple):
    """What ``is_due`` says.

    :param pause: how long until the schedule is to be asked again; ``None``: for ever.
    :param of_then: whether the class looked at the clock that it was given.
    """

    due: bool
    pause: timedelta | None
    of_then: bool

    def again(self, at: datetime, now: datetime) -> datetime | None:
        """When to ask again; ``None``: never.

        :param at: the moment that the schedule was asked about; ``now``: the present, from which a
            class counts that looks at another clock.
        """
        if self.pause is None:
            return None
        if self.of_then:
            return at + self.pause
        start = max(now, at)
        found = _rounded_up(start + self.pause - CALL)
        return found if found > start else found + GRAIN


def shown(asked: Any) -> str:
    """A schedule for people. Its class may not be able to show it."""
    try:
        return repr(asked)
    except Exception:
        return f"<{type(asked).__name__}>"


def overrides(asked: Schedule, *methods: str) -> bool:
    """Whether a schedule has one of these methods from another class than Celery's."""
    return any(_is_own(asked, method) for method in methods)


def has_own_is_due(asked: Schedule) -> bool:
    """Whether a schedule says itself whether it is due."""
    module = getattr(getattr(type(asked), "is_due", None), "__module__", None)
    return overrides(asked, "is_due") and module not in ONLY_CONVERT


def estimated(asked: Schedule, after: datetime) -> datetime:
    """The first due time after a moment, by the schedule's ``remaining_estimate``, in UTC.

    :raises NeverDue: there is none.
    :raises ValueError: the class cannot tell.
    """
    found = _estimate(asked, after, after)
    if found is None:
        raise NeverDue(f"{shown(asked)} is not due after {after}")
    if found > after:
        return found
    # A schedule of one time names this time whenever it is asked.
    if found == _estimate(asked, after, after + timedelta(days=1)):
        raise NeverDue(f"{shown(asked)} is due once, at {found}", found)
    raise ValueError(f"{shown(asked)} cannot tell: after {after} it is due at {found}")


def simulated(asked: Schedule, after: datetime, questions: int = QUESTIONS) -> datetime:
    """The first due time after a moment, by asking ``is_due`` as often as Celery would, in UTC.

    :param questions: how often to ask at most.
    :raises NeverDue: there is none.
    :raises ValueError: the class cannot tell.
    """
    made, at = _at(asked, after)[0], after
    for _ in range(questions):
        if at - after > FOREVER:
            raise NeverDue(f"{shown(asked)} is not due until {at}")
        answer = ask(made, after, at)
        if answer.due and at > after:
            return at
        if answer.pause is None:
            raise NeverDue(f"{shown(asked)} is not due after {at}")
        if not (answer.of_then or answer.due):
            return _present(made, after, answer)
        at += answer.pause
    raise ValueError(
        f"{shown(asked)} cannot tell when it is due after {after}; until {at} it is not"
    )


def ask(asked: Schedule, last: datetime, at: datetime) -> Answer:
    """Ask a schedule whether it is due at a moment. The schedule keeps what it notes meanwhile.

    :param last: what it counts from, as its last run.
    :raises ValueError: it gives no answer that Celery could use.
    """
    made, clock = _at(asked, at)
    try:
        due, left = made.is_due(_as_last_run(asked, last))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{shown(asked)}: is_due() cannot be used: {error}") from error
    finally:
        _keep(asked, made)
    return Answer(bool(due), _pause(asked, left), clock.was_read)


def _present(asked: Schedule, after: datetime, answer: Answer) -> datetime:
    """The next due time of a schedule that looks at another clock, as its class sees the present.

    :raises ValueError: its class cannot tell: it always wants to be asked again as much later.
    """
    now = datetime.now(UTC)
    found = answer.again(now, now)
    if found is None or found <= after or ask(asked, after, after).pause == answer.pause:
        raise ValueError(f"{shown(asked)} cannot tell when it is due after {after}")
    return found


def _is_own(asked: Schedule, method: str) -> bool:
    if method in getattr(asked, "__dict__", ()):
        return True
    own = getattr(type(asked), method, None)
    return own is not None and own not in [getattr(each, method, None) for each in CELERYS]


def _estimate(asked: Schedule, after: datetime, at: datetime) -> datetime | None:
    """When a schedule is due next after a moment, as it says at another one."""
    left, of_then = _left(asked, after, at)
    if left is None:
        return None
    # A class that looks at another clock answers something else a moment later.
    of_then = of_then or left == _left(asked, after, at)[0]
    try:
        return at + left if of_then else _rounded_up(datetime.now(UTC) + left - CALL)
    except OverflowError:
        if left > timedelta(0):
            return None
        raise ValueError(f"{shown(asked)} cannot tell: it is due {-left} ago") from None


def _left(asked: Schedule, after: datetime, at: datetime) -> tuple[timedelta | None, bool]:
    """What ``remaining_estimate`` says, and whether it looked at the clock that it was given."""
    made, clock = _at(asked, at)
    left = made.remaining_estimate(_as_last_run(asked, after))
    if left is not None and not isinstance(left, timedelta):
        raise ValueError(f"{shown(asked)}: remaining_estimate() returned {left!r}, not a timedelta")
    return left, clock.was_read


def _pause(asked: Schedule, left: Any) -> timedelta | None:
    """How long it is until a schedule is to be asked again; ``None``: for ever."""
    if isinstance(left, timedelta):
        left = left.total_seconds()
    if left is None:
        return None
    if isinstance(left, bool) or not isinstance(left, numbers.Real) or math.isnan(left):
        raise ValueError(
            f"{shown(asked)}: is_due() wants to be asked again in {left!r}, not in seconds"
        )
    seconds = float(left)
    if seconds >= NEVER_CHECK:
        return None
    return max(timedelta(seconds=seconds), LEAST) if seconds > 0 else AT_ONCE


class _Clock:
    """A clock that stands still, and knows whether it was looked at."""

    def __init__(self, moment: datetime) -> None:
        self._moment = moment
        self.was_read = False

    def __call__(self) -> datetime:
        self.was_read = True
        return self._moment


def _at(asked: Schedule, moment: datetime) -> tuple[Schedule, _Clock]:
    """A schedule whose clock stands at a moment, and shows it as its own clock does."""
    zone = asked.now().tzinfo
    if not overrides(asked, "is_due", "remaining_estimate", "now"):
        zone = _zoneinfo_of(zone)
    # Celery takes a time without a time zone for one in UTC.
    shown = moment.astimezone(zone) if zone else moment.astimezone(UTC).replace(tzinfo=None)
    clock = _Clock(shown)
    if not hasattr(asked, "__dict__"):
        # It has no place for a clock, and is believed about the present.
        return asked, clock
    made = _copy(asked)
    made.nowfun = clock
    return made, clock


def _zoneinfo_of(zone: tzinfo | None) -> tzinfo | None:
    """A time zone of pytz as one in which days can be added, where Celery adds them."""
    name = getattr(zone, "zone", None) if hasattr(zone, "localize") else None
    if not isinstance(name, str):
        return zone
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        return zone


def _copy(asked: Schedule) -> Schedule:
    """The same schedule as another object.

    ``copy.copy`` calls the class with the arguments of its ``__reduce__``, which most classes have
    from Celery's schedules: without their own arguments.
    """
    made = object.__new__(type(asked))
    made.__dict__.update(vars(asked))
    return made


def _keep(asked: Schedule, made: Schedule) -> None:
    """Have a schedule keep what its copy noted."""
    if made is asked:
        return
    noted = {name: value for name, value in vars(made).items() if name != "nowfun"}
    asked.__dict__.update(noted)


def _as_last_run(asked: Schedule, moment: datetime) -> datetime:
    """A moment as Celery would have noted it for a last run: what the schedule's clock shows."""
    made, clock = _at(asked, moment)
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
