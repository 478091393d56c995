"""Schedule entries whose times are around noon of one day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from celery import Celery
from celery.schedules import crontab

from celery_singleton_state.beat import SingletonEntry

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)


def entry(app: Celery, schedule: Any = 60.0, due: datetime = NOON, **fields: Any) -> SingletonEntry:
    """Return an entry whose next tick is at ``due``."""
    made = SingletonEntry(name="e", task="t", schedule=schedule, app=app, **fields)
    made.begin(due - MINUTE)
    made.next_tick = due
    return made


def on_the_30th_of_february(hour: Any) -> crontab:
    """Return a crontab for a day that does not exist, which Celery before 5.7 accepts."""
    made = crontab(0, hour)
    made.day_of_month, made.month_of_year = {30}, {2}
    return made
