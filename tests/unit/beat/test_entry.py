"""``SingletonEntry``: which ticks it sends, which it skips, and how a new leader continues it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from celery.schedules import crontab, solar

from celery_singleton_state.beat import SingletonEntry
from celery_singleton_state.beat.entry import NEVER
from celery_singleton_state.schedules.due import spelled
from tests.helpers.entries import HOUR, MINUTE, NOON, SECOND, entry, on_the_30th_of_february


@pytest.fixture
def utc_app() -> Celery:
    return Celery("shop", set_as_current=False)


def run_until(entry: SingletonEntry, now: datetime) -> list[datetime]:
    """Return the ticks that a leader sends when it checks the entry at ``now``, in order."""
    sent = []
    while entry.next_tick <= now:
        if not entry.miss(now):
            sent.append(entry.next_tick)
            entry.sent(now)
    return sent


# -- ticks that were missed


def test_a_tick_in_time_is_sent(utc_app: Celery) -> None:
    made = entry(utc_app)
    assert run_until(made, NOON + SECOND) == [NOON]
    assert (made.last_tick, made.last_run_at) == (NOON, NOON + SECOND)
    assert (made.total_run_count, made.missed_count) == (1, 0)
    assert made.next_tick == NOON + MINUTE


@pytest.mark.parametrize("schedule", [60.0, crontab()])
def test_only_the_latest_missed_tick_is_sent_by_default(utc_app: Celery, schedule: Any) -> None:
    made = entry(utc_app, schedule)
    assert run_until(made, NOON + HOUR + SECOND) == [NOON + HOUR]
    assert made.missed_count == 60
    assert made.next_tick == NOON + HOUR + MINUTE


@pytest.mark.parametrize("schedule", [60.0, crontab()])
def test_catch_up_all_sends_each_tick_that_is_not_too_old_in_order(
    utc_app: Celery, schedule: Any
) -> None:
    made = entry(utc_app, schedule, catch_up="all")
    now = NOON + HOUR + SECOND
    assert run_until(made, now) == [NOON + minute * MINUTE for minute in range(56, 61)]
    assert made.missed_count == 56
    made = entry(utc_app, schedule, catch_up="all", skip_if_older_than=None)
    assert run_until(made, now) == [NOON + minute * MINUTE for minute in range(61)]
    assert made.missed_count == 0


@pytest.mark.parametrize("schedule", [60.0, crontab()])
def test_catch_up_none_sends_no_missed_tick(utc_app: Celery, schedule: Any) -> None:
    made = entry(utc_app, schedule, catch_up="none")
    assert run_until(made, NOON + HOUR + 30 * SECOND) == []
    assert made.missed_count == 61
    assert made.next_tick == NOON + HOUR + MINUTE
    # A takeover by another beat can delay a tick by some seconds. Such a tick is not a missed tick.
    assert run_until(made, made.next_tick + 9 * SECOND) == [NOON + HOUR + MINUTE]


@pytest.mark.parametrize("catch_up", ["latest", "all", "none"])
def test_a_tick_is_too_old_after_five_minutes(utc_app: Celery, catch_up: str) -> None:
    made = entry(utc_app, HOUR, catch_up=catch_up)
    assert run_until(made, NOON + 5 * MINUTE + SECOND) == []
    assert (made.missed_count, made.next_tick) == (1, NOON + HOUR)


@pytest.mark.parametrize("limit", [600, 600.0, timedelta(minutes=10), None])
def test_skip_if_older_than_sets_the_age_at_which_a_tick_is_too_old(
    utc_app: Celery, limit: Any
) -> None:
    made = entry(utc_app, HOUR, skip_if_older_than=limit)
    assert run_until(made, NOON + 10 * MINUTE) == [NOON]
    made = entry(utc_app, HOUR, skip_if_older_than=limit)
    expected = [NOON] if limit is None else []
    assert run_until(made, NOON + 10 * MINUTE + SECOND) == expected


def test_beat_cron_starting_deadline_is_the_default_for_crontabs(utc_app: Celery) -> None:
    utc_app.conf.beat_cron_starting_deadline = 60
    assert entry(utc_app, crontab()).skip_if_older_than == 60
    assert entry(utc_app, crontab(), skip_if_older_than=5).skip_if_older_than == 5
    assert entry(utc_app, 60.0).skip_if_older_than == 300


def test_an_entry_whose_schedule_raises_is_due_no_more(
    utc_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    """The error must not end the beat. The next leader asks the schedule again."""

    class Broken(solar):
        broken = True

        def remaining_estimate(self, last_run_at: datetime) -> timedelta:
            if Broken.broken:
                raise RuntimeError("no sun")
            return HOUR

    made = entry(utc_app, Broken("sunset", 0.0, 0.0))
    assert run_until(made, NOON + SECOND) == [NOON]
    assert made.next_tick is NEVER
    assert "next tick of e cannot be calculated" in caplog.text
    Broken.broken = False
    made.resume(made.state(), NOON)
    assert made.next_tick == NOON + HOUR


def test_next_from_last_run(utc_app: Celery) -> None:
    """After a pause one tick is sent, and the next is due one interval after that run."""
    made = entry(utc_app, 60.0, next_from="last_run", catch_up="all", skip_if_older_than=None)
    now = NOON + HOUR + 7 * SECOND
    assert run_until(made, now) == [NOON]
    assert (made.next_tick, made.missed_count) == (now + MINUTE, 0)


def test_next_from_last_run_skips_a_tick_that_is_too_old(utc_app: Celery) -> None:
    made = entry(utc_app, 60.0, next_from="last_run")
    now = NOON + HOUR + 7 * SECOND
    assert run_until(made, now) == []
    assert (made.next_tick, made.missed_count) == (now + MINUTE, 1)


def test_a_long_pause_of_a_short_interval_costs_nothing(utc_app: Celery) -> None:
    """A year of ticks, one each second, is skipped by arithmetic, not one by one."""
    made = entry(utc_app, 1.0)
    assert run_until(made, NOON + timedelta(days=365)) == [NOON + timedelta(days=365)]
    assert made.missed_count == 365 * 86400


# -- the first tick of an entry without stored state


def test_an_interval_is_due_within_its_length(utc_app: Celery) -> None:
    for number in range(100):
        made = SingletonEntry(name=f"e{number}", task="t", schedule=60.0, app=utc_app)
        made.begin(NOON)
        assert NOON < made.next_tick <= NOON + MINUTE


def test_entries_with_equal_intervals_are_spread(utc_app: Celery) -> None:
    ticks = set()
    for number in range(100):
        made = SingletonEntry(name=f"e{number}", task="t", schedule=60.0, app=utc_app)
        made.begin(NOON)
        ticks.add((made.next_tick - NOON) // (6 * SECOND))
    assert len(ticks) == 10


def test_an_entry_whose_stored_state_was_lost_keeps_its_tick_times(utc_app: Celery) -> None:
    """The first tick depends on the entry's name and interval, not on the time of the beat's start.

    So the ticks are the same after the loss, and so are the message ids, which are made from
    them.
    """
    ticks = set()
    for later in (0, 1, 59, 60, 3600, 86400):
        made = SingletonEntry(name="e", task="t", schedule=7.5, app=utc_app)
        made.begin(NOON + later * SECOND)
        ticks.add((made.next_tick - NOON) % timedelta(seconds=7.5))
    assert len(ticks) == 1


def test_a_relative_interval_is_due_at_round_times(utc_app: Celery) -> None:
    made = SingletonEntry(name="e", task="t", schedule=HOUR, relative=True, app=utc_app)
    made.begin(NOON + 10 * MINUTE)
    assert made.next_tick == NOON + HOUR
    made.sent(made.next_tick)
    assert made.next_tick == NOON + 2 * HOUR


def test_a_crontab_is_due_at_its_own_times(utc_app: Celery) -> None:
    made = SingletonEntry(name="e", task="t", schedule=crontab(minute="30"), app=utc_app)
    made.begin(NOON)
    assert made.next_tick == NOON + 30 * MINUTE


def test_a_solar_event(utc_app: Celery) -> None:
    """Solar noon at Greenwich is less than 20 minutes from 12:00 (the equation of time)."""
    made = SingletonEntry(
        name="e", task="t", schedule=solar("solar_noon", 51.48, 0.0, app=utc_app), app=utc_app
    )
    made.begin(NOON - 3 * HOUR)
    assert abs(made.next_tick - NOON) < 20 * MINUTE
    first = made.next_tick
    assert run_until(made, first + SECOND) == [first]
    assert abs(made.next_tick - first - 24 * HOUR) < MINUTE


def test_a_crontab_that_is_never_due(utc_app: Celery) -> None:
    schedule = on_the_30th_of_february(0)
    made = SingletonEntry(name="e", task="t", schedule=schedule, app=utc_app)
    made.begin(NOON)
    assert made.next_tick is NEVER
    assert made.state().next_tick is None
    made.resume(made.state(), NOON)
    assert made.next_tick is NEVER


# -- how another leader continues an entry


def test_another_leader_continues_from_the_stored_state(utc_app: Celery) -> None:
    made = entry(utc_app)
    run_until(made, NOON + HOUR + SECOND)
    other = SingletonEntry(name="e", task="t", schedule=60.0, app=utc_app)
    other.resume(made.state(), NOON + 2 * HOUR)
    assert other.state() == made.state()
    assert run_until(other, NOON + 2 * HOUR) == [NOON + 2 * HOUR]


@pytest.mark.parametrize("catch_up", ["latest", "all"])
def test_after_a_takeover_that_skipped_ticks_the_next_names_no_tick_before_it(
    utc_app: Celery, catch_up: str
) -> None:
    """A tick's message names the tick before it. When that message was run, all times between the
    two ticks count as done.

    The old leader may have sent some of the skipped ticks before it died, without recording them.
    They may not be done, so the new leader's first tick names no tick before it.
    """
    old = entry(utc_app)
    assert run_until(old, NOON) == [NOON]
    new = SingletonEntry(name="e", task="t", schedule=60.0, app=utc_app, catch_up=catch_up)
    new.resume(old.state(), NOON + HOUR)
    assert new.tick_before == NOON
    assert new.miss(NOON + HOUR) == {"latest": 59, "all": 54}[catch_up]
    first = new.next_tick
    assert new.tick_before is None
    new.sent(NOON + HOUR)
    assert (new.previous_tick, new.last_tick, new.tick_before) == (None, first, first)
    new.sent(NOON + HOUR)
    assert (new.previous_tick, new.tick_before) == (first, first + MINUTE)
    # The new leader knows that no beat has sent the ticks that it skips from here on.
    new.miss(NOON + 2 * HOUR)
    assert new.tick_before == first + MINUTE


def test_after_a_takeover_that_skipped_no_tick_the_next_names_the_last(utc_app: Celery) -> None:
    old = entry(utc_app)
    assert run_until(old, NOON) == [NOON]
    new = SingletonEntry(name="e", task="t", schedule=60.0, app=utc_app)
    new.resume(old.state(), NOON + MINUTE)
    assert new.miss(NOON + MINUTE) == 0
    assert new.tick_before == NOON


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # If the time of the last tick plus the new interval is still to come, it is the next tick.
        (HOUR, 2 * HOUR, NOON + 2 * HOUR),
        # If that time has passed, the next tick is one interval from now, not at once.
        (24 * HOUR, HOUR, NOON + 5 * HOUR + HOUR),
        (crontab(hour="12", minute="0"), crontab(hour="13", minute="0"), NOON + 25 * HOUR),
        (crontab(hour="12", minute="0"), crontab(hour="18", minute="0"), NOON + 6 * HOUR),
        (crontab(hour="12", minute="0"), 600.0, NOON + 5 * HOUR + 10 * MINUTE),
    ],
)
def test_an_entry_with_a_changed_schedule_is_not_due_at_once(
    utc_app: Celery, before: Any, after: Any, expected: datetime
) -> None:
    """The entry's last tick was at 12:00. At 17:00 a beat starts with another schedule for the
    entry.

    In the first case the beat starts at 13:00.
    """
    old = entry(utc_app, before)
    assert run_until(old, NOON) == [NOON]
    new = SingletonEntry(name="e", task="t", schedule=after, app=utc_app)
    new.resume(old.state(), NOON + (5 * HOUR if after != 2 * HOUR else HOUR))
    assert new.next_tick == expected
    assert (new.last_tick, new.last_run_at, new.total_run_count) == (NOON, NOON, 1)


def test_another_time_zone_is_another_schedule(utc_app: Celery) -> None:
    old = spelled(crontab(hour="12", minute="0", app=utc_app))
    utc_app.conf.timezone = "Europe/Berlin"
    berlin = Celery("shop", set_as_current=False)
    berlin.conf.timezone = "Europe/Berlin"
    assert spelled(crontab(hour="12", minute="0", app=berlin)) != old


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (60.0, 61.0),
        (60.0, 60.001),
        (crontab(minute="1"), crontab(minute="2")),
        (crontab(minute="*/5"), 300.0),
        (solar("sunset", 1.0, 2.0), solar("sunset", 1.0, 3.0)),
    ],
)
def test_different_schedules_have_different_texts(utc_app: Celery, one: Any, other: Any) -> None:
    def text(schedule: Any) -> str:
        return entry(utc_app, schedule).spelled

    assert text(one) == text(one)
    assert text(one) != text(other)


# -- wrong and unusual fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"catch_up": "some"}, r"'e': catch_up='some' .* 'latest', 'all', 'none'"),
        ({"next_from": "now"}, r"'e': next_from='now' .* 'schedule', 'last_run'"),
        ({"skip_if_older_than": -1}, r"'e': skip_if_older_than=-1 .* 0 or more"),
        ({"skip_if_older_than": "5"}, r"'e': skip_if_older_than='5'"),
        ({"skip_if_older_than": True}, r"'e': skip_if_older_than=True"),
        ({"catchup": "all"}, r"'e': .*catchup"),
        ({"schedule": 0}, r"'e': .* longer than 0"),
        ({"schedule": None}, r"'e': None is not a schedule"),
        ({"schedule": "hourly"}, r"'e': 'hourly' is not a schedule"),
        ({"schedule": 1e12}, r"'e': .* no longer than 100 years"),
        ({"schedule": timedelta.max}, r"'e': .* no longer than 100 years"),
        ({"schedule": 1e300}, r"'e': 1e\+300 is not a schedule: it is not a length of time"),
        ({"schedule": float("nan")}, r"'e': nan is not a schedule"),
        ({"schedule": float("-inf")}, r"'e': -inf is not a schedule"),
        ({"schedule": -5}, r"'e': -5 is not a schedule: an interval must be longer than 0"),
        ({"schedule": 1e-9}, r"'e': 1e-09 is not a schedule: an interval must be longer than 0"),
        ({"schedule": len}, r"'e': .* is not a schedule"),
        ({"name": 7}, r"7: name=7 is not allowed; it takes a text"),
        ({"name": ""}, r"'': name='' is not allowed"),
        ({"name": "a\0"}, r"name='a\\x00' is not allowed"),
        ({"name": "\ud800"}, r"name='\\ud800' is not allowed"),
        ({"task": None}, r"'e': task=None is not allowed; it takes the name of a task"),
        ({"task": print}, r"'e': task=.* is not allowed"),
        ({"args": 5}, r"'e': args=5 is not allowed; it takes a list or a tuple"),
        ({"args": "abc"}, r"'e': args='abc' is not allowed"),
        ({"args": iter("abc")}, r"'e': args=.* is not allowed"),
        ({"kwargs": 5}, r"'e': kwargs=5 is not allowed; it takes a dict"),
        ({"kwargs": [1]}, r"'e': kwargs=\[1\] is not allowed"),
        ({"kwargs": {1: 2}}, r"'e': kwargs={1: 2} is not allowed"),
        ({"options": 5}, r"'e': options=5 is not allowed; it takes a dict"),
        ({"options": "queue"}, r"'e': options='queue' is not allowed"),
        ({"options": {"expires": "soon"}}, r"'e': options\['expires'\]='soon' is not allowed"),
        ({"options": {"expires": float("nan")}}, r"'e': options\['expires'\]=nan"),
        ({"options": {"expires": 1e12}}, r"'e': options\['expires'\]=1000000000000.0"),
        ({"options": {"expires": MINUTE}}, r"'e': options\['expires'\]=.* a number of seconds"),
        ({"options": {"countdown": "5"}}, r"'e': options\['countdown'\]='5'"),
        ({"options": {"eta": 5}}, r"'e': options\['eta'\]=5"),
        ({"options": {"headers": 5}}, r"'e': options\['headers'\]=5"),
        ({"options": {"catch_up": "some"}}, r"'e': catch_up='some'"),
        ({"last_run_at": "yesterday"}, r"'e': last_run_at='yesterday'"),
        ({"total_run_count": "many"}, r"'e': total_run_count='many'"),
        ({"skip_if_older_than": float("nan")}, r"'e': skip_if_older_than=nan"),
    ],
)
def test_an_entry_with_a_wrong_field_is_refused(
    utc_app: Celery, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ImproperlyConfigured, match=message):
        SingletonEntry(**{"name": "e", "task": "t", "schedule": 60.0, "app": utc_app} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"args": None, "kwargs": None, "options": None},
        {"args": [1], "kwargs": {}, "options": {}},
        {"args": (1,), "kwargs": {"a": 1}, "options": {"expires": 60, "queue": "q"}},
        {"args": "", "kwargs": (), "options": ()},
        {"options": {"expires": NOON, "eta": NOON.isoformat(), "headers": None}},
        {"options": {"expires": "2026-11-24T12:00:00Z", "countdown": 5, "priority": 3}},
        {"schedule": timedelta(days=36525)},
        {"schedule": True + 1, "relative": True},
        {"skip_if_older_than": 1e300, "catch_up": "all"},
        {"last_run_at": NOON, "total_run_count": 5},
    ],
)
def test_fields_that_celery_allows_are_allowed(utc_app: Celery, fields: dict[str, Any]) -> None:
    made = SingletonEntry(**{"name": "e", "task": "t", "schedule": 60.0, "app": utc_app} | fields)
    made.begin(NOON)
    run_until(made, NOON + HOUR)


def test_an_entrys_rules_can_be_in_its_options(utc_app: Celery) -> None:
    """Celery's ``add_periodic_task`` puts each argument that it does not know into ``options``."""
    options = {"catch_up": "all", "skip_if_older_than": 5, "queue": "q"}
    made = SingletonEntry(name="e", task="t", schedule=60.0, app=utc_app, options=options)
    assert (made.catch_up, made.skip_if_older_than) == ("all", 5)
    assert made.options == {"queue": "q"}
    assert options == {"catch_up": "all", "skip_if_older_than": 5, "queue": "q"}
