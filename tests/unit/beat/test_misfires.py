"""Skipping missed ticks with ``skip_ticks``: the count is exact, and no turn takes long."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any

import pytest
from celery import Celery
from celery.schedules import crontab, solar

from celery_singleton_state.beat import misfires
from celery_singleton_state.beat.misfires import MAX_OWED, TURN, skip_ticks, surplus
from celery_singleton_state.schedules.due import next_due
from tests.helpers.entries import HOUR, MINUTE, NOON, SECOND, entry

BERLIN, YEARS = "Europe/Berlin", timedelta(days=41 * 366)
#: Five days before clocks in Europe go back (25 October 2026). They go forward on 28 March 2027.
AUTUMN = datetime(2026, 10, 20, tzinfo=UTC)


def at(zone: str, **fields: Any) -> Any:
    app = Celery("shop", set_as_current=False)
    app.conf.timezone = zone
    return crontab(**fields, app=app)


def one_by_one(asked: Any, due: datetime, until: datetime) -> tuple[int, datetime]:
    count = 0
    while (following := next_due(asked, due)) <= until:
        count, due = count + 1, following
    return count, due


def all_turns(
    asked: Any, due: datetime, until: datetime, at_most: float = inf
) -> tuple[int, datetime]:
    count = 0
    while True:
        passed, due, is_through = skip_ticks(
            asked, due, until, lambda moment: next_due(asked, moment), at_most - count
        )
        count += passed
        if is_through:
            return count, due


@pytest.mark.parametrize("zone", ["UTC", BERLIN, "America/Havana", "Asia/Kolkata"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"minute": "*/15"},
        {"minute": "30", "hour": "2"},
        {"minute": "10,50", "hour": "0-3,23"},
        {"minute": "5", "hour": "*/6", "day_of_week": "mon-fri"},
        {"minute": "*/20", "day_of_month": "28-31", "month_of_year": "3,10"},
    ],
)
def test_skipping_by_days_counts_as_skipping_one_by_one(zone: str, fields: dict[str, str]) -> None:
    asked = at(zone, **fields)
    # A whole winter (165 days) would take too long for a crontab that is due every minute.
    for days in (3, 8, 165 if fields else 0):
        first = next_due(asked, AUTUMN + 7 * HOUR)
        until = max(first, AUTUMN + timedelta(days=days, hours=13))
        assert all_turns(asked, first, until) == one_by_one(asked, first, until)


def test_no_more_ticks_are_skipped_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misfires, "TURN", 60.0)
    asked = at(BERLIN)
    first = next_due(asked, AUTUMN)
    assert all_turns(asked, first, first + YEARS, 5000) == (5000, first + 5000 * MINUTE)


@pytest.mark.parametrize("schedule", [crontab(), at(BERLIN), 60.0, at(BERLIN, minute="7")])
def test_41_years_of_ticks_are_skipped_in_short_turns(schedule: Any) -> None:
    """Each turn takes a fraction of a second of CPU time.

    The bound is 20 times the length that a turn should have, because the machine may be busy.
    """
    made = entry(Celery("shop", set_as_current=False), schedule)
    if not isinstance(schedule, float):
        made.next_tick = next_due(schedule, NOON - SECOND)
    longest = turns = 0.0
    now = NOON + YEARS
    while made.next_tick < now - HOUR and turns < 10_000:
        began = time.process_time()
        made.miss(now)
        longest, turns = max(longest, time.process_time() - began), turns + 1
    assert made.next_tick <= now + HOUR
    assert longest < 20 * TURN
    assert made.missed_count > 300_000


def test_ticks_of_a_slow_schedule_are_skipped_in_turns() -> None:
    class Slow(solar):
        def remaining_estimate(self, last_run_at: datetime) -> timedelta:
            time.sleep(TURN / 3)
            return HOUR

    made = entry(Celery("shop", set_as_current=False), Slow("sunset", 0.0, 0.0))
    now = NOON + 20 * HOUR
    assert 0 < made.miss(now) < 20
    assert made.is_passing
    while made.miss(now):
        pass
    assert (made.next_tick, made.missed_count, made.is_passing) == (now, 20, False)


@pytest.mark.parametrize("schedule", [60.0, crontab(), crontab(minute="*/2")])
def test_surplus_counts_the_owed_ticks_beyond_the_bound(schedule: Any) -> None:
    made = entry(Celery("shop", set_as_current=False), schedule)
    every = timedelta(minutes=2 if "2" in str(schedule) else 1)
    for more in (0, 1, 700, 3000):
        now = NOON + (MAX_OWED - 1 + more) * every + SECOND
        assert surplus(made.schedule, NOON, now) == more
