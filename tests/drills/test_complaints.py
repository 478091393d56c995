"""What users of other packages complain of, each by the number of its issue, and true here never.

Leases live for two minutes here, so that none becomes free by running out. What is said of beat
belongs to the tests of beat.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery import Celery, chain

from celery_singleton_state import LeaderHandoffFailed
from celery_singleton_state.history import decode
from celery_singleton_state.runtime import runtime_of
from tests.processes.fleet import Fleet, outcome
from tests.waiting import wait_until

HOUR = 3600


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet], tmp_path: Path) -> Fleet:
    return make_fleet(
        f"sqlite:///{tmp_path}/store.db",
        CELERY_SINGLETON_HEARTBEAT_INTERVAL="60",
        TEST_VISIBILITY_TIMEOUT="1",
    )


def outcomes(app: Celery, name: str) -> list[str]:
    """How the runs of a singleton ended, in order."""
    row = runtime_of(app).store.peek(f"singleton-state:{name}")
    return [entry.outcome for entry in decode(row.history, row.key)] if row else []


# -- celery-singleton


def test_celery_singleton_40_a_hard_time_limit_leaves_no_lock(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A run that a hard time limit ends keeps nobody out."""
    app = client()
    fleet.start("-c", "1", "--time-limit", "1")
    app.send_task("dies", ("sleep",))
    fleet.wait_for_notes("enter")
    app.send_task("dies", ("os._exit",))
    assert len(fleet.wait_for_notes("enter", 2)) == 2


def test_celery_singleton_20_a_retry_is_sent_and_runs(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """``raise self.retry()`` does not meet the lock of the run that it is in."""
    app = client()
    fleet.start("-c", "2")
    app.send_task("retry_twice")
    wait_until(lambda: "succeeded" in outcomes(app, "retry_twice"), "the last retry has run")
    assert outcomes(app, "retry_twice") == ["retried", "retried", "succeeded"]
    assert [note["retries"] for note in fleet.notes("attempt")] == [0, 1, 2]


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_celery_singleton_55_an_error_does_not_kill_the_worker(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], tmp_path: Path, serializer: str
) -> None:
    """An error of ours is rebuilt wherever it is read, and the worker goes on."""
    fleet = make_fleet(f"sqlite:///{tmp_path}/store.db", TEST_SERIALIZER=serializer)
    app = client()
    worker = fleet.start("-c", "1")
    error = outcome(app.send_task("raises", ("LeaderHandoffFailed",)))
    assert isinstance(error, LeaderHandoffFailed)
    assert error.singleton == "elsewhere"
    assert outcome(app.send_task("increment")) == 1
    assert worker.process.poll() is None


def test_celery_singleton_38_what_beats_send_is_guarded(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], tmp_path: Path
) -> None:
    """Two beats send the same task, faster than it runs, to two workers: no two runs overlap."""
    fleet = make_fleet(f"sqlite:///{tmp_path}/store.db", TEST_BEAT="1")
    client()
    for name in "ab":
        fleet.start("-c", "2", name=name)
    with beat(fleet, "one"), beat(fleet, "two"):
        fleet.wait_for_notes("leave", 8)
    notes = sorted(fleet.notes("enter") + fleet.notes("leave"), key=lambda note: note["at"])
    assert [note["event"] for note in notes[:16]] == ["enter", "leave"] * 8


