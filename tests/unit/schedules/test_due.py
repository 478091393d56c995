"""Due times of schedules: they equal Celery's, and are right when clocks change."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import pytz
from celery import Celery
from celery.schedules import crontab, schedule
from dateutil import tz as dateutil_tz
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_singleton_state import matches_now, next_runs
from celery_singleton_state.schedules.due import GOES_BY_NOWFUN, next_due, spelled
from tests.helpers.entries import on_the_30th_of_february

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
    """The test uses UTC, because in other time zones clocks change."""
    app = Celery("utc", set_as_current=False)
    cron.app, cron.nowfun = app, lambda: after
    assert next_due(cron, after) == after + cron.remaining_estimate(after)


#: Time zones with all kinds of clock changes: in both hemispheres, by 30 minutes, by two hours and
#: at midnight; also zones whose clocks no longer change, or never did.
ZONES = [
    *("Europe/Berlin", "Europe/Dublin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"),
    *("Pacific/Apia", "America/Santiago", "Asia/Kathmandu", "Antarctica/Troll", "UTC"),
]
KINDS = {"pytz": pytz.timezone, "dateutil": dateutil_tz.gettz, "name": str}


def in_zone(cron: crontab, zone: Any) -> crontab:
    """Return a copy of the crontab that has a time zone of its own."""
    made = crontab(*cron.__reduce__()[1], app=Celery("zoned", set_as_current=False))
    made.tz = zone
    return made


@settings(max_examples=300, deadline=None)
@given(
    cron=crontabs,
    after=moments,
    name=st.sampled_from(ZONES),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_a_crontab_is_due_at_the_same_times_in_each_kind_of_time_zone(
    cron: crontab, after: datetime, name: str, kind: str
) -> None:
    due = next_due(in_zone(cron, ZoneInfo(name)), after)
    assert next_due(in_zone(cron, KINDS[kind](name)), after) == due


def changes(zone: ZoneInfo, year: int) -> list[datetime]:
    """Return the hours of a year at which the clocks change, or its first hour if they never do."""
    start = datetime(year, 1, 1, tzinfo=UTC)
    hours = [start + timedelta(hours=number) for number in range(366 * 24)]
    offsets = [hour.astimezone(zone).utcoffset() for hour in hours]
    found = [hours[n] for n in range(1, len(hours)) if offsets[n] != offsets[n - 1]]
    return found or [start]


def by_brute_force(cron: crontab, zone: ZoneInfo, start: datetime, end: datetime) -> set[datetime]:
    """Return the minutes in which a local clock shows a time of the crontab for the first time."""
    shown, found = set[datetime](), set[datetime]()
    for number in range((end - start) // timedelta(minutes=1)):
        moment = start + timedelta(minutes=number)
        wall = moment.astimezone(zone).replace(tzinfo=None, fold=0)
        if wall not in shown and wall.hour in cron.hour and wall.minute in cron.minute:
            found.add(moment)
        shown.add(wall)
    return found


@pytest.mark.parametrize("name", ZONES)
def test_a_crontab_in_a_pytz_time_zone_is_due_by_the_local_clock(name: str) -> None:
    """The test compares minute by minute, around each clock change of a year.

    A time that the change leaves out is due near the change. Another test checks when exactly.
    """
    zone = ZoneInfo(name)
    app = Celery("zoned", set_as_current=False)
    app.conf.timezone = pytz.timezone(name)
    cron = crontab(minute="*/30", hour="0-22", app=app)
    for change in changes(zone, 2026):
        start, end = change - timedelta(hours=26), change + timedelta(hours=26)
        due, moment = set[datetime](), start - timedelta(minutes=1)
        while (moment := next_due(cron, moment)) < end:
            due.add(moment)
        assert by_brute_force(cron, zone, start, end) <= due
        left_out = due - by_brute_force(cron, zone, start, end)
        assert all(abs(moment - change) <= timedelta(hours=3) for moment in left_out)


@pytest.mark.parametrize("name", ZONES)
def test_a_crontab_in_a_pytz_time_zone_is_due_when_celery_says_so(name: str) -> None:
    """The test compares noon of each day of a year. It leaves out the days of clock changes,
    because Celery before 5.7 is wrong there.
    """
    app = Celery("zoned", set_as_current=False)
    app.conf.timezone = name
    zoned = Celery("zoned", set_as_current=False)
    zoned.conf.timezone = pytz.timezone(name)
    cron, ours = crontab(0, 12, app=app), crontab(0, 12, app=zoned)
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    for _ in range(366):
        shown = moment.astimezone(ZoneInfo(name))
        cron.nowfun = lambda shown=shown: shown
        due = next_due(ours, moment)
        if shown.utcoffset() == due.astimezone(ZoneInfo(name)).utcoffset():
            assert due == moment + cron.remaining_estimate(shown)
        moment = due


@pytest.mark.parametrize(
    "zone",
    [pytz.utc, pytz.FixedOffset(90), dateutil_tz.tzoffset("x", 5400), "Asia/Kolkata", None],
)
def test_other_kinds_of_time_zones(zone: Any) -> None:
    made = in_zone(crontab(0, 9), zone or "UTC")
    (due,) = next_runs(made, 1, at("2026-06-01T00:00+00:00"))
    assert (due.hour, due.minute) == (9, 0)
    assert spelled(made) == spelled(in_zone(crontab(0, 9), zone or "UTC"))


def test_a_crontab_subclass_with_a_pytz_time_zone() -> None:
    class InBerlin(crontab):
        tz = pytz.timezone("Europe/Berlin")

    made = InBerlin(0, 9, nowfun=lambda: datetime.now(InBerlin.tz))
    due = next_runs(made, 2, at("2026-03-28T00:00+01:00"))
    assert local(due) == ["03-28T09:00+01:00", "03-29T09:00+02:00"]
    assert matches_now(made, at("2026-03-29T09:00+02:00"))
    assert spelled(made).endswith("Europe/Berlin")


def test_a_nowfun_in_another_time_zone(berlin: Celery) -> None:
    """Before 5.7, Celery's crontab goes by the time zone of ``nowfun``. The package does what the
    installed Celery does.
    """
    kolkata = pytz.timezone("Asia/Kolkata")
    made = crontab(0, 9, app=berlin, nowfun=lambda: datetime.now(kolkata))
    (due,) = next_runs(made, 1, at("2026-06-01T00:00+00:00"))
    expected = "06-01T09:00+05:30" if GOES_BY_NOWFUN else "06-01T09:00+02:00"
    assert local([due]) == [expected]


@pytest.mark.parametrize(
    ("name", "midnights"),
    [
        ("Asia/Kolkata", ["03-29T00:00+05:30", "03-30T00:00+05:30"]),
        pytest.param(
            "Europe/Berlin",
            ["03-29T00:00+01:00", "03-30T00:00+02:00"],
            marks=pytest.mark.skipif(GOES_BY_NOWFUN, reason="Celery is wrong before 5.7"),
        ),
    ],
)
def test_a_day_that_is_counted_from_midnight_follows_a_pytz_time_zone(
    name: str, midnights: list[str]
) -> None:
    app = Celery("zoned", set_as_current=False)
    app.conf.timezone = pytz.timezone(name)
    daily = schedule(timedelta(days=1), relative=True, app=app)
    assert local(next_runs(daily, 2, at("2026-03-28T12:00+01:00"))) == midnights


@pytest.mark.parametrize(
    ("cron", "after", "due"),
    [
        # Clocks go forward on 29 March: there is no 02:30, so the tick is due at 03:30.
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
        # At 03:10 the tick of the left-out 02:30 is still to come.
        ({"hour": 2, "minute": 30}, "2026-03-29T03:10+02:00", ["03-29T03:30+02:00"]),
        # Clocks go back on 25 October: 02:30 comes twice, and a daily tick is due at the first.
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
        # The left-out 02:30 and 03:30 fall on the same time, which is due once.
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
def test_due_times_when_clocks_change(
    berlin: Celery, cron: dict[str, Any], after: str, due: list[str]
) -> None:
    made = crontab(**cron, app=berlin)
    assert local(next_runs(made, len(due), at(after))) == due


def test_due_times_when_clocks_go_forward_by_half_an_hour() -> None:
    """On Lord Howe Island the times from 02:00 to 02:30 are left out on that day. The tick of 02:15
    is due at 02:45.
    """
    app = Celery("lord howe", set_as_current=False)
    app.conf.timezone = "Australia/Lord_Howe"
    cron = crontab(hour=2, minute="15,30", app=app)
    due = next_runs(cron, 3, at("2026-10-04T01:00+10:30"))
    assert local(due) == ["10-04T02:30+11:00", "10-04T02:45+11:00", "10-05T02:15+11:00"]


def test_an_interval_is_counted_from_the_given_time() -> None:
    after = at("2026-01-01T00:00+00:00")
    for interval in (90, 90.0, timedelta(seconds=90), schedule(90)):
        assert [due - after for due in next_runs(interval, 2, after)] == [
            timedelta(seconds=90),
            timedelta(seconds=180),
        ]


def test_without_a_time_an_interval_is_counted_from_now() -> None:
    (due,) = next_runs(60)
    assert timedelta(0) < due - datetime.now(UTC) <= timedelta(seconds=60)


def test_matches_now_is_true_for_the_whole_minute(berlin: Celery) -> None:
    cron = crontab(hour=9, minute=15, app=berlin)
    for time, matches in {
        "09:14:59": False,
        "09:15:00": True,
        "09:15:59": True,
        "09:16:00": False,
    }.items():
        assert matches_now(cron, at(f"2026-06-01T{time}+02:00")) is matches
    assert matches_now(crontab())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: next_runs(60, 0), "n=0 is not allowed; it is at least 1"),
        (lambda: next_runs(60, 1, datetime(2026, 1, 1)), "it has no time zone"),
        (lambda: next_runs("* * * * *"), "is not a schedule"),
        (lambda: next_runs(True), "is not a schedule"),
        (lambda: next_runs(-1), "an interval must be longer than 0"),
        (lambda: next_runs(1e12), "no longer than 100 years"),
        (lambda: next_runs(float("inf")), "not a length of time"),
        (lambda: next_runs(float("nan")), "not a length of time"),
        (lambda: next_runs(on_the_30th_of_february("*")), "is never due"),
        (lambda: next_runs(on_the_30th_of_february(0)), "is never due"),
        (lambda: matches_now(60), "is an interval"),
        (lambda: matches_now(crontab(), datetime(2026, 1, 1)), "it has no time zone"),
    ],
)
def test_wrong_arguments_are_refused(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
