"""Real processes of ``celery beat -S singleton`` and ``celery worker -B --scheduler singleton``."""

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

# The heartbeat interval of 1 s times the default threshold of 2 makes a lease live for 2 s.
pytestmark = pytest.mark.fleet(
    app=APP, TEST_SCHEDULE=json.dumps(SCHEDULE), CELERY_SINGLETON_HEARTBEAT_INTERVAL=1
)


def wait_for_ticks(fleet: Fleet, count: int) -> None:
    """Wait until ``count`` more ticks have run, and check that each tick ran exactly once."""
    fleet.wait_for_notes("tick", len(fleet.notes("tick")) + count)
    dues = [datetime.fromisoformat(note["due"]) for note in fleet.notes("tick")]
    steps = {later - earlier for earlier, later in pairwise(sorted(dues))}
    assert steps == {timedelta(seconds=EVERY)}


def sent_by(fleet: Fleet, beats: list[Beat]) -> list[int]:
    """Return the number of ticks that each beat has sent."""
    return [beat.output.count("Sending due task a (ticked)") for beat in beats]


def test_only_one_of_two_beats_sends(fleet: Fleet) -> None:
    fleet.start("-P", "solo")
    one = fleet.start_beat()
    one.wait_leads()
    other = fleet.start_beat()
    other.wait_stands_by()
    wait_for_ticks(fleet, 3)
    assert "beat stands by: celerybeat@" in other.output
    assert f":{one.process.pid}:" in other.output
    assert sent_by(fleet, [one, other])[1] == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_another_beat_takes_over(fleet: Fleet, how: signal.Signals) -> None:
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


def test_one_of_the_beats_in_workers_leads(fleet: Fleet) -> None:
    """Two workers run with ``-B``. The worker with the leading beat is stopped. The other beat
    leads.
    """
    workers = [
        fleet.start("-c", "1", "-B", "--scheduler", "singleton", name=f"node{number}")
        for number in range(2)
    ]

    def leading() -> Any:
        found = [worker for worker in workers if "beat leads" in worker.output]
        return found[0] if found else None

    first = wait_until(leading, "one of them leads")
    wait_for_ticks(fleet, 2)
    first.stop()
    workers.remove(first)
    (second,) = workers
    second.wait_for("beat leads")
    wait_for_ticks(fleet, 2)
    assert "beat gave back the lead" in first.output


def test_objects_inherited_from_the_worker_close_no_file_of_its_beat(fleet: Fleet) -> None:
    """Celery closes the files that a beat process inherits from its worker. The files of the beat's
    store then get the same numbers.

    When Python collects the inherited file objects, these would close the numbers again, and with
    them the store's files.
    """
    fleet.environment["TEST_GARBAGE"] = "1"
    worker = fleet.start("-c", "1", "-B", "--scheduler", "singleton")
    worker.wait_for("beat leads")
    wait_for_ticks(fleet, 3)
    assert "beat waits" not in worker.output


def test_beat_in_a_worker_with_a_solo_pool(fleet: Fleet) -> None:
    """The worker has no child process but its beat."""
    worker = fleet.start("-P", "solo", "-B", "--scheduler", "singleton")
    worker.wait_for("beat leads")
    wait_for_ticks(fleet, 3)
    worker.stop()
    assert "beat gave back the lead" in worker.output


@has_ping
def test_a_leading_beat_and_a_standby_beat_answer_ping(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """The test asks as Celery's own ``inspect ping`` does."""
    app = client()
    names = ["celerybeat@one", "celerybeat@other"]
    beats = [fleet.start_beat(options=("-n", name, REMOTE)) for name in names]
    beats[0].wait_for("beat pidbox: Connected")
    beats[1].wait_for("beat pidbox: Connected")

    def answer() -> set[str]:
        return {name for reply in app.control.ping(timeout=1.0) for name in reply}

    wait_until(lambda: answer() == set(names), "both beats answer")


@has_ping
def test_a_leader_that_hangs_does_not_answer_ping(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A user's hook hangs while the leader sends a message. The leader does not answer ``ping`` any
    more.

    It does not renew its lease either, so another beat becomes the leader.
    """
    app = client()
    hang = fleet.directory / "hang"
    # There is no worker. A plain task is used, because the next tick of a singleton would wait for
    # the end of the tick before.
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

    wait_until(lambda: answer() == {"celerybeat@other"}, "only the other beat answers")
    hang.unlink()
    stuck.wait_for("its lease was taken over")
    wait_until(lambda: len(answer()) == 2, "both beats answer")


def test_a_wrong_configuration_ends_the_beat(fleet: Fleet) -> None:
    bad = {"a": {"task": "ticked", "schedule": 1.0, "catch_up": "some"}}
    beat = fleet.start_beat(TEST_SCHEDULE=json.dumps(bad))
    assert beat.process.wait(timeout=30) != 0
    assert "schedule entry 'a': catch_up='some' is not allowed" in beat.output
    assert "Traceback" not in beat.output


def test_odd_schedules_do_not_delay_the_ticks_of_other_entries(fleet: Fleet) -> None:
    """The odd schedules are: one that runs once, two whose next tick cannot be calculated, and one
    that always wants to be asked again at once. The other entries have a normal interval, and an
    interval that is read from a table.
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
    """Return the names of the entries whose ticks were run, in order."""
    return [note["entry"] for note in fleet.notes("tick")]
