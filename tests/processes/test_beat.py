"""``celery beat -S singleton`` and ``celery worker -B --scheduler singleton`` as processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from celery import Celery

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
        lambda: "once" in entries(fleet) and "beat: once is never due again" in beat.output,
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
