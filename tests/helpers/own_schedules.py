"""Schedule classes as users write them, with rules of their own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from celery import Celery
from celery.schedules import BaseSchedule, crontab, schedstate, schedule

from celery_singleton_state.schedules.due import spelled

DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
SECOND = timedelta(seconds=1)


class LastDayOfMonth(crontab):
    """A crontab that is due only on the last day of a month; it overrides
    ``remaining_estimate``.
    """

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        moment, now = last_run_at, self.now()
        while True:
            self.nowfun, nowfun = (lambda at=moment: at), self.nowfun
            moment += super().remaining_estimate(moment)
            self.nowfun = nowfun
            if (moment + DAY).month != moment.month:
                return moment - now


class BusinessDays(crontab):
    """A crontab that is not due at the weekend; it overrides ``is_due``."""

    def is_due(self, last_run_at: datetime) -> Any:
        if self.now().isoweekday() > 5:
            return schedstate(False, 3600)
        return super().is_due(last_run_at)


class EveryFromTable(schedule):
    """An interval that ``is_due`` reads from a table each time, without the attribute
    ``run_every``.
    """

    def __init__(self, **options: Any) -> None:
        self.table = {"seconds": 30.0}
        super().__init__(**options)

    def is_due(self, last_run_at: datetime) -> Any:
        seconds = self.table["seconds"]
        left = seconds - (self.now() - last_run_at).total_seconds()
        return schedstate(left <= 0, left if left > 0 else seconds)


class FromTableAsProperty(schedule):
    """An interval that the property ``run_every`` reads from a table."""

    def __init__(self, **options: Any) -> None:
        self.table = {"seconds": 30.0}
        super().__init__(**options)

    @property
    def run_every(self) -> timedelta:
        return timedelta(seconds=self.table["seconds"])

    @run_every.setter
    def run_every(self, value: Any) -> None:
        pass


class Later(crontab):
    """A crontab whose due times are later by an offset."""

    def __init__(self, *fields: Any, offset: timedelta = timedelta(0), **options: Any) -> None:
        self.offset = offset
        super().__init__(*fields, **options)

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        return super().remaining_estimate(last_run_at - self.offset) + self.offset


class LaterClock(crontab):
    """A crontab whose clock is seven minutes slow."""

    def now(self) -> datetime:
        return super().now() - 7 * MINUTE


class Once(BaseSchedule):
    """A schedule that is due at one fixed time, whatever the last run was."""

    def __init__(self, at: datetime, **options: Any) -> None:
        self.at = at
        super().__init__(**options)

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        return self.at - self.now()


class Answers(BaseSchedule):
    """A schedule whose ``remaining_estimate`` always returns the given value."""

    def __init__(self, answer: Any, **options: Any) -> None:
        self.answer = answer
        super().__init__(**options)

    def remaining_estimate(self, last_run_at: datetime) -> Any:
        return self.answer


class SaysDue(BaseSchedule):
    """A schedule whose ``is_due`` always returns the given values."""

    def __init__(self, *answer: Any, **options: Any) -> None:
        self.answer = answer
        super().__init__(**options)

    def is_due(self, last_run_at: datetime) -> Any:
        return self.answer


class OnceAnHour(schedule):
    """A schedule that is due in the first minute of an hour, and asks to be checked every five
    seconds.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(5.0, **options)

    def is_due(self, last_run_at: datetime) -> Any:
        now = self.now()
        return schedstate(now.minute == 0 and now - last_run_at > HOUR / 2, 5)


class HostClock(schedule):
    """An interval of 30 s that reads the host's clock instead of calling its own ``now()``."""

    def is_due(self, last_run_at: datetime) -> Any:
        left = (last_run_at + 30 * SECOND - datetime.now(UTC)).total_seconds()
        return schedstate(left <= 0, left if left > 0 else 30)


class HostClockEstimate(schedule):
    """A schedule that is due at each full minute of the host's clock, not of its own ``now()``."""

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        minute = last_run_at.replace(second=0, microsecond=0) + MINUTE
        return minute - datetime.now(UTC)


class OnlyOnce(BaseSchedule):
    """A schedule that is due once, and then remembers this in an attribute of its own."""

    fired = False

    def is_due(self, last_run_at: datetime) -> Any:
        if self.fired:
            return schedstate(False, 60)
        self.fired = True
        return schedstate(True, 60)


class Broken(BaseSchedule):
    """A schedule whose first two checks fail, because its table is unavailable."""

    def __init__(self, **options: Any) -> None:
        self.errors = 2
        super().__init__(**options)

    def is_due(self, last_run_at: datetime) -> Any:
        if self.errors:
            self.errors -= 1
            raise ConnectionError("no table")
        return schedstate(True, 60)


class ChangesItself(schedule):
    """A schedule that changes its interval when it is checked."""

    def is_due(self, last_run_at: datetime) -> Any:
        self.run_every = 30 * SECOND
        return super().is_due(last_run_at)


class Duck:
    """A schedule that is not a subclass of Celery's."""

    __slots__ = ("app",)

    def now(self) -> datetime:
        return datetime.now(UTC)

    def is_due(self, last_run_at: datetime) -> Any:
        return schedstate(True, 60)


class Calendar:
    def __init__(self, days: set[str]) -> None:
        self.days = days


OPTIONS = {"country": "DE", "days": {"a", "b", "c", "d"}, "when": lambda: 1, "by": [1, (2,)]}


def own_texts() -> list[str]:
    """Return the canonical texts of schedules with attributes that are hard to describe: they have
    no text, or a different text in each process.
    """
    loop: list[Any] = []
    loop.append(loop)
    # Give the crontabs this app, because a crontab's text names the time zone of its app, or of
    # Celery's current app if it has none.
    app = Celery(set_as_current=False)
    return [
        spelled(SaysDue(True, 60)),
        spelled(Answers(OPTIONS)),
        spelled(Answers(Calendar({"a"}))),
        spelled(Answers(partial(max, 1))),
        spelled(Answers(loop)),
        spelled(Answers([[]] * 1000)),
        spelled(Later("*/5", offset=HOUR, app=app)),
        spelled(EveryFromTable()),
        spelled(Duck()),
        spelled(crontab(minute=[3, 1], day_of_month={5, 4}, app=app)),
    ]