@contextmanager
def beat(fleet: Fleet, name: str) -> Iterator[None]:
    """A beat with Celery's own scheduler, and a schedule file of its own."""
    command = [sys.executable, "-m", "celery", "-A", "tests.processes.tasks", "beat"]
    with (fleet.directory / f"beat-{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "-s", str(fleet.directory / name), "--pidfile="],
            env=fleet.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=fleet.directory,
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_celery_singleton_29_a_revoked_task_keeps_nobody_out(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """One that is revoked before it runs has taken nothing."""
    app = client()
    worker = fleet.start("-c", "1")
    revoked = app.send_task("increment", countdown=HOUR)
    fleet.wait_for_output(worker, f"[{revoked.id}] received")
    app.control.revoke(revoked.id)
    fleet.wait_for_output(worker, "flagged as revoked")
    assert outcome(app.send_task("increment")) == 1


def test_celery_singleton_21_a_dead_worker_leaves_no_lock(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A worker is killed whole in mid-run; the next one of its host runs the next message."""
    app = client()
    killed = fleet.start("-c", "1", "-Q", "a")
    app.send_task("waits", queue="a")
    fleet.wait_for_notes("enter")
    killed.close()
    fleet.start("-c", "1", "-Q", "b")
    app.send_task("waits", queue="b")
    assert [note["fence"] for note in fleet.wait_for_notes("enter", 2)] == [1, 2]


def test_celery_singleton_19_a_duplicate_does_not_drop_its_chain(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """What follows a run that is skipped still runs."""
    app, go = client(), tmp_path / "go"
    fleet.start("-c", "2")
    held = app.send_task("held_and_skipped", (str(go),))
    fleet.wait_for_notes("enter")
    steps = chain(app.signature("held_and_skipped"), app.signature("plain_add", (10,)), app=app)
    assert outcome(steps.apply_async()) == 10
    go.touch()
    assert outcome(held) == "ran"


def test_celery_singleton_53_a_task_may_send_itself(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A run that asks for its next one does not collide with it."""
    app = client()
    fleet.start("-c", "2")
    app.send_task("asks_for_another_and_succeeds")
    wait_until(
        lambda: outcomes(app, "asks_for_another_and_succeeds") == ["succeeded"] * 2,
        "the run and the one that it asked for have succeeded",
    )


def test_celery_singleton_48_no_redis_is_needed(
    make_fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    """Files are the broker, the store and the results, and a redis library there is none."""
    none = tmp_path / "none" / "redis"
    none.mkdir(parents=True)
    (none / "__init__.py").write_text("raise ImportError('there is no redis here')\n")
    (tmp_path / "results").mkdir()
    fleet = make_fleet(
        f"sqlite:///{tmp_path}/store.db",
        CELERY_BROKER_URL="filesystem://",
        CELERY_RESULT_BACKEND=f"file://{tmp_path}/results",
        TEST_BROKER_FOLDER=str(tmp_path),
    )
    fleet.environment["PYTHONPATH"] = f"{none.parent}:{fleet.environment['PYTHONPATH']}"
    fleet.start("-P", "solo")
    for n in (1, 2):
        sent = fleet.command("call", "increment")
        assert sent.returncode == 0, sent.stderr
        assert fleet.wait_for_notes("leave", n)[-1]["n"] == n - 1
    assert "redis" not in fleet.outputs()[0][1]


# -- celery-once


def test_celery_once_147_a_crash_leaves_no_lock(fleet: Fleet, client: Callable[[], Celery]) -> None:
    """A killed process is succeeded by the next run at once, and not after an expiry."""
    app = client()
    fleet.start("-c", "2")
    app.send_task("waits")
    entered = fleet.wait_for_notes("enter")
    os.kill(entered[0]["pid"], signal.SIGKILL)
    app.send_task("waits")
    assert [note["fence"] for note in fleet.wait_for_notes("enter", 2)] == [1, 2]


def test_celery_once_110_a_run_by_hand_is_not_ignored_silently(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """Who sends a task that is running hears of it, by its policy: the worker's log says who holds
    the lease, or the error does; and after a failure nothing is in the way.
    """
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-c", "3")
    running = [app.send_task(name, (str(go),)) for name in ("held_and_skipped", "held")]
    fleet.wait_for_notes("enter", 2)
    assert outcome(app.send_task("held_and_skipped")) is None
    assert "skipped: held by w0@" in worker.output
    error = outcome(app.send_task("held", (str(go),)))
    assert isinstance(error, LeaderHandoffFailed)
    assert running[1].id in str(error)
    go.touch()
    assert [outcome(each) for each in running] == ["ran", "held"]
    assert isinstance(outcome(app.send_task("fail_after_checkpoint")), LookupError)
    assert isinstance(outcome(app.send_task("fail_after_checkpoint")), LookupError)
    assert outcomes(app, "fail_after_checkpoint") == ["failed", "failed"]


def test_celery_once_136_send_task_is_guarded(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A task that is sent by its name meets the lease like any other."""
    app, go = client(), tmp_path / "go"
    assert "held_and_skipped" not in app.tasks
    fleet.start("-c", "2")
    first = app.send_task("held_and_skipped", (str(go),))
    fleet.wait_for_notes("enter")
    assert outcome(app.send_task("held_and_skipped")) is None
    go.touch()
    assert outcome(first) == "ran"
    assert len(fleet.notes("enter")) == 1


def test_celery_once_104_a_lock_can_be_kept_for_a_while(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """``hold_at_least``: what comes soon after a run is kept out, and what comes later is not."""
    app = client()
    fleet.start("-c", "1")
    assert outcome(app.send_task("held_on", ("first", ""))) == "first"
    assert outcome(app.send_task("held_on", ("second", ""))) is None
    store = runtime_of(app).store

    def free() -> bool:
        row = store.peek("singleton-state:held_on")
        return row is not None and not row.held

    wait_until(free, "the lease is free")
    assert outcome(app.send_task("held_on", ("third", ""))) == "third"


# -- celery


def test_celery_5935_a_body_longer_than_the_visibility_timeout_runs_once(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """Redis gives a message out again whose run still goes on.

    The second copy is put back while it does, and ends as a duplicate when it has saved.
    """
    app, go = client(), tmp_path / "go"
    first = fleet.start("-c", "2", name="a")
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    # A worker looks for messages that were taken for too long when it starts, and then rarely.
    wait_until(lambda: is_overdue(app), "the broker takes the message for lost")
    second = fleet.start("-c", "2", name="b")
    fleet.wait_for_output(second, "its message is put back")
    go.touch()
    assert outcome(result) == 1
    wait_until(
        lambda: any(f"{result.id} was done before" in each.output for each in (first, second)),
        "the second copy ends as a duplicate",
    )
    assert len(fleet.notes("enter")) == 1


def is_overdue(app: Celery) -> bool:
    """Whether a message was taken longer ago than the visibility timeout."""
    with app.connection_for_read() as connection:
        client = connection.default_channel.client
        ((_, taken),) = client.zrange("unacked_index", 0, -1, withscores=True)
        now, _ = client.time()
    return bool(now > taken + 1)
