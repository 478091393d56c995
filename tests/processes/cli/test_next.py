"""The command ``celery singleton next``, run as an operator runs it."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from tests.helpers.fleet import Fleet
from tests.helpers.waiting import wait_until

APP = "tests.apps.beat_app"
SCHEDULE = {
    "often": {"task": "ticked", "schedule": 0.5},
    "nightly": {"task": "ticked", "schedule": ["30", "4"]},
}

pytestmark = pytest.mark.fleet(app=APP, TEST_SCHEDULE=json.dumps(SCHEDULE))


def next_(fleet: Fleet, *arguments: str) -> str:
    result = fleet.command("singleton", "next", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def overview(fleet: Fleet) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next_(fleet, "--json"))
    return found


def test_next_before_a_beat_led(fleet: Fleet) -> None:
    assert next_(fleet) == "no beat has led 'shop' yet\n"
    found = overview(fleet)
    assert (found["name"], found["leader"], found["entries"]) == ("shop", None, [])


def test_next_shows_the_leader_and_its_next_ticks(fleet: Fleet) -> None:
    """While a beat leads, its next ticks are shown. When it was killed, the ticks that have become
    due since are shown as late.
    """
    beat = fleet.start_beat()
    beat.wait_for("Sending due task often")
    found = overview(fleet)
    assert found["leader"].startswith("celerybeat@")
    assert f":{beat.process.pid}:" in found["leader"]
    assert (found["fence"] > 0, found["expires_in"] > 0) == (True, True)
    assert [entry["entry"] for entry in found["entries"]] == ["often", "nightly"]
    often, nightly = found["entries"]
    assert often["schedule"] == "every 0.5 s"
    assert often["total_run_count"] >= 1
    step = datetime.fromisoformat(often["next_tick"]) - datetime.fromisoformat(often["last_tick"])
    assert step == timedelta(seconds=0.5)
    assert "T04:30:00" in nightly["next_tick"]
    assert (nightly["last_tick"], nightly["late"]) == (None, 0)
    shown = next_(fleet)
    assert f"{found['leader']} leads 'shop' since" in shown
    assert "every 0.5 s" in shown
    beat.close()
    wait_until(lambda: overview(fleet)["entries"][0]["late"] > 1, "a tick is late")
    wait_until(lambda: overview(fleet)["leader"] is None, "the leader's lease expires")
    assert "no beat leads 'shop'" in next_(fleet)


def test_next_shows_when_an_entry_is_due(fleet: Fleet) -> None:
    lines = next_(fleet, "nightly", "-n", "3").splitlines()
    assert [line[11:] for line in lines] == ["04:30:00 UTC"] * 3
    found = json.loads(next_(fleet, "often", "-n", "4", "--json"))
    times = [datetime.fromisoformat(moment) for moment in found["next"]]
    assert [later - earlier for earlier, later in pairwise(times)] == [timedelta(seconds=0.5)] * 3


def test_an_unknown_entry_is_refused_with_a_suggestion(fleet: Fleet) -> None:
    result = fleet.command("singleton", "next", "nightl")
    assert result.returncode == 1
    assert result.stderr == ("Error: beat_schedule has no entry 'nightl'; did you mean nightly?\n")
    assert fleet.command("singleton", "next", "often", "-n", "0").returncode == 2
