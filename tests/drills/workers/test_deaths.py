"""Processes that die in mid-run, in several ways.

The kernel reports each death, so the lease is free at once.

Leases live for two minutes here, so that no lease becomes free by expiring.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import celery
import psutil
import pytest
from celery import Celery

from celery_singleton_state.history import decode
from celery_singleton_state.store.base import Row
from tests.helpers.fences import are_growing
from tests.helpers.fleet import Fleet, Worker, outcome
from tests.helpers.waiting import wait_until
from tests.helpers.worker_rows import row_of, wait_until_free

pytestmark = pytest.mark.fleet(CELERY_SINGLETON_HEARTBEAT_INTERVAL="60")


def outcomes(row: Row) -> list[str]:
    return [entry.outcome for entry in decode(row.history, row.key)]


def expiry(row: Row) -> float:
    """Return the time at which the row's lease expires, by the store's clock."""
    assert row.expires_in is not None
    return row.read_at + row.expires_in


def messages_kept(app: Celery) -> int:
    """Return how many messages the broker has, queued or not acknowledged."""
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        queued, given_out = app.conf.task_default_queue, channel.unacked_key
        return int(channel.client.llen(queued) + channel.client.hlen(given_out))


def kill_child(app: Celery, fleet: Fleet, task_id: str) -> None:
    os.kill(fleet.notes("enter")[-1]["pid"], signal.SIGKILL)


def terminate(app: Celery, fleet: Fleet, task_id: str) -> None:
    app.control.revoke(task_id, terminate=True, signal="SIGKILL")


def nothing(app: Celery, fleet: Fleet, task_id: str) -> None:
    """Do nothing, because the body or a time limit ends the process."""


@pytest.mark.parametrize(
    ("how", "kill", "options"),
    [
        ("killed", kill_child, ()),
        ("hard time limit", nothing, ("--time-limit", "1")),
        ("revoked", terminate, ()),
        ("os._exit", nothing, ()),
    ],
)
def test_a_child_that_dies_leaves_no_lease(
    make_fleet: Callable[..., Fleet],
    shared_store_url: str,
    client: Callable[[], Celery],
    how: str,
    kill: Callable[[Celery, Fleet, str], None],
    options: tuple[str, ...],
) -> None:
    """A child dies in mid-run: its lease is free at once, and no state is saved.

    The next message runs in the other child or in the dead child's successor. Users know the fault
    from celery-singleton #40 (a hard time limit leaves the lock), #21 (a dead worker leaves the
    lock) and #29.
    """
    fleet = make_fleet(shared_store_url)
    app = client()
    fleet.start("-c", "2", *options)
    sent = app.send_task("dies", (how,))
    fleet.wait_for_notes("enter")
    kill(app, fleet, sent.id)
    row = wait_until_free(app, "dies")
    # At a hard time limit Celery first asks the child to exit, so the child may release the lease
    # itself.
    expected = {"lost", "failed"} if how == "hard time limit" else {"lost"}
    assert outcomes(row)[0] in expected
    assert row.value == "null"
    assert outcome(app.send_task("increment")) == 1


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("MemoryError", ()),
        ("SystemExit", ()),
        ("soft time limit", ("--soft-time-limit", "1")),
    ],
)
def test_a_body_that_fails_releases_its_lease_itself(
    fleet: Fleet, client: Callable[[], Celery], how: str, options: tuple[str, ...]
) -> None:
    app = client()
    fleet.start("-c", "1", *options)
    app.send_task("dies", (how,))
    fleet.wait_for_notes("enter")
    row = wait_until_free(app, "dies")
    assert row.last_outcome == "failed"


def is_dead(pid: int) -> bool:
    """Return whether a process is dead, even if its parent has not reaped it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_the_next_delivery_takes_over_from_a_worker_killed_with_its_children(
    fleet: Fleet, client: Callable[[], Celery], pool: str
) -> None:
    """A worker and all its processes are killed. Another worker of this host finds the lease taken
    and its holder dead, and takes over.
    """
    app = client()
    killed = fleet.start("-P", pool, "-c", "1", "-Q", "a", name="a")
    fleet.start("-P", "solo", "-Q", "b", name="b")
    app.send_task("waits", queue="a")
    (note,) = fleet.wait_for_notes("enter")
    killed.close()
    # Wait, because a delivery that arrives while the worker's child is still dying is skipped.
    wait_until(lambda: is_dead(note["pid"]), "the child is dead, too")
    app.send_task("waits", queue="b")
    entered = fleet.wait_for_notes("enter", 2)
    assert are_growing((note["fence"] for note in entered), 2)
    assert outcomes(row_of(app, "waits")) == ["lost"]


