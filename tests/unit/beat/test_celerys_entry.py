"""Entries whose schedule class has its own ``is_due`` or ``remaining_estimate``.

Such an entry sends its ticks when the schedule says so, and no schedule can hang the beat.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from celery.schedules import BaseSchedule, crontab, schedule
from django_celery_beat.clockedschedule import clocked
from django_celery_beat.tzcrontab import TzAwareCrontab

from celery_singleton_state import matches_now, next_runs
from celery_singleton_state.beat import SingletonEntry, misfires, poll
from celery_singleton_state.beat.celerys_entry import due_after
from celery_singleton_state.beat.entry import NEVER
from celery_singleton_state.schedules.due import spelled
from tests.helpers.own_schedules import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    Answers,
    Broken,
    BusinessDays,
    ChangesItself,
    Duck,
    EveryFromTable,
    FromTableAsProperty,
    HostClock,
    HostClockEstimate,
    LastDayOfMonth,
    Later,
    LaterClock,
    Once,
    OnceAnHour,
    OnlyOnce,
    SaysDue,
    own_texts,
)

#: The time at which the tests begin: a Tuesday.
NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
#: The most turns that `run` allows. No test needs so many, so an entry that takes them all hangs.
TURNS = 2000


@pytest.fixture
def app() -> Celery:
    return Celery("shop", set_as_current=False)


def made(app: Celery, schedule: Any, **fields: Any) -> SingletonEntry:
    return SingletonEntry(name="own", task="t", schedule=schedule, app=app, **fields)


def run(entry: SingletonEntry, start: datetime, end: datetime) -> list[datetime]:
    """Act as a leader: return the ticks that it sends from ``start`` to ``end``, in order.

    The leader wakes each time that the entry is due.
    """
    now, sent = start, []
    for _ in range(TURNS):
        now = max(now, entry.next_tick)
        if now > end:
            return sent
        entry.miss(now)
        if entry.next_tick <= now and not entry.is_passing:
            sent.append(entry.next_tick)
            entry.sent(now)
    raise AssertionError(f"it hangs after {sent[:5]} at {now}")


def first_days(app: Celery, own: Any, days: int = 70) -> list[datetime]:
    entry = made(app, own)
    entry.begin(NOON)
    return run(entry, NOON, NOON + days * DAY)


def in_november(*times: str) -> list[datetime]:
    return [datetime.fromisoformat(f"2026-11-{time}+00:00") for time in times]


# -- schedule classes with their own due times


def test_the_last_day_of_the_month(app: Celery) -> None:
    own = LastDayOfMonth(0, 9, app=app)
    expected = [datetime(2026, 11, 30, 9, tzinfo=UTC), datetime(2026, 12, 31, 9, tzinfo=UTC)]
    assert first_days(app, own, 60) == expected
    assert next_runs(own, 2, NOON) == expected
    assert matches_now(own, expected[0] + 30 * SECOND)
    assert not matches_now(own, expected[0] - DAY)


def test_a_business_calendar(app: Celery) -> None:
    """A tick that falls on a Saturday is due when the week begins, as with Celery's own beat."""
    own = BusinessDays(0, 9, app=app)
    times = in_november("25 09:00", "26 09:00", "27 09:00", "30 00:00", "30 09:00")
    assert first_days(app, own, 6) == times
    assert next_runs(own, 5, NOON) == times


def test_an_interval_that_is_read_from_a_table(app: Celery) -> None:
    for own in (EveryFromTable(app=app), FromTableAsProperty(app=app)):
        assert next_runs(own, 2, NOON) == [NOON + 30 * SECOND, NOON + 60 * SECOND]
        with pytest.raises(ValueError, match="no times of its own"):
            matches_now(own, NOON)
        entry = made(app, own)
        entry.begin(NOON)
        assert run(entry, NOON, NOON + 50 * SECOND) == [NOON + 30 * SECOND]
        own.table["seconds"] = 10.0
        sent = run(entry, NOON + 50 * SECOND, NOON + 75 * SECOND)
        assert sent[0] == NOON + 60 * SECOND
        assert sent[1] - sent[0] == 10 * SECOND


