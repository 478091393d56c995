"""``celery beat -S singleton`` and ``celery worker -B --scheduler singleton`` as processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from celery import Celery
from msgspec.structs import replace

from celery_singleton_state.beat.entry import ON_TIME
from celery_singleton_state.beat.entry_state import decode_rows
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import Ended
from tests.helpers.fleet import Beat, Fleet, has_ping
from tests.helpers.waiting import wait_until

APP = "tests.apps.beat_app"
EVERY = 0.4
REMOTE = "--enable-remote-control"
SCHEDULE = {"a": {"task": "ticked", "schedule": EVERY, "catch_up": "all"}}

# A life of 2 s.
pytestmark = pytest.mark.fleet(
    app=APP, TEST_SCHEDULE=json.dumps(SCHEDULE), CELERY_SINGLETON_HEARTBEAT_INTERVAL=1
)


def wait_for_ticks(fleet: Fleet, count: int) -> None:
    """Wait until so many more have run, and see that each has run once and none was left out."""
    fleet.wait_for_notes("tick", len(fleet.notes("tick")) + count)
    dues = [datetime.fromisoformat(note["due"]) for note in fleet.notes("tick")]
    steps = {later - earlier for earlier, later in pairwise(sorted(dues))}
    assert steps == {timedelta(seconds=EVERY)}


def senders(fleet: Fleet, beats: list[Beat]) -> list[int]:
    """How much each beat has sent."""
    return [beat.output.count("Sending due task a (ticked)") for beat in beats]


def test_one_of_two_sends(fleet: Fleet) -> None:
    fleet.start("-P", "solo")
    one = fleet.start_beat()
    one.wait_leads()
    other = fleet.start_beat()
    other.wait_stands_by()
    wait_for_ticks(fleet, 3)
    assert "beat stands by: celerybeat@" in other.output
    assert f":{one.process.pid}:" in other.output
    assert senders(fleet, [one, other])[1] == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_another_takes_over(fleet: Fleet, how: signal.Signals) -> None:
    fleet.start("-P", "solo")
    one = fleet.start_beat()
    one.wait_leads()
    other = fleet.start_beat()
    other.wait_stands_by()
    wait_for_ticks(fleet, 2)
    one.process.send_signal(how)
    one.process.wait(timeout=30)
    other.wait_leads()
    wait_for_ticks(fleet, 3)
    if how is not signal.SIGKILL:
        assert "beat gave back the lead of 'shop': it stops" in one.output
        assert one.process.returncode == 0
        assert "Traceback" not in one.output


def test_beats_within_workers(fleet: Fleet) -> None:
    """``-B`` on every node: one leads; its worker is stopped in order, then the next one killed."""
    workers = [
        fleet.start("-c", "1", "-B", "--scheduler", "singleton", name=f"node{number}")
        for number in range(2)
    ]

    def leading() -> Any:
        said = [worker for worker in workers if "beat leads" in worker.output]
        return said[0] if said else None

    first = wait_until(leading, "one of them leads")
    wait_for_ticks(fleet, 2)
    first.stop()
    workers.remove(first)
    (second,) = workers
    second.wait_for("beat leads")
    wait_for_ticks(fleet, 2)
    assert "beat gave back the lead" in first.output


def test_what_a_worker_leaves_to_its_beat_closes_no_file_of_it(fleet: Fleet) -> None:
    """Celery closes the files that a worker's beat inherits, and the numbers are given to the
    store's; then Python finds the objects of the old ones, and closes these numbers.
    """
    fleet.environment["TEST_GARBAGE"] = "1"
    worker = fleet.start("-c", "1", "-B", "--scheduler", "singleton")
    worker.wait_for("beat leads")
    wait_for_ticks(fleet, 3)
    assert "beat waits" not in worker.output


def test_beat_within_a_worker_of_one_process(fleet: Fleet) -> None:
    """A pool of none but itself, and beat beside it."""
    worker = fleet.start("-P", "solo", "-B", "--scheduler", "singleton")
    worker.wait_for("beat leads")
    wait_for_ticks(fleet, 3)
    worker.stop()
    assert "beat gave back the lead" in worker.output


@has_ping
def test_who_leads_and_who_stands_by_are_healthy(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """Celery's own ``inspect ping``."""
    app = client()
    names = ["celerybeat@one", "celerybeat@other"]
    beats = [fleet.start_beat(options=("-n", name, REMOTE)) for name in names]
    beats[0].wait_for("beat pidbox: Connected")
    beats[1].wait_for("beat pidbox: Connected")

    def answer() -> set[str]:
        return {name for reply in app.control.ping(timeout=1.0) for name in reply}

    wait_until(lambda: answer() == set(names), "both answer")


