"""The singleton scheduler: several beats in one process, on stores that processes can share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, signals
from celery.beat import BeatLazyFunc, ScheduleEntry, Scheduler
from celery.exceptions import ImproperlyConfigured
from celery.schedules import crontab, schedstate
from celery.schedules import schedule as interval
from django_celery_beat.clockedschedule import clocked
from kombu.exceptions import OperationalError

from celery_singleton_state.beat import LeaderMixin
from celery_singleton_state.beat.leader import STANDBY_POLL, NotLeading
from celery_singleton_state.cli.next import times_of
from celery_singleton_state.headers import DUE, ENTRY
from celery_singleton_state.runtime import close_runtime
from celery_singleton_state.store.base import Ended, Lease, Row, StoreUnavailable
from celery_singleton_state.ticks import task_id_of
from tests.helpers.beats import EVERY_MINUTE, SECOND, Beats, due_now, row, stored, take_over
from tests.helpers.own_schedules import Answers, LastDayOfMonth, SaysDue
from tests.helpers.waiting import wait_until


@pytest.fixture
def sent() -> Iterator[list[dict[str, Any]]]:
    """Return a list that gets the headers of each message that is sent."""
    found: list[dict[str, Any]] = []

    def note(sender: str, headers: dict[str, Any], **_: Any) -> None:
        found.append(headers)

    signals.before_task_publish.connect(note)
    yield found
    signals.before_task_publish.disconnect(note)


def lease_of(found: Row) -> Lease:
    assert found.holder is not None
    return Lease(found.key, found.holder, found.fence, 8.0)


def test_one_beat_leads_and_the_other_stands_by(
    beats: Beats, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    one, other = (beats.make({"e": EVERY_MINUTE}) for _ in range(2))
    assert one.tick() > 0
    assert other.tick() == STANDBY_POLL
    assert other.tick() == STANDBY_POLL
    said = [record.message for record in caplog.records if record.message.startswith("beat ")]
    holder, fence = row(one).holder, row(one).fence
    assert holder is not None
    assert holder.startswith("celerybeat@")
    assert said == [
        f"beat leads 'shop' as {holder}, fence {fence}",
        f"beat stands by: {holder} leads 'shop'",
    ]


def test_a_tick_is_sent_and_recorded(beats: Beats, sent: list[dict[str, Any]]) -> None:
    beat = beats.make({"e": EVERY_MINUTE | {"args": (1,)}})
    beat.tick()
    due = due_now(beat)
    beat.tick()
    (message,) = sent
    assert message["task"] == "t"
    assert message["id"] == task_id_of("shop", "e", due)
    assert datetime.fromisoformat(message[DUE]) == due
    assert message["celery_beat_task"] is True
    state = stored(beat)["e"]
    assert (state.last_tick, state.total_run_count) == (due, 1)
    assert state.next_tick == due + timedelta(minutes=1)
    assert state.last_run_at is not None
    assert timedelta(0) < state.last_run_at - due < 30 * SECOND


def test_the_next_leader_sends_no_tick_twice(beats: Beats, sent: list[dict[str, Any]]) -> None:
    """1. Beat A sends a tick, and is stopped.
    2. Beat B leads at its next poll.
    3. B does not send that tick again.
    """
    one, other = (beats.make({"e": EVERY_MINUTE}) for _ in range(2))
    one.tick()
    other.tick()
    due = due_now(one)
    one.tick()
    one.close()
    assert other.tick() > 0
    assert other._leader.leads
    assert [message["id"] for message in sent] == [task_id_of("shop", "e", due)]
    assert stored(other)["e"].next_tick == due + timedelta(minutes=1)


def test_a_tick_that_was_not_recorded_is_sent_again_with_the_same_id(
    beats: Beats, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Beat A sends a tick.
    2. A dies before it records the tick.
    3. Beat B leads.
    4. B sends the tick again.
    """
    one, other = (beats.make({"e": EVERY_MINUTE}) for _ in range(2))
    one.tick()
    due = due_now(one)
    monkeypatch.setattr(one, "_record", lambda: None)
    one.tick()
    take_over(one)
    one._leader.runtime.store.release(lease_of(row(one)), Ended("succeeded", "[]"))
    other.tick()
    assert [message["id"] for message in sent] == [task_id_of("shop", "e", due)] * 2