@pytest.mark.parametrize(
    ("own", "minutes"),
    [(Later("*/5", offset=2 * MINUTE), [2, 7, 12]), (LaterClock("*/5"), [2, 7, 12])],
)
def test_a_crontab_with_an_offset(app: Celery, own: Any, minutes: list[int]) -> None:
    own.app = app
    entry = made(app, own)
    entry.begin(NOON)
    times = [NOON + minute * MINUTE for minute in minutes]
    assert run(entry, NOON, NOON + 15 * MINUTE) == times
    assert next_runs(own, 3, NOON) == times


def test_a_schedule_that_reads_its_hosts_clock(app: Celery) -> None:
    """Such a schedule can be asked only about the present. Its due times count from the present,
    too.
    """
    now = datetime.now(UTC)
    for own, first in ((HostClock(app=app), 30), (HostClockEstimate(1, app=app), 60)):
        due, following = next_runs(own, 2, now)
        assert abs((due - now).total_seconds()) <= first + 0.2
        assert abs((following - due).total_seconds() - first) < 0.3


def test_a_schedule_that_remembers_its_due_time(app: Celery) -> None:
    entry = made(app, OnlyOnce(app=app))
    entry.begin(NOON)
    assert run(entry, NOON, NOON + HOUR) == [NOON]


def test_a_schedule_whose_attributes_change_is_the_same_schedule(app: Celery) -> None:
    entry, other = (made(app, ChangesItself(5, app=app)) for _ in range(2))
    entry.begin(NOON)
    assert run(entry, NOON, NOON + MINUTE) == [NOON + 30 * SECOND, NOON + MINUTE]
    other.resume(entry.state(), NOON + MINUTE)
    assert other.state() == entry.state()


def test_an_updated_entry_has_the_new_schedule(app: Celery) -> None:
    entry = made(app, 60.0)
    entry.update(made(app, SaysDue(True, 10), catch_up="all"))
    entry.begin(NOON)
    assert entry.catch_up == "all"
    assert run(entry, NOON, NOON + 15 * SECOND) == [NOON, NOON + 10 * SECOND]


def test_a_schedule_without_a_base_class_of_celery(app: Celery) -> None:
    entry = made(app, Duck())
    entry.begin(NOON)
    assert run(entry, NOON, NOON + 2 * MINUTE) == [NOON, NOON + MINUTE, NOON + 2 * MINUTE]


def test_the_crontab_of_django_celery_beat_is_treated_as_celerys(app: Celery) -> None:
    """The ``is_due`` of this class only converts its argument, so the package need not call it."""
    own = TzAwareCrontab(minute=30, hour=2, app=app)
    entry = made(app, own)
    entry.begin(NOON)
    assert entry.next_tick == NOON + 14.5 * HOUR
    assert entry.state().since is None


# -- missed ticks, and another leader


def behind(app: Celery, **rules: Any) -> SingletonEntry:
    """Return an entry that is due every five minutes, and that no leader has checked for half an
    hour.
    """
    entry = made(app, SaysDueEach5Minutes("*/5", app=app), **rules)
    entry.begin(NOON + MINUTE)
    return entry


class SaysDueEach5Minutes(crontab):
    def is_due(self, last_run_at: datetime) -> Any:
        return super().is_due(last_run_at)


LATE = NOON + 31 * MINUTE


@pytest.mark.parametrize(
    ("rules", "minutes", "missed"),
    [
        ({}, [30], 5),
        ({"catch_up": "none"}, [], 6),
        ({"catch_up": "all", "skip_if_older_than": None}, [5, 10, 15, 20, 25, 30], 0),
        ({"catch_up": "all", "skip_if_older_than": 700}, [20, 25, 30], 3),
    ],
)
def test_the_rules_for_missed_ticks(
    app: Celery, rules: dict[str, Any], minutes: list[int], missed: int
) -> None:
    entry = behind(app, **rules)
    assert run(entry, LATE, LATE) == [NOON + minute * MINUTE for minute in minutes]
    assert (entry.missed_count, entry.next_tick) == (missed, NOON + 35 * MINUTE)


def test_another_leader_finds_the_same_tick(app: Celery) -> None:
    """A leader finds a due tick, and dies before it records that it has sent the tick.

    The next leader finds the same tick, whether the stored state is from before or from after the
    first leader's check.
    """
    entry = behind(app)
    state = entry.state()
    entry.miss(LATE)
    for known in (state, entry.state()):
        other = made(app, SaysDueEach5Minutes("*/5", app=app))
        other.resume(known, LATE + SECOND)
        other.miss(LATE + SECOND)
        assert other.next_tick == entry.next_tick == NOON + 30 * MINUTE