@has_ping
def test_a_leader_that_stopped_ticking_is_not(fleet: Fleet, client: Callable[[], Celery]) -> None:
    """A hook of the user's hangs as a message is sent: the leader answers no more, and as it does
    not renew its lease any more, another beat leads.
    """
    app = client()
    hang = fleet.directory / "hang"
    # No worker is there to end a tick, for which the next one of a singleton would wait.
    fleet.environment["TEST_SCHEDULE"] = json.dumps({"a": SCHEDULE["a"] | {"task": "plain"}})
    stuck = fleet.start_beat(
        APP, options=("-n", "celerybeat@stuck", REMOTE), TEST_HANG=str(hang), TEST_MAX_TICK_AGE="3"
    )
    stuck.wait_leads()
    stuck.wait_for("beat pidbox: Connected")
    other = fleet.start_beat(options=("-n", "celerybeat@other", REMOTE), TEST_MAX_TICK_AGE="3")
    other.wait_stands_by()
    other.wait_for("beat pidbox: Connected")
    hang.touch()
    other.wait_leads()

    def answer() -> set[str]:
        return {name for reply in app.control.ping(timeout=1.0) for name in reply}

    wait_until(lambda: answer() == {"celerybeat@other"}, "only the other one answers")
    hang.unlink()
    stuck.wait_for("its lease was taken over")
    wait_until(lambda: len(answer()) == 2, "both answer")


def test_a_configuration_that_cannot_work_ends_it(fleet: Fleet) -> None:
    bad = {"a": {"task": "ticked", "schedule": 1.0, "catch_up": "some"}}
    beat = fleet.start_beat(TEST_SCHEDULE=json.dumps(bad))
    assert beat.process.wait(timeout=30) != 0
    assert "schedule entry 'a': catch_up='some' is not allowed" in beat.output
    assert "Traceback" not in beat.output


def test_schedules_that_are_never_due_again_keep_nobody_from_their_ticks(fleet: Fleet) -> None:
    """A run-once schedule, two that cannot tell, one that wants to be asked at once, always; and
    beside them a normal one, and one whose interval comes from a table.
    """
    fleet.environment["TEST_OWN_SCHEDULES"] = "1"
    fleet.start("-P", "solo")
    beat = fleet.start_beat()
    wait_until(
        lambda: "once" in entries(fleet) and "beat: once is due no more" in beat.output,
        "the run-once schedule is sent",
    )
    sent = len(fleet.notes("tick"))
    fleet.wait_for_notes("tick", sent + 3)
    assert set(entries(fleet)) <= {"a", "once", "table"}
    assert entries(fleet).count("once") == 1
    for name in ("zero", "negative"):
        assert beat.output.count(f"the next tick of {name} cannot be calculated") == 1
    beat.stop()
    assert "Traceback" not in beat.output


def entries(fleet: Fleet) -> list[str]:
    """Those of the ticks that were run, in order."""
    return [note["entry"] for note in fleet.notes("tick")]


@pytest.mark.fleet(store="postgresql", CELERY_SINGLETON_HEARTBEAT_INTERVAL=4)
def test_a_stop_in_mid_batch_loses_and_doubles_nothing(make_fleet: Callable[..., Fleet]) -> None:
    """300 entries are due at once, again and again; the leader is told to stop while it sends."""
    schedule = {
        f"e{number}": {"task": "plain", "schedule": 1.0, "catch_up": "all"} for number in range(300)
    }
    fleet = make_fleet(TEST_SCHEDULE=json.dumps(schedule))
    one = fleet.start_beat()
    one.wait_leads()
    other = fleet.start_beat()
    other.wait_stands_by()
    wait_until(lambda: senders_of_any(one) > 400, "it sends")
    os.kill(one.process.pid, signal.SIGTERM)
    one.process.wait(timeout=30)
    other.wait_leads()
    wait_until(lambda: senders_of_any(other) > 700, "the other one sends")
    other.stop()
    fleet.start("-P", "threads", "-c", "2")
    sent = senders_of_any(one) + senders_of_any(other)
    # Each can have been told to stop between saying so and sending.
    notes = fleet.wait_for_notes("tick", sent - 2)
    ticks: dict[str, list[datetime]] = {}
    for note in notes:
        ticks.setdefault(note["entry"], []).append(datetime.fromisoformat(note["due"]))
    doubled = len(notes) - len({note["id"] for note in notes})
    # The one that was on its way when the signal came.
    assert doubled <= 1
    for dues in ticks.values():
        steps = {later - earlier for earlier, later in pairwise(sorted(set(dues)))}
        assert steps == {timedelta(seconds=1)}


