"""Promise P2: a worker that was paused for longer than its lease's life cannot write."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from celery import Celery

from celery_singleton_state import HeartbeatFailed
from celery_singleton_state.runtime import runtime_of
from tests.helpers.fences import are_growing
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until


def test_a_stale_save_is_refused(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    shared_store_url: str,
    tmp_path: Path,
) -> None:
    """A is in its body. A is paused with SIGSTOP. A's lease expires. B runs and saves. A is
    resumed, and ends its body.

    A's state is computed from the state before B's run. A's save is refused, B's state stays, and
    A's task ends as ``HeartbeatFailed``.
    """
    fleet = make_fleet(shared_store_url, CELERY_SINGLETON_HEARTBEAT_INTERVAL="0.5")
    app = client()
    go = tmp_path / "go"
    paused = fleet.start("-P", "prefork", "-c", "1", "-Q", "a", name="a")
    stale = app.send_task("increment", (str(go),), queue="a")
    fleet.wait_for_notes("enter")
    paused.signal_all(signal.SIGSTOP)

    store = runtime_of(app).store

    def has_expired() -> bool:
        row = store.peek("singleton-state:increment")
        return row is not None and row.holder is not None and not row.held

    wait_until(has_expired, "the stopped worker's lease expires")
    fleet.start("-P", "solo", "-Q", "b", name="b")
    assert outcome(app.send_task("increment", queue="b")) == 1
    after_b = store.peek("singleton-state:increment")

    go.touch()
    paused.signal_all(signal.SIGCONT)
    error = outcome(stale)
    assert isinstance(error, HeartbeatFailed)
    assert error.singleton == "increment"
    assert store.peek("singleton-state:increment") == after_b
    assert are_growing((note["fence"] for note in fleet.notes("enter")), 2)


def test_a_long_body_keeps_its_lease(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    shared_store_url: str,
    tmp_path: Path,
) -> None:
    """A body runs for longer than its lease's life. The lease is renewed, and is never free
    meanwhile.
    """
    fleet = make_fleet(shared_store_url, CELERY_SINGLETON_HEARTBEAT_INTERVAL="1")
    app = client()
    go = tmp_path / "go"
    fleet.start("-P", "prefork", "-c", "1")
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    store = runtime_of(app).store
    remaining = [0.0]
    renewals = 0

    def renewed_thrice() -> bool:
        nonlocal renewals
        row = store.peek("singleton-state:increment")
        assert row is not None
        assert row.held
        remaining.append(row.expires_in or 0)
        # The remaining life has grown, so a renewal took effect.
        renewals += remaining[-1] > remaining[-2] + 0.5
        return renewals > 3

    wait_until(renewed_thrice, "the lease is renewed three times")
    go.touch()
    assert outcome(result) == 1