def test_while_the_store_is_unavailable_no_further_tick_is_sent(
    beats: Beats,
    sent: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """1. The beat sends a tick.
    2. The store becomes unavailable before the tick is recorded.
    3. The beat sends no other tick.
    4. The store is available again, and the first tick is recorded.
    5. The second tick is sent.
    """
    caplog.set_level(logging.INFO)
    beat = beats.make({"e": EVERY_MINUTE, "f": EVERY_MINUTE})
    beat.tick()
    entries: Any = beat._leader.runtime.store.entries
    record = entries.record
    first = due_now(beat, "e")
    # The tick of "f" is so far in the future that it becomes due only when the test moves the
    # clock.
    second = due_now(beat, "f", -30 * SECOND)
    monkeypatch.setattr(entries, "record", _unavailable)
    assert beat.tick() == STANDBY_POLL
    now = beat._leader.now
    monkeypatch.setattr(beat._leader, "now", lambda: now() + 30 * SECOND)
    for _ in range(3):
        assert beat.tick() == STANDBY_POLL
    assert len(sent) == 1
    monkeypatch.setattr(entries, "record", record)
    beat.tick()
    assert [message[DUE] for message in sent] == [due.isoformat() for due in (first, second)]
    assert {name: state.last_tick for name, state in stored(beat).items()} == {
        "e": first,
        "f": second,
    }
    waited, led = caplog.text.rpartition("beat waits for the store: no answer")[::2]
    assert "beat waits" not in waited
    assert "beat leads 'shop'" in led


def _unavailable(*_: Any, **__: Any) -> Any:
    raise StoreUnavailable("no answer")


def test_a_beat_does_not_resend_its_own_unrecorded_tick(
    beats: Beats, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The beat sends a tick.
    2. It cannot record the tick, because the store is unavailable.
    3. Its lease expires.
    4. The store is available again.
    5. The beat leads again, and records the tick without sending it again.
    """
    beat = beats.make(
        {"e": EVERY_MINUTE}, singleton_heartbeat_interval=0.2, singleton_heartbeat_threshold=1
    )
    beat.tick()
    due, fence = due_now(beat), row(beat).fence
    store: Any = beat._leader.runtime.store
    record = store.entries.record
    monkeypatch.setattr(store.entries, "record", _unavailable)
    beat.tick()
    wait_until(lambda: not beat._leader.leads, "the lease expires")
    monkeypatch.setattr(store.entries, "record", record)
    wait_until(lambda: beat.tick() >= 0 and beat._leader.leads, "the beat leads again")
    beat.tick()
    assert [message["id"] for message in sent] == [task_id_of("shop", "e", due)]
    assert stored(beat)["e"].last_tick == due
    assert row(beat).fence > fence


def test_a_returning_leader_does_not_overwrite_the_records_of_others(
    beats: Beats, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Beat A sends a tick, cannot record it, and loses the lead.
    2. Beat B leads, and sends and records a later tick.
    3. A leads again. It neither sends nor records its older tick.
    """
    one, other = (beats.make({"e": EVERY_MINUTE}) for _ in range(2))
    one.tick()
    due_now(one, ago=timedelta(seconds=90))
    with monkeypatch.context() as patch:
        patch.setattr(one._leader.runtime.store.entries, "record", _unavailable)
        one.tick()
    assert list(one._unrecorded) == ["e"]
    take_over(one)
    one._leader.give_up()
    one._leader.runtime.store.release(lease_of(row(one)), Ended("succeeded", "[]"))
    other.tick()
    later = due_now(other)
    other.tick()
    other.close()
    count = len(sent)
    one.tick()
    assert one._leader.leads
    assert len(sent) == count
    assert stored(one)["e"].last_tick == later


def test_a_leader_whose_lease_was_taken_over_stops_sending(
    beats: Beats, sent: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """1. The leader is suspended.
    2. Another beat takes its lease over.
    3. The leader wakes up before its own clock says that its lease has expired.
    4. It sends a due tick.
    5. It tries to record the tick, and the store refuses this write.
    6. It sends nothing more.
    """
    caplog.set_level(logging.INFO)
    beat = beats.make({"e": EVERY_MINUTE})
    beat.tick()
    due_now(beat)
    take_over(beat)
    assert beat.tick() == STANDBY_POLL
    assert not beat._leader.leads
    assert "its lease was taken over" in caplog.text
    count = len(sent)
    assert beat.tick() == STANDBY_POLL
    assert len(sent) == count


def test_a_renewal_that_is_due_comes_before_any_tick_is_sent(
    beats: Beats, sent: list[dict[str, Any]]
) -> None:
    """1. The leader is suspended.
    2. Another beat takes its lease over.
    3. The leader wakes up, and a renewal is due.
    4. The store refuses the renewal, and no tick is sent.
    """
    beat = beats.make({"e": EVERY_MINUTE})
    beat.tick()
    due_now(beat)
    take_over(beat)
    held: Any = beat._leader._held
    held.renew_at = 0.0
    assert beat.tick() == STANDBY_POLL
    assert sent == []


def test_a_leader_whose_broker_refuses_releases_its_lease(
    beats: Beats, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beat A cannot reach the broker, and releases its lease. Beat B leads, and sends the tick."""
    one, other = (beats.make({"e": EVERY_MINUTE}) for _ in range(2))
    one.tick()
    other.tick()
    due = due_now(one)

    def refuse(*_: Any, **__: Any) -> Any:
        raise OperationalError("refused")

    monkeypatch.setattr(one, "send_task", refuse)
    assert one.tick() == STANDBY_POLL
    assert not row(one).held
    assert other.tick() > 0
    assert [message["id"] for message in sent] == [task_id_of("shop", "e", due)]


def test_a_beat_without_a_broker_does_not_lead(
    beats: Beats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beat = beats.make({"e": EVERY_MINUTE})

    def refuse(*_: Any, **__: Any) -> Any:
        raise OperationalError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(beat, "_ensure_connected", refuse)
        assert beat.tick() == STANDBY_POLL
    assert "beat waits for the broker: refused" in caplog.text
    assert beat._leader.runtime.store.peek("singleton-beat:shop") is None
    assert beat.tick() > 0


def test_a_message_that_cannot_be_made_stops_no_other_entry(
    beats: Beats, sent: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    beat = beats.make({"bad": EVERY_MINUTE | {"args": (object(),)}, "good": EVERY_MINUTE})
    beat.tick()
    bad = due_now(beat, "bad", 2 * SECOND)
    due_now(beat, "good")
    beat.tick()
    assert "Message Error" in caplog.text
    assert len(stored(beat)) == 2
    assert stored(beat)["bad"].last_tick == bad
    assert stored(beat)["good"].total_run_count == 1


def test_a_lazy_argument_that_fails_stops_no_other_entry(
    beats: Beats, sent: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """An entry's lazy argument raises FileNotFoundError, which broker connections raise, too.

    The beat does not conclude that the broker is unavailable. It sends the other entry's tick.
    """

    def read() -> str:
        raise FileNotFoundError("config")

    lazy = EVERY_MINUTE | {"args": (BeatLazyFunc(read),)}
    beat = beats.make({"lazy": lazy, "good": EVERY_MINUTE})
    beat.tick()
    due_now(beat, "lazy", 2 * SECOND)
    due_now(beat, "good")
    beat.tick()
    assert "Message Error" in caplog.text
    assert beat._leader.leads
    assert stored(beat)["lazy"].total_run_count == 1
    assert stored(beat)["good"].total_run_count == 1


def test_missed_ticks_are_counted_and_logged(
    beats: Beats, sent: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    beat = beats.make({"e": EVERY_MINUTE, "all": EVERY_MINUTE | {"catch_up": "all"}})
    beat.tick()
    first = due_now(beat, "e", timedelta(minutes=60, seconds=1))
    due_now(beat, "all", timedelta(minutes=60, seconds=1))
    beat.tick()
    assert stored(beat)["e"].missed_count == 60
    assert f"60 of e from {first:%Y-%m-%d %H:%M:%S} on" in caplog.text
    dues = ticks_sent(sent)
    assert dues["shop:all"] == sorted(dues["shop:all"])
    assert {entry: len(each) for entry, each in dues.items()} == {"shop:e": 1, "shop:all": 5}


def ticks_sent(sent: list[dict[str, Any]]) -> dict[str, list[datetime]]:
    """Return a dict that maps each entry to the ticks whose messages were sent, in order."""
    found: dict[str, list[datetime]] = {}
    for message in sent:
        due = datetime.fromisoformat(message[DUE])
        found.setdefault(message[ENTRY], []).append(due)
    return found


def test_the_latest_tick_of_one_entry_precedes_anothers_backlog(
    beats: Beats, sent: list[dict[str, Any]]
) -> None:
    """Two entries are behind. The latest tick of one is sent before the older ticks of the other.

    If the beat sent all ticks in the order of their due times, the latest tick would be too old
    before its turn came, and so would each tick after it.
    """
    beat = beats.make({"all": EVERY_MINUTE | {"catch_up": "all"}, "e": EVERY_MINUTE})
    beat.tick()
    due_now(beat, "all", timedelta(minutes=4, seconds=1))
    due_now(beat, "e", timedelta(minutes=4, seconds=2))
    beat.tick()
    assert [message[ENTRY] for message in sent] == ["shop:e"] + ["shop:all"] * 5


def test_a_deployment_adds_changes_and_removes_entries(
    beats: Beats, sent: list[dict[str, Any]]
) -> None:
    old = beats.make({"kept": EVERY_MINUTE, "changed": EVERY_MINUTE, "removed": EVERY_MINUTE})
    old.tick()
    ticks = {name: due_now(old, name) for name in ("kept", "changed", "removed")}
    old.tick()
    old.close()
    sent.clear()
    hourly = {"task": "t", "schedule": crontab(minute="0")}
    new = beats.make({"kept": EVERY_MINUTE, "changed": hourly, "added": EVERY_MINUTE})
    new.tick()
    assert sent == []
    found = stored(new)
    assert set(found) == {"kept", "changed", "added"}
    assert found["kept"].last_tick == ticks["kept"]
    assert found["changed"].last_tick == ticks["changed"]
    assert found["changed"].schedule.startswith("crontab")
    assert found["added"].last_tick is None


def test_entries_of_add_periodic_task(beats: Beats, sent: list[dict[str, Any]]) -> None:
    beat = beats.make({})
    beat.app.add_periodic_task(60.0, beat.app.signature("t"), name="e", catch_up="all")
    beat = beats.make(beat.app.conf.beat_schedule)
    beat.tick()
    assert beat.schedule["e"].catch_up == "all"
    due_now(beat)
    beat.tick()
    assert len(sent) == 1


def test_entries_that_are_added_while_the_beat_leads(
    beats: Beats, sent: list[dict[str, Any]]
) -> None:
    beat = beats.make({"e": EVERY_MINUTE})
    beat.tick()
    beat.add(name="f", task="t", schedule=60.0)
    beat.update_from_dict({"g": EVERY_MINUTE})
    beat.tick()
    assert set(stored(beat)) == {"e", "f", "g"}


def test_celerys_own_entry_for_the_result_backend_is_scheduled(beats: Beats) -> None:
    beat = beats.make({"e": EVERY_MINUTE}, result_backend="db+sqlite://", result_expires=60)
    assert "celery.backend_cleanup" in beat.schedule


def test_an_entry_whose_row_cannot_be_read_starts_anew(
    beats: Beats, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = (beats.make({"e": EVERY_MINUTE}) for _ in range(2))
    one.tick()
    one._leader.record({"e": "{"})
    one.close()
    other.tick()
    assert "singleton-beat:shop:e cannot be read, so its entry starts like a new one" in caplog.text
    assert set(stored(other)) == {"e"}


def test_a_wrong_clock_of_the_host_does_not_matter(
    beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's clock is wrong. The beat decides by the store's clock whether a tick is due."""
    right = beats.make({"e": EVERY_MINUTE})
    right.tick()
    now = right._leader.now()
    right.close()
    wrong = beats.make({"e": EVERY_MINUTE})
    monkeypatch.setattr("time.time", lambda: 0.0)
    wrong.tick()
    assert timedelta(0) <= wrong._leader.now() - now < 30 * SECOND


def test_all_due_ticks_are_recorded_in_one_statement(
    beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 ticks are due, and one statement records them. While none is due, no statement is sent."""
    beat = beats.make({f"e{number}": EVERY_MINUTE for number in range(50)})
    beat.tick()
    calls: list[str] = []
    connections: Any = beat._leader.runtime.store
    execute = connections._connections.execute

    def count(statement: str, *arguments: Any) -> Any:
        calls.append(statement.split()[0])
        return execute(statement, *arguments)

    monkeypatch.setattr(connections._connections, "execute", count)
    beat.tick()
    assert calls == []
    for number in range(50):
        due_now(beat, f"e{number}")
    calls.clear()
    beat.tick()
    assert len(calls) == 1


def test_closing_a_beat_twice_does_no_harm(beats: Beats) -> None:
    """Celery closes a beat twice: in the handler of the stop signal, and when the process ends."""
    beat = beats.make({"e": EVERY_MINUTE})
    beat.tick()
    beat.close()
    fence = row(beat).fence
    beat.close()
    assert (row(beat).fence, row(beat).held, row(beat).run_count) == (fence, False, 1)


def test_an_entry_with_a_bad_option_is_refused_at_the_start(beats: Beats) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"'e': catch_up='some'"):
        beats.make({"e": EVERY_MINUTE | {"catch_up": "some"}})


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"e": 5}, r"'e': 5 is not allowed; an entry is a dict"),
        ({"e": None}, r"'e': None is not allowed; an entry is a dict"),
        ({"e": {}}, r"'e': task=None is not allowed"),
        ({7: EVERY_MINUTE}, r"7: name=7 is not allowed"),
        ({"e": EVERY_MINUTE | {"every": 5}}, r"'e': 'every' is not known; an entry takes task"),
        ([EVERY_MINUTE], r"beat_schedule=.* takes a dict"),
    ],
)
def test_a_malformed_beat_schedule_is_refused_at_the_start(
    on_sqlite: Beats, schedule: Any, message: str
) -> None:
    with pytest.raises(ImproperlyConfigured, match=message):
        on_sqlite.make(schedule)


def test_bad_entries_from_other_sources_are_refused_by_name(on_sqlite: Beats) -> None:
    """Add bad entries by ``add_periodic_task``, by ``add``, and as objects of Celery's class."""
    beat = on_sqlite.make({})
    beat.app.add_periodic_task(1e12, beat.app.signature("t"), name="long")
    with pytest.raises(ImproperlyConfigured, match=r"'long': .* is not a schedule: an interval"):
        on_sqlite.make(beat.app.conf.beat_schedule)
    with pytest.raises(ImproperlyConfigured, match="'f': args=5"):
        beat.add(name="f", task="t", schedule=60.0, args=5)
    celerys = ScheduleEntry(name="c", task="t", schedule=60.0, options={"expires": "x"})
    with pytest.raises(ImproperlyConfigured, match=r"'c': options\['expires'\]='x'"):
        on_sqlite.make({"c": celerys})
    celerys.options = {}
    assert "c" in on_sqlite.make({"c": celerys}).schedule


def test_an_entry_that_is_never_due_again_stops_no_other_entry(
    on_sqlite: Beats, sent: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """The entry "once" runs only once. The next tick of the entry "none" cannot be calculated.

    The beat still sends the ticks of the entry "normal".
    """
    now = datetime.now(UTC)
    schedule = {
        "once": {"task": "t", "schedule": clocked(now - SECOND)},
        "none": {"task": "t", "schedule": Answers(timedelta(0))},
        "normal": EVERY_MINUTE,
    }
    beat = on_sqlite.make(schedule)
    beat.tick()
    due_now(beat, "normal")
    assert 0 < beat.tick() <= beat.max_interval
    assert [message[ENTRY] for message in sent] == ["shop:once", "shop:normal"]
    assert caplog.text.count("the next tick of none cannot be calculated") == 1
    states = stored(beat)
    assert (states["once"].next_tick, states["once"].total_run_count) == (None, 1)
    beat.close()
    other = on_sqlite.make(schedule)
    other.tick()
    due_now(other, "normal")
    other.tick()
    assert [message[ENTRY] for message in sent][2:] == ["shop:normal"]


def test_the_answer_of_a_custom_schedule_is_recorded_before_the_next_question(
    on_sqlite: Beats, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A custom schedule has its own method that says whether it is due, and when to ask again.

    1. Leader A asks at time t1: not due, ask again at t2.
    2. A records t2.
    3. A asks at t2: due.
    4. A sends the tick, and dies before it records that the tick was sent.
    5. Leader B asks at t2, too, so B's tick has the same task id. If A had not recorded t2, B would
       ask at another time, and its tick would have another task id.
    """
    own = {"e": {"task": "t", "schedule": SaysDue(False, 0.3)}}
    one, other = (
        on_sqlite.make(own),
        on_sqlite.make({"e": {"task": "t", "schedule": SaysDue(True, 60)}}),
    )
    one.tick()
    first = stored(one)["e"].next_tick
    wait_until(
        lambda: one.tick() >= 0 and stored(one)["e"].next_tick != first, "the schedule was asked"
    )
    second = stored(one)["e"].next_tick
    assert first is not None
    assert second is not None
    one.schedule["e"].schedule.answer = (True, 60)
    monkeypatch.setattr(one, "_record", lambda: None)
    wait_until(lambda: one.tick() >= 0 and sent, "the tick was sent")
    take_over(one)
    one._leader.runtime.store.release(lease_of(row(one)), Ended("succeeded", "[]"))
    monkeypatch.setattr(other.schedule["e"], "spelled", stored(one)["e"].schedule)
    other.tick()
    assert [message["id"] for message in sent] == [task_id_of("shop", "e", second)] * 2


def test_the_next_times_of_a_custom_schedule_are_its_due_times(on_sqlite: Beats) -> None:
    """For such a schedule the store has the next time to ask it, which may be no due time.

    ``celery singleton next`` shows the entry's due times instead.
    """
    own = {"e": {"task": "t", "schedule": AnHourAfter(5.0)}}
    beat = on_sqlite.make(own)
    beat.tick()
    state = stored(beat)["e"]
    assert state.since is not None
    assert state.next_tick == state.since + 5 * SECOND
    hour = timedelta(hours=1)
    assert times_of(beat.app, "e", 2)["next"] == [state.since + hour, state.since + 2 * hour]


class AnHourAfter(interval):
    """A schedule that is due an hour after the last run, but wants to be asked every 5 seconds."""

    def is_due(self, last_run_at: datetime) -> Any:
        return schedstate(self.now() - last_run_at >= timedelta(hours=1), 5)


def test_a_missing_table_is_refused_at_the_start(beats: Beats) -> None:
    with pytest.raises(ImproperlyConfigured, match="singleton migrate"):
        beats.make({"e": EVERY_MINUTE}, singleton_auto_migrate=False)


def test_a_stop_whose_systemexit_was_lost_takes_effect_at_the_next_tick(
    beats: Beats, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A signal arrives while a message is sent.
    2. Its handler closes the beat.
    3. The handler's SystemExit is lost, as if it had been raised in a destructor.
    4. The beat sends nothing more.
    5. The next tick raises SystemExit again.
    """
    beat = beats.make({"e": EVERY_MINUTE, "f": EVERY_MINUTE})
    beat.tick()
    due_now(beat, "e")
    due_now(beat, "f")
    apply_async = beat.apply_async

    def handle_signal(*arguments: Any, **options: Any) -> Any:
        result = apply_async(*arguments, **options)
        beat.close()
        return result

    monkeypatch.setattr(beat, "apply_async", handle_signal)
    assert beat.tick() <= STANDBY_POLL
    assert len(sent) == 1
    assert not row(beat).held
    with pytest.raises(SystemExit):
        beat.tick()


@pytest.mark.parametrize("where", ["send_task", "_round", "_load", "_record"])
def test_a_stop_in_the_middle_of_a_tick_logs_no_error(
    beats: Beats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """1. A client waits for the answer of a server.
    2. A signal arrives, and its handler closes the beat.
    3. The client raises an error of its own in place of the handler's SystemExit.
    4. The beat raises SystemExit, and logs no error.
    """
    beat = beats.make({"e": EVERY_MINUTE})
    beat.tick()
    due_now(beat, "e")
    if where == "_load":
        beat._fence = None
    error = StoreUnavailable("gone") if where == "_record" else ValueError("the file is closed")

    def interrupt(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        try:
            beat.close()
            raise SystemExit
        finally:
            raise error

    monkeypatch.setattr(beat, where, interrupt)
    caplog.clear()
    with pytest.raises(SystemExit):
        beat.tick()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not row(beat).held


def test_a_stop_in_a_destructor_shows_no_traceback(
    on_sqlite: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Python destroys the AsyncResult of a sent message, which unsubscribes from the backend.
    2. A signal arrives, and its handler raises SystemExit.
    3. Python would print an exception that a destructor raises. The beat hides this SystemExit,
       because its next tick raises it again.
    """
    shown: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: shown.append(lost.exc_type))
    beat = on_sqlite.make({"e": EVERY_MINUTE})
    beat.tick()
    due_now(beat, "e")

    class Result:
        id = "1"

        def __del__(self) -> None:
            beat.close()
            raise SystemExit

    monkeypatch.setattr(beat, "send_task", lambda *_, **__: Result())
    beat.tick()
    assert shown == []
    with pytest.raises(SystemExit):
        beat.tick()
    # Only the SystemExit of the beat's stop is hidden: Python prints exceptions of later
    # destructors.
    Result()
    assert shown == [SystemExit]


class _Leading(LeaderMixin, Scheduler):
    """Celery's own scheduler with LeaderMixin: any number of its beats can run, and one leads."""


@pytest.mark.parametrize(
    "own",
    [
        *(Answers(None), Answers(timedelta(0)), SaysDue(False, None), SaysDue(False, 1e8)),
        *(clocked(datetime.now(UTC) - SECOND), LastDayOfMonth("0", "0"), SaysDue(True, 1e8)),
    ],
)
def test_another_scheduler_class_goes_on_beside_an_entry_that_is_not_due_again(
    on_sqlite: Beats, sent: list[dict[str, Any]], own: Any
) -> None:
    """One entry is not due again. Celery's own scheduler sends the other entry's ticks.

    The beat does not ask the first entry's schedule in a loop.
    """
    schedule = {"own": {"task": "t", "schedule": own}, "e": {"task": "t", "schedule": 0.1}}
    beat = on_sqlite.make(schedule, scheduler=_Leading)
    wait_until(
        lambda: beat.tick() >= 0 and ticks_sent(sent).get("shop:e"),
        "the other entry's tick is sent",
    )
    states = stored(beat)
    assert states["e"].next_tick is not None
    assert states["own"].next_tick is None or isinstance(own, LastDayOfMonth)


@pytest.mark.parametrize("edited", [True, False])
def test_an_edit_of_an_entry_that_could_not_be_sent_is_kept(
    shared_store_url: str, monkeypatch: pytest.MonkeyPatch, edited: bool
) -> None:
    """1. The scheduler reserves an entry, to send it.
    2. The user makes the entry slower, or disables it.
    3. The beat must renew its lease first, so the entry is not sent.
    4. The beat reads the schedule anew, and undoes the reservation there.
    5. The user's change stays.
    """
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(
        singleton_store_url=shared_store_url,
        singleton_auto_migrate=True,
        result_expires=None,
        beat_schedule={"e": EVERY_MINUTE},
    )
    beat = _Leading(app)
    try:
        beat.tick()
        entry = beat.schedule["e"]
        beat.reserve(entry)
        slower = beat.Entry(name="e", task="t", schedule=timedelta(hours=1), app=app)
        beat.schedule = {"e": slower} if edited else {}
        monkeypatch.setattr(type(beat._leader), "renew_in", -1.0)
        with pytest.raises(NotLeading):
            beat.apply_entry(entry)
        assert beat.schedule == ({"e": slower} if edited else {})
        assert not edited or slower.last_run_at == entry.last_run_at
    finally:
        beat.close()
        close_runtime(app)
        app.close()