def test_a_worker_frees_the_leases_of_its_dead_predecessor(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """When a worker starts, it frees the leases of its dead predecessor. It does not free the
    leases of a living worker.
    """
    app = client()
    killed = fleet.start("-c", "1", "-Q", "a", name="a")
    fleet.start("-c", "1", "-Q", "b", name="b")
    app.send_task("waits", queue="a")
    app.send_task("dies", ("living",), queue="b")
    fleet.wait_for_notes("enter", 2)
    killed.close()
    assert row_of(app, "waits").held
    fleet.start("-c", "1", "-Q", "c", name="a")
    wait_until_free(app, "waits")
    assert row_of(app, "dies").held


def stop_warmly(worker: Worker) -> None:
    worker.process.send_signal(signal.SIGTERM)


def stop_at_once(worker: Worker) -> None:
    worker.process.send_signal(signal.SIGQUIT)


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_cold_shutdown_leaves_no_lease(
    fleet: Fleet, client: Callable[[], Celery], pool: str
) -> None:
    app = client()
    worker = fleet.start("-P", pool, "-c", "1")
    app.send_task("waits")
    fleet.wait_for_notes("enter")
    stop_at_once(worker)
    wait_until_free(app, "waits")
    worker.process.wait(30)


in_solo = pytest.param(
    "solo",
    marks=pytest.mark.skipif(celery.VERSION < (5, 7), reason="a solo worker does not end by it"),
)


@pytest.mark.fleet(TEST_VISIBILITY_TIMEOUT="1")
@pytest.mark.parametrize("pool", ["prefork", "gevent", in_solo])
def test_a_cold_shutdown_leaves_the_message_to_another_worker(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
    pool: str,
) -> None:
    """A cold shutdown ends a body; its message is redelivered to another worker.

    Celery reports a killed greenlet as a success. A solo pool cannot kill its body, so Celery
    raises an error in it, and reports a failure. In neither case may the message be acknowledged.
    """
    fleet = make_fleet()
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-P", pool, "-c", "1")
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    stop_at_once(worker)
    worker.process.wait(30)
    fleet.start("-c", "1")
    fleet.wait_for_notes("enter", 2)
    go.touch()
    assert outcome(result) == 1


@pytest.mark.parametrize(
    "soft",
    [
        "0",
        pytest.param("0.5", marks=pytest.mark.skipif(celery.VERSION < (5, 5), reason="new in 5.5")),
    ],
)
def test_a_cold_shutdown_of_threads_lets_the_run_end(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], tmp_path: Path, soft: str
) -> None:
    """A cold shutdown cannot end a thread: Celery's shutdown raises an error, and Python waits for
    the thread.

    The lease is renewed until the run has ended. The message is acknowledged only after that.
    """
    fleet = make_fleet(
        CELERY_SINGLETON_HEARTBEAT_INTERVAL="1",
        CELERY_SINGLETON_HEARTBEAT_THRESHOLD="5",
        TEST_SOFT_SHUTDOWN=soft,
    )
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-P", "threads", "-c", "1")
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    stop_at_once(worker)
    fleet.wait_for_output(worker, "Cold shutdown" if celery.VERSION < (5, 5) else "Unrecoverable")
    before = expiry(row_of(app, "increment"))
    wait_until(lambda: expiry(row_of(app, "increment")) > before + 0.5, "the lease is renewed")
    go.touch()
    worker.process.wait(30)
    assert outcome(result) == 1
    assert row_of(app, "increment").holder is None
    assert messages_kept(app) == 0


