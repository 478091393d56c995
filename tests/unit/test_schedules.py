"""When schedules are due: as Celery says, and over the changes of the clocks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.schedules import crontab, schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_singleton_state import matches_now, next_runs
from celery_singleton_state.schedules import next_due

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.fixture
def berlin() -> Iterator[Celery]:
    app = Celery("berlin", set_as_current=False)
    app.conf.timezone = "Europe/Berlin"
    yield app
    app.close()


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def local(times: list[datetime]) -> list[str]:
    return [time.isoformat(timespec="minutes")[5:] for time in times]


fields = st.sets
crontabs = st.builds(
    lambda minute, hour, day, month, weekday: crontab(
        minute=minute, hour=hour, day_of_month=day, month_of_year=month, day_of_week=weekday
    ),
    st.one_of(st.just("*"), fields(st.integers(0, 59), min_size=1)),
    st.one_of(st.just("*"), fields(st.integers(0, 23), min_size=1)),
    st.one_of(st.just("*"), fields(st.integers(1, 28), min_size=1)),
    st.one_of(st.just("*"), fields(st.integers(1, 12), min_size=1)),
    st.one_of(st.just("*"), fields(st.integers(0, 6), min_size=1)),
)
moments = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1)).map(
    lambda moment: moment.replace(tzinfo=UTC)
)


@settings(max_examples=300, deadline=None)
@given(cron=crontabs, after=moments)
def test_a_crontab_is_due_when_celery_says_so(cron: crontab, after: datetime) -> None:
    """In UTC, where no clock is ever changed."""
    app = Celery("utc", set_as_current=False)
    cron.app, cron.nowfun = app, lambda: after
    assert next_due(cron, after) == after + cron.remaining_estimate(after)


@pytest.mark.parametrize(
    ("cron", "after", "due"),
    [
        # Forward: 02:30 is left out on the 29th of March.
        (
            {"hour": 2, "minute": 30},
            "2026-03-28T12:00+01:00",
            ["03-29T03:30+02:00", "03-30T02:30+02:00"],
        ),
        (
            {"minute": 30},
            "2026-03-29T01:00+01:00",
            ["03-29T01:30+01:00", "03-29T03:30+02:00", "03-29T04:30+02:00"],
        ),
        # What was left out is still to come.
        ({"hour": 2, "minute": 30}, "2026-03-29T03:10+02:00", ["03-29T03:30+02:00"]),
        # Back: 02:30 comes twice on the 25th of October.
        (
            {"hour": 2, "minute": 30},
            "2026-10-24T12:00+02:00",
            ["10-25T02:30+02:00", "10-26T02:30+01:00"],
        ),
        ({"hour": 2, "minute": 30}, "2026-10-25T02:10+01:00", ["10-26T02:30+01:00"]),
        (
            {"minute": 30},
            "2026-10-25T02:00+02:00",
            ["10-25T02:30+02:00", "10-25T02:30+01:00", "10-25T03:30+01:00"],
        ),
        ({"minute": 10}, "2026-10-25T02:40+02:00", ["10-25T02:10+01:00"]),
        # What is due at one time for two reasons is due once.
        (
            {"hour": "2,3", "minute": 30},
            "2026-03-29T00:00+01:00",
            ["03-29T03:30+02:00", "03-30T02:30+02:00"],
        ),
        (
            {"hour": 0, "minute": 0, "day_of_month": 29, "month_of_year": 2},
            "2026-01-01T00:00+01:00",
            ["02-29T00:00+01:00"],
        ),
    ],
)
def test_the_clocks_are_changed(
    berlin: Celery, cron: dict[str, Any], after: str, due: list[str]
) -> None:
    made = crontab(**cron, app=berlin)
    assert local(next_runs(made, len(due), at(after))) == due


def test_clocks_that_are_put_forward_by_half_an_hour() -> None:
    """On Lord Howe Island 02:00 to 02:30 is left out: 02:15 is due after 02:30 there."""
    app = Celery("lord howe", set_as_current=False)
    app.conf.timezone = "Australia/Lord_Howe"
    cron = crontab(hour=2, minute="15,30", app=app)
    due = next_runs(cron, 3, at("2026-10-04T01:00+10:30"))
    assert local(due) == ["10-04T02:30+11:00", "10-04T02:45+11:00", "10-05T02:15+11:00"]


def test_an_interval_is_counted_from_then() -> None:
    after = at("2026-01-01T00:00+00:00")
    for interval in (90, 90.0, timedelta(seconds=90), schedule(90)):
        assert [due - after for due in next_runs(interval, 2, after)] == [
            timedelta(seconds=90),
            timedelta(seconds=180),
        ]


def test_without_a_moment_it_is_now() -> None:
    (due,) = next_runs(60)
    assert timedelta(0) < due - datetime.now(UTC) <= timedelta(seconds=60)


def test_matches_the_minute(berlin: Celery) -> None:
    cron = crontab(hour=9, minute=15, app=berlin)
    for time, matches in {
        "09:14:59": False,
        "09:15:00": True,
        "09:15:59": True,
        "09:16:00": False,
    }.items():
        assert matches_now(cron, at(f"2026-06-01T{time}+02:00")) is matches
    assert matches_now(crontab())


def on_the_30th_of_february(hour: Any) -> crontab:
    """As Celery before 5.7 lets one make it."""
    made = crontab(0, hour)
    made.day_of_month, made.month_of_year = {30}, {2}
    return made


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: next_runs(60, 0), "n=0 is not allowed; it is at least 1"),
        (lambda: next_runs(60, 1, datetime(2026, 1, 1)), "it has no time zone"),
        (lambda: next_runs("* * * * *"), "is no schedule"),
        (lambda: next_runs(True), "is no schedule"),
        (lambda: next_runs(-1), "an interval is longer than 0"),
        (lambda: next_runs(on_the_30th_of_february("*")), "is never due"),
        (lambda: next_runs(on_the_30th_of_february(0)), "is never due"),
        (lambda: matches_now(60), "is an interval"),
        (lambda: matches_now(crontab(), datetime(2026, 1, 1)), "it has no time zone"),
    ],
)
def test_bad_input(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
