"""Messages that the broker gives out a second time, to real workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import celery
import pytest
from celery import Celery
from celery.exceptions import WorkerLostError

from celery_singleton_state.history import decode
from celery_singleton_state.runtime import runtime_of
from tests.processes.fleet import Fleet, outcome
from tests.waiting import wait_until

#: Seconds after which the broker takes a message that is not acknowledged for lost.
VISIBILITY_TIMEOUT = 1.0


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet], tmp_path: Path) -> Fleet:
    return make_fleet(
        f"sqlite:///{tmp_path}/store.db",
        CELERY_SINGLETON_HEARTBEAT_INTERVAL="60",
        TEST_VISIBILITY_TIMEOUT=VISIBILITY_TIMEOUT,
        TEST_WORKER_LOST_WAIT="0.1",
    )


def test_a_body_longer_than_the_visibility_timeout_runs_once(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """celery #5935. The second copy of the message is put back while the run goes on, and ends
    as a duplicate when it has saved.
    """
    app = client()
    go = tmp_path / "go"
    first = fleet.start("-c", "1", name="a")
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    visible_from = time.monotonic() + VISIBILITY_TIMEOUT
    wait_until(lambda: time.monotonic() > visible_from, "the broker takes the message for lost")
    second = fleet.start("-c", "1", name="b")
    fleet.wait_for_output(second, "its message is put back")
    go.touch()
    assert outcome(result) == 1
    outputs = [first, second]
    wait_until(
        lambda: any(f"task {result.id} was done before" in each.output for each in outputs),
        "the second copy ends as a duplicate",
    )
    assert len(fleet.notes("enter")) == 1


def test_the_same_message_published_twice_runs_once(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    app = client()
    fleet.start("-c", "2")
    go = tmp_path / "go"
    results = [app.send_task("increment", (str(go),), task_id="the-same") for _ in range(2)]
    fleet.wait_for_notes("enter")
    go.touch()
    assert [outcome(result) for result in results] == [1, 1]
    store = runtime_of(app).store

    def ended() -> bool:
        row = store.peek("singleton-state:increment")
        return row is not None and row.holder is None

    wait_until(ended, "the run is over")
    assert len(fleet.notes("enter")) == 1


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="Celery bounds this from 5.7 on")
def test_a_message_whose_runs_die_comes_again_and_not_for_ever(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """Each run ends its process; Celery sends the message again as often as it may."""
    app = client()
    fleet.start("-c", "1")
    result = app.send_task("dies_twice")
    error = outcome(result)
    assert isinstance(error, WorkerLostError)
    assert [note["fence"] for note in fleet.notes("enter")] == [1, 2]
    row = runtime_of(app).store.peek("singleton-state:dies_twice")
    assert row is not None
    assert [entry.outcome for entry in decode(row.history, row.key)] == ["lost", "lost"]
