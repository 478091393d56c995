"""The storm's checker accepts a correct log and finds each single fault."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from tests.storm.checker import Log, check


def good() -> dict[str, Any]:
    """Return the log of two correct runs of one singleton: the first in the storm, the second after
    it.
    """
    jobs = [("a-1", 1, 0.0, "1/x"), ("a-2", 2, 10.0, "2/y")]
    notes: dict[str, list[dict[str, Any]]] = {"calm": [{"at": 5.0}], "failed": []}
    for number, (job, fence, at, run) in enumerate(jobs):
        common = {"singleton": "a", "job": job, "run": run, "fence": fence, "lines": number}
        for event, when in {
            "sends": 0,
            "sent": 1,
            "begins": 2,
            "enter": 3,
            "succeeded": 8,
        }.items():
            notes.setdefault(event, []).append({"event": event, "at": at + when / 10, **common})
        notes.setdefault("trusts", []).extend(common | {"at": at + part} for part in (0.4, 0.7))
    return {
        "notes": notes,
        "trails": {
            "a": [
                {"job": job, "fence": fence, "position": number}
                for number, (job, fence, _, _) in enumerate(jobs, 1)
            ]
        },
        "effects": [("a", number, job, fence) for number, (job, fence, _, _) in enumerate(jobs, 1)],
    }


def test_a_correct_storm_has_no_finding() -> None:
    found = check(Log(**good()))
    assert found.wrong == {}
    assert (found.runs, found.lost_by_broker) == (2, 0)


def overlaps(log: dict[str, Any]) -> None:
    log["notes"]["trusts"][1]["at"] = 10.5


def loses_an_update(log: dict[str, Any]) -> None:
    del log["trails"]["a"][0]


def loses_a_message(log: dict[str, Any]) -> None:
    del log["notes"]["succeeded"][1]
    del log["trails"]["a"][1]


def doubles_a_job(log: dict[str, Any]) -> None:
    log["trails"]["a"].append({"job": "a-1", "fence": 3, "position": 3})


def doubles_an_event(log: dict[str, Any]) -> None:
    log["effects"].append(("a", 2, "a-1", 2))


def leaves_out_an_event(log: dict[str, Any]) -> None:
    del log["effects"][0]


def gives_a_fence_twice(log: dict[str, Any]) -> None:
    log["notes"]["enter"][1]["fence"] = 1


def lets_a_fence_fall(log: dict[str, Any]) -> None:
    log["effects"][1] = ("a", 2, "a-2", 1)


def starts_from_an_older_state(log: dict[str, Any]) -> None:
    log["notes"]["enter"][1]["lines"] = 0


def fails(log: dict[str, Any]) -> None:
    log["notes"]["failed"].append({"job": "a-1", "error": "LookupError: made by the test"})


def stands_still(log: dict[str, Any]) -> None:
    log["notes"]["enter"][1]["at"] = 4.0


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        (overlaps, "overlaps"),
        (loses_an_update, "lost_updates"),
        (loses_a_message, "lost_messages"),
        (doubles_a_job, "doubled_effects"),
        (doubles_an_event, "doubled_effects"),
        (leaves_out_an_event, "doubled_effects"),
        (gives_a_fence_twice, "fences"),
        (lets_a_fence_fall, "fences"),
        (starts_from_an_older_state, "lost_updates"),
        (fails, "failures"),
        (stands_still, "standing_still"),
    ],
)
def test_each_fault_is_found(fault: Any, finding: str) -> None:
    log = deepcopy(good())
    fault(log)
    assert finding in check(Log(**log)).wrong


def test_a_message_that_no_worker_began_was_lost_by_the_broker() -> None:
    log = good()
    loses_a_message(log)
    del log["notes"]["begins"][1]
    found = check(Log(**log))
    assert found.lost_by_broker == 1
    assert "lost_messages" not in found.wrong