needs_soft_shutdown = pytest.mark.skipif(celery.VERSION < (5, 5), reason="new in Celery 5.5")


@pytest.mark.fleet(TEST_VISIBILITY_TIMEOUT="1")
@needs_soft_shutdown
@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        pytest.param({}, stop_at_once, id="SIGQUIT"),
        pytest.param({"REMAP_SIGTERM": "SIGQUIT"}, stop_warmly, id="SIGTERM"),
    ],
)
def test_a_soft_shutdown_lets_the_run_end(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
    settings: dict[str, str],
    stop: Callable[[Worker], None],
) -> None:
    fleet = make_fleet(TEST_SOFT_SHUTDOWN="3", **settings)
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-c", "1")
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    stop(worker)
    fleet.wait_for_output(worker, "Initiating Soft Shutdown")
    assert row_of(app, "increment").held
    go.touch()
    worker.process.wait(60)
    assert outcome(result) == 1
    assert row_of(app, "increment").holder is None
    assert messages_kept(app) == 0


@pytest.mark.fleet(TEST_VISIBILITY_TIMEOUT="1")
@needs_soft_shutdown
@pytest.mark.parametrize("pool", [in_solo])
def test_a_soft_shutdown_of_a_solo_worker_interrupts_even_a_body_that_could_end(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
    pool: str,
) -> None:
    """A soft shutdown of a solo worker stops a body that could have ended in time.

    Celery waits in the signal handler, which runs in the body's own thread. So the body cannot go
    on during the wait. The body is interrupted after the wait, and its message is redelivered.
    """
    fleet = make_fleet(TEST_SOFT_SHUTDOWN="2")
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-P", pool)
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    stop_at_once(worker)
    fleet.wait_for_output(worker, "Initiating Soft Shutdown")
    go.touch()
    worker.process.wait(30)
    assert outcomes(wait_until_free(app, "increment")) == ["failed"]
    assert messages_kept(app) == 1
    fleet.start("-c", "1")
    assert outcome(result) == 1
    assert are_growing((note["fence"] for note in fleet.notes("enter")), 2)


@pytest.mark.fleet(TEST_VISIBILITY_TIMEOUT="1")
@needs_soft_shutdown
@pytest.mark.parametrize("pool", ["prefork", in_solo])
def test_a_soft_shutdown_whose_time_runs_out_leaves_the_message_to_another_worker(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
    pool: str,
) -> None:
    fleet = make_fleet(TEST_SOFT_SHUTDOWN="0.5")
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-P", pool, "-c", "1")
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    stop_at_once(worker)
    worker.process.wait(30)
    wait_until_free(app, "increment")
    fleet.start("-c", "1")
    fleet.wait_for_notes("enter", 2)
    go.touch()
    assert outcome(result) == 1


def test_a_warm_shutdown_lets_the_run_end(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    app = client()
    worker = fleet.start("-c", "1")
    result = app.send_task("increment", (str(tmp_path / "go"),))
    fleet.wait_for_notes("enter")
    stop_warmly(worker)
    fleet.wait_for_output(worker, "Warm shutdown")
    assert row_of(app, "increment").held
    (tmp_path / "go").touch()
    assert outcome(result) == 1
    worker.process.wait(30)
    assert row_of(app, "increment").holder is None


def test_a_restarted_pool_is_watched_as_well(fleet: Fleet, client: Callable[[], Celery]) -> None:
    app = client()
    worker = fleet.start("-c", "1")
    before = psutil.Process(worker.process.pid).children()
    app.control.broadcast("pool_restart")
    wait_until(
        lambda: not set(before) & set(psutil.Process(worker.process.pid).children()),
        "all children are new",
    )
    app.send_task("dies", ("killed",))
    entered = fleet.wait_for_notes("enter")
    os.kill(entered[0]["pid"], signal.SIGKILL)
    wait_until_free(app, "dies")