def test_a_tick_that_was_found_and_not_sent_becomes_too_old(app: Celery) -> None:
    entry = behind(app)
    entry.miss(LATE)
    entry.miss(LATE + HOUR)
    assert run(entry, LATE + HOUR, LATE + HOUR) == [NOON + 90 * MINUTE]


def test_after_a_tick_became_too_old_the_next_time_to_ask_is_no_tick(
    app: Celery,
) -> None:
    """The schedule asks to be asked again every five seconds. At 12:00:03 it says that it is due.

    The leader cannot send this tick for 12 s, and then skips it as too old. The next time to ask
    has passed meanwhile. No tick is sent for that time, because the schedule does not say that it
    is due.
    """
    entry = made(app, OnceAnHour(app=app), catch_up="none")
    entry.begin(NOON - 2 * SECOND)
    entry._poll.begin(NOON - HOUR)  # type: ignore[union-attr]
    assert entry.miss(NOON + 3 * SECOND) == 0
    assert entry.next_tick == NOON + 3 * SECOND
    now = NOON + 15 * SECOND
    assert entry.miss(now) == 1
    assert entry.next_tick > now
    assert run(entry, now, NOON + 2 * HOUR) == [NOON + HOUR - 2 * SECOND + 5 * SECOND]


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("after", [30 * SECOND, 20 * MINUTE])
@pytest.mark.parametrize("catch_up", ["latest", "all"])
def test_a_schedule_that_is_slow_to_answer_is_asked_in_turns(
    app: Celery, monkeypatch: pytest.MonkeyPatch, catch_up: str, after: timedelta, dies: bool
) -> None:
    """The schedule takes a second for each answer, because it reads a table.

    The leader asks only a few questions in each turn, so that other entries have their turns. No
    tick of the entry is lost, even if another beat becomes the leader in between. Nothing is sent
    at a time at which the schedule only wants to be asked.
    """
    clock = [0.0]

    class Slow(OnceAnHour):
        def is_due(self, last_run_at: datetime) -> Any:
            clock[0] += 1.0
            return super().is_due(last_run_at)

    def make() -> SingletonEntry:
        return made(app, Slow(app=app), catch_up=catch_up, skip_if_older_than=None)

    monkeypatch.setattr(poll, "clock", lambda: clock[0])
    monkeypatch.setattr(poll, "TURN", 10.0)
    monkeypatch.setattr(poll, "QUESTIONS", 2000)
    entry, end, sent = make(), NOON + 2 * HOUR + after, []
    entry.begin(NOON - 40 * MINUTE)
    for turn in range(TURNS):
        if entry.next_tick > end:
            break
        before = clock[0]
        entry.miss(end)
        assert clock[0] - before <= 11
        if entry.next_tick <= end and not entry.is_passing:
            sent.append(entry.next_tick)
            entry.sent(end)
        elif dies and turn % 100 == 99:
            known, entry = entry.state(), make()
            entry.resume(known, end)
    ticks = [NOON, NOON + HOUR, NOON + 2 * HOUR]
    assert sent == (ticks if catch_up == "all" else ticks[-1:])
    assert len(sent) + entry.missed_count == 3
    assert end < entry.next_tick <= end + 5 * SECOND


