"""The drills' checker of ticks accepts correct runs and finds each kind of fault."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from celery_singleton_state.beat.entry_state import EntryState
from tests.helpers.beat_ticks import complaints

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
EVERY = timedelta(seconds=2)
TICKS = [NOON + number * EVERY for number in range(5)]


def found(
    executed: list[datetime], runs: int = 5, missed: int = 0, missed_since: int = 0
) -> list[str]:
    state = EntryState(
        "e",
        "t",
        "every 2 s",
        next_tick=TICKS[-1] + (1 + missed_since) * EVERY,
        last_tick=TICKS[-1],
        total_run_count=runs,
        missed_count=missed + missed_since,
    )
    return complaints({"e": state}, {"e": EVERY}, {"e": executed})


def test_correct_runs_have_no_complaint() -> None:
    assert found(TICKS) == []
    assert found(TICKS[::-1]) == []
    assert found([*TICKS[:2], *TICKS[3:]], runs=4, missed=1) == []
    # The leader sent a tick and died before it recorded it; the next leader skipped the tick.
    assert found(TICKS, runs=4, missed=1) == []
    # Ticks were skipped after the last tick that was sent.
    assert found(TICKS, missed_since=3) == []
    # The message was in flight when the last beat was stopped, so it was not recorded.
    assert found([*TICKS, TICKS[-1] + EVERY]) == []


@pytest.mark.parametrize(
    ("executed", "runs", "missed", "text"),
    [
        ([*TICKS, TICKS[2]], 5, 0, "was run 2 times"),
        ([*TICKS[:2], *TICKS[3:]], 5, 0, "1 ticks were not run, and 0 missed"),
        (TICKS[:-1], 5, 0, "the last one run is"),
        ([*TICKS[:2], TICKS[2] + EVERY / 2, *TICKS[3:]], 5, 0, "was never due"),
        (TICKS, 6, 0, "5 ticks were due, and 6 counted"),
        (TICKS, 5, 1, "5 ticks were due, and 6 counted"),
        ([], 0, 0, "no tick was run"),
        ([*TICKS, *[TICKS[-1] + EVERY] * 2], 5, 0, "2 ticks were run that nobody recorded"),
    ],
)
def test_a_planted_fault_is_found(
    executed: list[datetime], runs: int, missed: int, text: str
) -> None:
    assert any(text in what for what in found(executed, runs, missed))
