"""Leases of prefork children that keep the GIL or are stopped, or whose parent is stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from celery import Celery

from celery_singleton_state import HeartbeatFailed
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Row
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until
from tests.helpers.worker_rows import steal

INTERVAL = 0.5
#: The life of a lease, in seconds. It is two heartbeat intervals by default.
LIFE = 2 * INTERVAL
#: For how many lives a test waits: so many that a lease without renewals would have expired.
LIVES = 3

pytestmark = pytest.mark.fleet(
    store="postgresql", CELERY_SINGLETON_HEARTBEAT_INTERVAL=str(INTERVAL)
)


def row_of(app: Celery, name: str) -> Row:
    row = runtime_of(app).store.peek(f"singleton-state:{name}")
    assert row is not None
    return row


def wait_for_lives(app: Celery, name: str) -> None:
    """Wait for ``LIVES`` lives, by the store's clock, and check that the lease is held all the
    time.
    """
    start = row_of(app, name).read_at

    def long_held() -> bool:
        row = row_of(app, name)
        assert row.held
        return row.read_at > start + LIVES * LIFE

    wait_until(long_held, "the lease is held for some lives")


@pytest.mark.parametrize("how", ["regular expression", "C call"])
def test_a_body_that_keeps_the_gil_keeps_its_lease(
    fleet: Fleet, client: Callable[[], Celery], how: str
) -> None:
    """A's body keeps the GIL for more than two lives, so no other thread of its process runs. B
    waits for the lease. A's body ends. B begins after that, and A's state is saved.
    """
    app = client()
    fleet.start("-c", "2")
    first = app.send_task("keeps_the_gil", (how, 2.5 * LIFE))
    fleet.wait_for_notes("enter")
    second = app.send_task("keeps_the_gil", ("", 0.0))
    assert outcome(first) == 1
    assert outcome(second) == 2
    ordered = sorted(fleet.notes("enter") + fleet.notes("leave"), key=lambda note: note["at"])
    assert [(note["event"], note["n"]) for note in ordered] == [
        ("enter", 0),
        ("leave", 0),
        ("enter", 1),
        ("leave", 1),
    ]


def test_a_lost_run_that_keeps_the_gil_is_interrupted(
    fleet: Fleet, client: Callable[[], Celery], postgres_url: str
) -> None:
    """A body is in a regular expression that takes minutes. The expression lets no other thread of
    the process run, but checks for signals. Another holder takes the lease: the body is
    interrupted.
    """
    app = client()
    fleet.start("-c", "1")
    lost = app.send_task("keeps_the_gil", ("regular expression", 300.0))
    kept = wait_until(
        lambda: [note for note in fleet.notes("kept") if note["seconds"] > 3],
        "the next search takes 6 s",
    )
    steal(postgres_url, "keeps_the_gil")
    error = outcome(lost)
    assert isinstance(error, HeartbeatFailed)
    assert "its renewal was refused" in error.detail
    assert fleet.notes("kept")[-1] == kept[-1]


def test_the_parent_of_a_busy_child_is_stopped(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """The worker's parent process is stopped. Its child goes on, renews the lease by itself, and
    saves.
    """
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-c", "1")
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    os.kill(worker.process.pid, signal.SIGSTOP)
    wait_for_lives(app, "increment")
    go.touch()
    wait_until(lambda: row_of(app, "increment").last_outcome == "succeeded", "the run is saved")
    os.kill(worker.process.pid, signal.SIGCONT)
    assert outcome(result) == 1


def test_a_stopped_child_is_renewed_until_a_time_limit_ends_it(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A child is stopped, as by a debugger. The child is not dead and can go on at any time, so its
    parent renews its lease, until the hard time limit kills the child.
    """
    app = client()
    fleet.start("-c", "1")
    app.send_task("increment", (str(tmp_path / "never"),), time_limit=LIVES * LIFE + 3)
    (child,) = fleet.wait_for_notes("enter")
    os.kill(child["pid"], signal.SIGSTOP)
    wait_for_lives(app, "increment")
    wait_until(
        lambda: row_of(app, "increment").last_outcome == "lost", "the time limit ends the run"
    )
    assert not row_of(app, "increment").held
    # The parent reaps the child a little after the child's death.
    wait_until(lambda: not psutil.pid_exists(child["pid"]), "the child is reaped")