def senders_of_any(beat: Beat) -> int:
    return beat.output.count("Sending due task")


MINUTE = timedelta(minutes=1)
MINUTES = {
    "latest": {"catch_up": "latest"},
    "all": {"catch_up": "all"},
    "all of them": {"catch_up": "all", "skip_if_older_than": None},
    "none": {"catch_up": "none"},
    "ten minutes": {"catch_up": "all", "skip_if_older_than": 600},
    "last run": {"next_from": "last_run", "skip_if_older_than": None},
}


@pytest.mark.fleet(CELERY_SINGLETON_HEARTBEAT_INTERVAL=4)
def test_after_a_pause_of_an_hour(make_fleet: Callable[..., Fleet], store_url: str) -> None:
    """Everything stands still for an hour: what the store has is made an hour older. Then a beat
    leads, and what is sent is what each entry asks for, in order.
    """
    schedule = {
        name: {"task": "plain", "schedule": 60.0, **rules} for name, rules in MINUTES.items()
    }
    fleet = make_fleet(TEST_SCHEDULE=json.dumps(schedule))
    before = fleet.start_beat()
    before.wait_for("6 entries, 6 of them new")
    before.stop()
    first = move_back(store_url, timedelta(hours=1))
    after = fleet.start_beat()
    after.wait_for("beat leads")
    fleet.start("-P", "solo")
    began = led_since(store_url)
    sent: dict[str, list[datetime]] = {}

    def read() -> bool:
        sent.clear()
        for note in fleet.notes("tick"):
            sent.setdefault(note["entry"], []).append(datetime.fromisoformat(note["due"]))
        caught_up = {name for name, dues in sent.items() if dues[-1] > began - MINUTE}
        return "last run" in sent and caught_up >= MINUTES.keys() - {"none", "last run"}

    wait_until(read, "each entry has caught up")
    caught_up_at = datetime.now(UTC)
    assert sent["latest"][0] > began - MINUTE
    assert sent["all of them"][0] == first["all of them"]
    assert sent["last run"][0] == first["last run"]
    for name, patience in {"all": 5 * MINUTE, "ten minutes": 10 * MINUTE}.items():
        assert began - patience <= sent[name][0] < caught_up_at - patience + MINUTE
    for name in ("all", "all of them", "ten minutes"):
        steps = {later - earlier for earlier, later in pairwise(sent[name])}
        assert steps == {MINUTE}
    on_time = began - timedelta(seconds=ON_TIME)
    assert all(due > on_time for due in sent.get("none", []))
    assert all(dues == sorted(dues) for dues in sent.values())
    assert "of none from" in after.output
    assert "of latest from" in after.output


def led_since(store_url: str) -> datetime:
    store = open_store(store_url, "kv_store", 5.0)
    row = store.peek("singleton-beat:shop")
    store.close()
    assert row is not None
    assert row.acquired_at is not None
    return datetime.fromtimestamp(row.acquired_at, UTC)


def move_back(store_url: str, by: timedelta) -> dict[str, datetime]:
    """Make the whole schedule older; returns the next tick of each entry."""
    store = open_store(store_url, "kv_store", 5.0)
    lease = store.acquire("singleton-beat:shop", "the test", 60, None)
    assert lease is not None
    rows = store.entries.load("singleton-beat:shop:")
    older = {
        name: replace(state, next_tick=state.next_tick - by)
        for name, state in decode_rows(rows).items()
        if state.next_tick is not None
    }
    keys = {f"singleton-beat:shop:{name}": state for name, state in older.items()}
    document = {key: msgspec.json.encode(state).decode() for key, state in keys.items()}
    store.entries.record(lease.lease, document, 1, lease.write)
    store.release(lease.lease, Ended("succeeded", "[]"))
    store.close()
    return {name: state.next_tick for name, state in older.items() if state.next_tick}