def test_a_slow_schedule_that_is_a_year_behind_is_asked_about_the_present(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader does not ask about each time in the year, because this would take hours in which
    no tick is sent.
    """
    turns = [0.0]
    monkeypatch.setattr(poll, "clock", lambda: turns.append(turns[-1] + 1) or turns[-1])
    monkeypatch.setattr(poll, "TURN", 10.0)
    entry, end = made(app, OnceAnHour(app=app), skip_if_older_than=None), NOON + 365 * DAY
    entry.begin(NOON)
    assert run(entry, end, end + HOUR)[0] == end


def test_a_schedule_that_raises_for_a_while(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    """The beat logs the failure once, and the entry continues when the schedule answers again."""
    entry = made(app, Broken(app=app))
    entry.begin(NOON)
    assert run(entry, NOON, NOON + 3 * MINUTE) == [NOON + 2 * MINUTE, NOON + 3 * MINUTE]
    assert caplog.text.count("beat: the schedule of own cannot be asked") == 1


# -- never due again


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= level]


@pytest.mark.parametrize("own", [Once, clocked])
def test_a_run_once_schedule_is_sent_once(
    app: Celery, caplog: pytest.LogCaptureFixture, own: Any
) -> None:
    """The end of such an entry logs no warning. Another leader does not send the tick again."""
    caplog.set_level(logging.INFO)
    entry = made(app, own(NOON + HOUR, app=app))
    entry.begin(NOON)
    assert entry.next_tick == NOON + HOUR
    assert run(entry, NOON, NOON + 9999 * DAY) == [NOON + HOUR]
    assert entry.next_tick is NEVER
    assert logged(caplog, logging.WARNING) == []
    assert "beat: own is never due again" in caplog.text
    other = made(app, own(NOON + HOUR, app=app))
    other.resume(entry.state(), NOON + 2 * HOUR)
    assert run(other, NOON + 2 * HOUR, NOON + 9999 * DAY) == []


@pytest.mark.parametrize("own", [Once, clocked])
def test_a_run_once_schedule_whose_time_was_missed(
    app: Celery, caplog: pytest.LogCaptureFixture, own: Any
) -> None:
    """By the rules for missed ticks, its tick is sent late, or skipped if it is too old.

    If the tick is skipped, a warning names the entry.
    """
    entry = made(app, own(NOON, app=app))
    entry.begin(NOON + MINUTE)
    assert run(entry, NOON + MINUTE, NOON + DAY) == [NOON]
    assert logged(caplog, logging.WARNING) == []
    entry = made(app, own(NOON, app=app))
    entry.begin(NOON + HOUR)
    assert run(entry, NOON + HOUR, NOON + DAY) == []
    assert entry.missed_count == 1
    assert "own is never due again" in logged(caplog, logging.WARNING)[0]


@pytest.mark.parametrize("own", [Once, clocked])
def test_next_runs_and_matches_now_of_a_run_once_schedule(app: Celery, own: Any) -> None:
    once = own(NOON, app=app)
    assert next_runs(once, 5, NOON - HOUR) == [NOON]
    assert matches_now(once, NOON + SECOND)
    assert not matches_now(once, NOON + HOUR)
    with pytest.raises(ValueError, match="due"):
        next_runs(once, 1, NOON)
    # LeaderMixin calls ``due_after``. After the only run it returns the time that it was given.
    assert due_after(once, NOON + HOUR) == NOON + HOUR


def test_a_recurrence_rule_with_a_last_date(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    rrule = pytest.importorskip("redbeat.schedules").rrule
    own = rrule("DAILY", dtstart=NOON + HOUR, count=2, app=app)
    times = [NOON + HOUR, NOON + HOUR + DAY]
    assert next_runs(own, 5, NOON) == times
    assert matches_now(own, times[1])
    assert first_days(app, own) == times
    assert logged(caplog, logging.WARNING) == []
    assert spelled(own) == spelled(rrule("DAILY", dtstart=NOON + HOUR, count=2, app=app))
    assert spelled(own) != spelled(rrule("DAILY", dtstart=NOON + HOUR, count=3, app=app))


@pytest.mark.parametrize("answer", [timedelta(0), -HOUR, timedelta.min, 60, "soon"])
def test_a_due_time_that_is_not_later_ends_the_entry(
    app: Celery, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    """The beat logs one error that names the entry, and the entry is never due again."""
    own = Answers(answer, app=app)
    assert first_days(app, own) == []
    assert len(logged(caplog, logging.ERROR)) == 1
    assert "the next tick of own cannot be calculated" in caplog.text
    with pytest.raises(ValueError, match="own_schedules"):
        next_runs(own, 1, NOON)
    with pytest.raises(ValueError, match="own_schedules"):
        matches_now(own, NOON)
    assert due_after(own, NOON) == NOON


@pytest.mark.parametrize("answer", [None, timedelta.max])
def test_a_schedule_that_answers_never(
    app: Celery, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    assert first_days(app, Answers(answer, app=app)) == []
    assert "own is never due again" in logged(caplog, logging.WARNING)[0]


@pytest.mark.parametrize(
    "answer",
    [(), (True,), (True, "soon"), (True, float("nan")), (False, True), (True, object())],
)
def test_an_answer_that_celery_could_not_use(
    app: Celery, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    assert first_days(app, SaysDue(*answer, app=app), 0) == []
    assert len(logged(caplog, logging.ERROR)) == 1
    with pytest.raises(ValueError, match="own_schedules"):
        next_runs(SaysDue(*answer, app=app), 1, NOON)


@pytest.mark.parametrize("pause", [0, -5, 1e-9, 0.0])
def test_a_schedule_that_wants_to_be_asked_again_at_once_is_asked_later(
    app: Celery, pause: float
) -> None:
    """Celery's beat would ask it in a busy loop and use a whole CPU."""
    entry = made(app, SaysDue(False, pause, app=app))
    entry.begin(NOON)
    assert run(entry, NOON, NOON + 10 * SECOND) == []
    with pytest.raises(ValueError, match="cannot tell"):
        next_runs(SaysDue(False, pause, app=app), 1, NOON)


@pytest.mark.parametrize("pause", [None, float("inf"), 1e8, 1e300])
def test_a_schedule_that_is_not_to_be_asked_again(app: Celery, pause: Any) -> None:
    entry = made(app, SaysDue(True, pause, app=app))
    entry.begin(NOON)
    assert run(entry, NOON, NOON + 9999 * DAY) == [NOON]
    assert entry.next_tick is NEVER


def test_a_schedule_that_is_days_behind_is_asked_in_turns(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other entries have their turns in between. In the end the latest tick is sent, and the
    ticks before it are counted as missed.
    """
    monkeypatch.setattr(misfires, "TURN", 0.001)

    class Counted(schedule):
        def remaining_estimate(self, last_run_at: datetime) -> timedelta:
            return super().remaining_estimate(last_run_at)

    end = NOON + 10 * DAY + SECOND
    entry = made(app, Counted(60, app=app))
    entry.begin(NOON)
    assert entry.miss(end) < 10 * 1440
    assert entry.is_passing
    assert run(entry, end, end) == [NOON + 10 * DAY]
    assert entry.missed_count == 10 * 1440 - 1
    entry = made(app, SaysDueEach5Minutes("*/5", app=app))
    entry.begin(NOON + MINUTE)
    assert run(entry, end, end)[-1] > end - 5 * MINUTE


# -- schedules that are refused


class Nothing(BaseSchedule):
    pass


@pytest.mark.parametrize(
    ("own", "text"),
    [
        (Nothing(), "its class Nothing has neither an is_due"),
        (schedule(), "run_every=None, which is not a timedelta"),
        (schedule("5"), "run_every='5'"),
        (SaysDue, "is not a schedule"),
        (lambda: 60, "is not a schedule"),
        (crontab(nowfun=5), "not callable"),
        (crontab(nowfun=lambda: "now"), "which is not a datetime"),
    ],
)
def test_a_schedule_that_cannot_be_asked_is_refused_by_name(
    app: Celery, own: Any, text: str
) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"schedule entry 'own': .*{text}"):
        made(app, own)


def test_a_nowfun_that_is_off_the_clock_is_logged(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning says that beats go by the system's clock and not by the crontab's ``nowfun``."""
    made(app, crontab(nowfun=lambda: datetime.now(UTC), app=app))
    assert caplog.text == ""
    made(app, crontab(nowfun=lambda: datetime.now(UTC) - HOUR, app=app))
    assert "the nowfun of own is -3600 s off the clock" in caplog.text


# -- the canonical text of a schedule


def test_a_schedule_has_the_same_text_in_each_process() -> None:
    """If the text differed, the schedule would count as changed at each start of a beat."""
    code = "from tests.helpers.own_schedules import own_texts; print(own_texts())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert other.stdout == f"{own_texts()}\n"
    assert all(len(text) < 500 and " at 0x" not in text for text in own_texts())


def test_different_arguments_make_another_schedule() -> None:
    texts = [
        spelled(each)
        for each in (
            *(SaysDue(True, 60), SaysDue(True, 61), Answers((True, 60)), Once(NOON)),
            *(Once(NOON + HOUR), Later("*/5", offset=HOUR), Later("*/5", offset=MINUTE)),
            *(Answers({"a": 1}), Answers({"a": 2}), crontab("*/5"), LaterClock("*/5")),
            *(Answers([0] * 1000), Answers([0] * 1001)),
        )
    ]
    assert len(set(texts)) == len(texts)
