"""Complaints by users of other packages, each with its issue number. This package must not have
these faults.

Leases live for two minutes here, so that no lease becomes free by expiring. Complaints about beats
that take over from one another are tested in the drills of beat.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain

from celery_singleton_state import (
    LeaderHandoffFailed,
    SingletonError,
    SingletonErrorReason,
    singleton_task,
)
from celery_singleton_state.history import decode
from celery_singleton_state.runtime import runtime_of
from tests.helpers.fences import are_growing
from tests.helpers.fleet import Fleet, Worker, outcome
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.fleet(CELERY_SINGLETON_HEARTBEAT_INTERVAL="60")


def outcomes(app: Celery, name: str) -> list[str]:
    """How the runs of a singleton ended, in order."""
    row = runtime_of(app).store.peek(f"singleton-state:{name}")
    return [entry.outcome for entry in decode(row.history, row.key)] if row else []


def sent_once_of(app: Celery) -> Any:
    """Return the task ``sent_once`` for the sending app. There ``enqueue_once`` decides whether to
    publish.
    """

    def body(self: Any, number: int, until: str = "") -> None:
        """Do nothing: only the name and the options of this task are used. The workers run another
        body.
        """

    options: Any = {"name": "sent_once", "enqueue_once": True, "unique_on": ["number"]}
    return singleton_task(app, shared=False, **options)(body)


def deaf_of(app: Celery) -> Any:
    """Return the task ``deaf`` for the sending app, which publishes it only if no message is queued
    or running.
    """

    def body(self: Any, how: str = "") -> None:
        """Do nothing: only the name and the options of this task are used. The workers run another
        body.
        """

    return singleton_task(app, shared=False, name="deaf", enqueue_once=True)(body)


def sent_after(task: Any, last_id: str, *args: Any) -> Any:
    """Send the task until a new message, not ``last_id``, is published; return the new message's
    result.
    """

    def sent() -> Any:
        result = task.delay(*args)
        return result if result.id != last_id else None

    return wait_until(sent, f"a message after {last_id} is sent")


# -- celery-singleton


def test_celery_singleton_40_a_hard_time_limit_leaves_no_lock(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A run ignores every signal but SIGKILL, and a hard time limit kills it. The next message
    runs.
    """
    app = client()
    worker = fleet.start("-c", "1", "--time-limit", "1")
    app.send_task("deaf", ("for ever",))
    fleet.wait_for_output(worker, "Hard time limit (1.0s) exceeded")
    assert outcome(app.send_task("deaf")) == "ran"
    assert outcomes(app, "deaf") == ["lost", "succeeded"]


def test_celery_singleton_40_a_run_killed_by_a_time_limit_does_not_block_the_next_message(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A hard time limit kills a run. For ``enqueue_once``, the killed run no longer counts as
    running: the next message is published.
    """
    task = deaf_of(client())
    worker = fleet.start("-c", "1", "--time-limit", "1")
    killed = task.delay("for ever")
    fleet.wait_for_output(worker, "Hard time limit (1.0s) exceeded")
    assert outcome(sent_after(task, killed.id)) == "ran"


def test_celery_singleton_20_a_retry_is_sent_and_runs(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """``raise self.retry()`` sends its message although the calling run has the lease."""
    app = client()
    fleet.start("-c", "2")
    app.send_task("retry_twice")
    wait_until(lambda: "succeeded" in outcomes(app, "retry_twice"), "the last retry has run")
    assert outcomes(app, "retry_twice") == ["retried", "retried", "succeeded"]
    assert [note["retries"] for note in fleet.notes("attempt")] == [0, 1, 2]


def test_celery_singleton_20_a_retry_is_not_taken_for_a_second_copy(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """``self.retry()`` publishes its message although the ``enqueue_once`` task is running, because
    the caller itself is the running message.
    """
    app = client()
    fleet.start("-c", "1")
    app.send_task("sent_once_and_retried")
    wait_until(lambda: "succeeded" in outcomes(app, "sent_once_and_retried"), "the retry has run")
    assert outcomes(app, "sent_once_and_retried") == ["retried", "succeeded"]
    assert [note["retries"] for note in fleet.notes("attempt")] == [0, 1]


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_celery_singleton_55_an_error_in_a_retry_does_not_kill_the_worker(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], serializer: str
) -> None:
    """A task with ``autoretry_for`` raises one of our errors: its result is this error, unchanged.

    The error goes from the pool's process to the worker, once for the retry and once for the
    failure, and then to the result backend. Each step rebuilds the error. The pool's process and
    the worker survive this.
    """
    fleet = make_fleet(TEST_SERIALIZER=serializer)
    app = client()
    worker = fleet.start("-c", "1")
    for reason in SingletonErrorReason:
        error = outcome(app.send_task("raises_and_is_retried", (str(reason),)))
        assert type(error) is type(SingletonError.from_reason(reason, "elsewhere"))
        assert (error.singleton, error.detail) == ("elsewhere", "as told")
    attempts = fleet.notes("attempt")
    assert [note["retries"] for note in attempts] == [0, 1] * len(SingletonErrorReason)
    assert len({note["pid"] for note in attempts}) == 1
    assert outcome(app.send_task("increment")) == 1
    assert "Unrecoverable" not in worker.output


def test_celery_singleton_38_messages_of_two_beats_are_guarded(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], tmp_path: Path
) -> None:
    """Two beats send the same task to two workers, and no two runs of it overlap.

    One of the beats knows the schedule but not the task, so it sends the task by name. The first
    run goes on until a message of each beat has found the lease taken and has ended with success.
    """
    go = tmp_path / "go"
    schedule = {"often": {"task": "held_and_skipped", "schedule": 0.2, "args": [str(go)]}}
    fleet = make_fleet(TEST_SCHEDULE=json.dumps(schedule))
    (tmp_path / "without_tasks.py").write_text(
        f"import celery\napp = celery.Celery()\napp.conf.beat_schedule = {schedule!r}\n"
    )
    app = client()
    workers = [fleet.start("-c", "3") for _ in "ab"]
    with beat(fleet, "tests.apps.tasks") as one, beat(fleet, "without_tasks") as two:
        for log in (one, two):
            skipped = wait_until(
                lambda log=log: skipped_of(log, workers), "a message of the beat is skipped"
            )
            assert app.AsyncResult(skipped).state == "SUCCESS"
        assert len(fleet.notes("enter")) == 1
        go.touch()
        fleet.wait_for_notes("leave", 4)
    assert not any("raised" in worker.output for worker in workers)
    notes = sorted(fleet.notes("enter") + fleet.notes("leave"), key=lambda note: note["at"])
    assert [note["event"] for note in notes[:8]] == ["enter", "leave"] * 4


def skipped_of(beat_log: Path, workers: list[Worker]) -> str | None:
    """Return the id of a message of this beat that succeeded without a run, or None."""
    ended = "".join(worker.output for worker in workers)
    for task_id in re.findall(r" sent\. id->(\S+)", beat_log.read_text()):
        if re.search(rf"\[{task_id}\] succeeded in \S+ None", ended):
            return str(task_id)
    return None


@contextmanager
def beat(fleet: Fleet, app: str) -> Iterator[Path]:
    """Run a beat with Celery's own scheduler and a schedule file of its own; yield the path of its
    log.
    """
    command = [sys.executable, "-m", "celery", "-A", app, "beat", "-l", "DEBUG", "--pidfile="]
    path = fleet.directory / f"beat-{app}.log"
    with path.open("ab") as log:
        process = subprocess.Popen(
            [*command, "-s", str(fleet.directory / f"schedule-{app}")],
            env=fleet.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=fleet.directory,
        )
    try:
        yield path
    finally:
        process.kill()
        process.wait()


def test_celery_singleton_29_a_revoked_message_does_not_block_the_next(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A message that is revoked before it runs holds no lease: the next message is published and
    runs.

    The only pool process is busy while the worker receives the revocation of the queued message.
    """
    app, go = client(), tmp_path / "go"
    task = sent_once_of(app)
    worker = fleet.start("-c", "1")
    app.send_task("held", (str(go),))
    fleet.wait_for_notes("enter")
    revoked = task.delay(1)
    assert task.delay(1).id == revoked.id
    app.control.revoke(revoked.id)
    fleet.wait_for_output(worker, "flagged as revoked")
    go.touch()
    wait_until(lambda: revoked.state == "REVOKED", "the revoked message is dropped")
    assert outcome(sent_after(task, revoked.id, 1)) == 1


def test_celery_singleton_29_a_terminated_run_does_not_block_the_next_message(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A run is terminated by ``revoke(terminate=True)``. For ``enqueue_once``, the terminated run
    no longer counts as running: the next message is published.
    """
    app = client()
    task = sent_once_of(app)
    fleet.start("-c", "1")
    revoked = task.delay(1, str(tmp_path / "never"))
    fleet.wait_for_notes("enter")
    assert task.delay(1).id == revoked.id
    app.control.revoke(revoked.id, terminate=True, signal="SIGKILL")
    assert outcome(sent_after(task, revoked.id, 1)) == 1
    wait_until(lambda: revoked.state == "REVOKED", "the message is revoked")


def test_celery_singleton_21_a_dead_worker_leaves_no_lock(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A worker and all its processes are killed in mid-run. The next delivery finds that the
    lease's holder is dead, and takes over.

    The other worker starts before the kill, because a worker frees the leases of dead workers when
    it starts.
    """
    app = client()
    killed = fleet.start("-c", "1", "-Q", "a")
    fleet.start("-c", "1", "-Q", "b")
    app.send_task("waits", queue="a")
    fleet.wait_for_notes("enter")
    killed.close()
    app.send_task("waits", queue="b")
    assert are_growing((note["fence"] for note in fleet.wait_for_notes("enter", 2)), 2)
    assert outcomes(app, "waits") == ["lost"]


def test_celery_singleton_19_a_duplicate_does_not_drop_its_chain(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """Two chains begin with the same task: it runs once, and the second task runs in both chains.

    The second chain is sent while the first chain's run goes on. Its first message is published.
    That delivery is skipped, and yet the rest of the chain runs.
    """
    app, go = client(), tmp_path / "go"
    first, add = sent_once_of(app), app.signature("plain_add")
    fleet.start("-c", "2")
    held = chain(first.si(42, str(go)), add.clone((1,)), app=app).apply_async()
    fleet.wait_for_notes("enter")
    skipped = chain(first.si(42), add.clone((2,)), app=app).apply_async()
    assert outcome(skipped) == 2
    go.touch()
    assert outcome(held) == 43
    assert len(fleet.notes("enter")) == 1


def test_celery_singleton_53_a_task_that_sends_itself_does_not_collide(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A run sends the next message of its own task: this queued message does not keep the run's
    lease taken or raise a conflict.
    """
    app = client()
    fleet.start("-c", "1")
    app.send_task("sends_next_or_raises", (2,))
    wait_until(
        lambda: outcomes(app, "sends_next_or_raises") == ["succeeded"] * 3,
        "the run and the two after it have succeeded",
    )


def test_celery_singleton_53_a_message_that_a_run_sends_itself_waits_for_its_end(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A run sends the next message of its own task. With ``on_conflict="wait"`` that message waits
    for the end of the run.

    The run ends only after another process has received the message and found the lease taken.
    """
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-c", "2")
    app.send_task("sends_next_and_waits", (1, str(go)))
    fleet.wait_for_output(worker, "] ignored")
    assert [note["left"] for note in fleet.notes("enter")] == [1]
    go.touch()
    wait_until(
        lambda: outcomes(app, "sends_next_and_waits") == ["succeeded"] * 2,
        "the run and the one that it sent have succeeded",
    )


def test_celery_singleton_48_no_redis_is_needed(
    make_fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    """Broker, store and results are files, and no process imports a Redis client.

    A fake package ``redis`` leaves a mark when it is imported, and raises ``ImportError``. An
    import by Flower does not count: Celery's command line loads Flower if it is installed.
    """
    asked = tmp_path / "redis was asked for"
    none = tmp_path / "none" / "redis"
    none.mkdir(parents=True)
    (none / "__init__.py").write_text(
        "import traceback\n"
        "if not any('/flower/' in frame.filename for frame in traceback.extract_stack()):\n"
        f"    open({str(asked)!r}, 'w')\n"
        "raise ImportError\n"
    )
    (tmp_path / "results").mkdir()
    fleet = make_fleet(
        CELERY_BROKER_URL="filesystem://",
        CELERY_RESULT_BACKEND=f"file://{tmp_path}/results",
        TEST_BROKER_FOLDER=str(tmp_path),
    )
    fleet.environment["PYTHONPATH"] = f"{none.parent}:{fleet.environment['PYTHONPATH']}"
    fleet.start("-c", "1")
    for n in (1, 2):
        sent = fleet.command("call", "increment")
        assert sent.returncode == 0, sent.stderr
        assert fleet.wait_for_notes("leave", n)
    assert [note["n"] for note in fleet.notes("enter")] == [0, 1]
    assert not asked.exists()


# -- celery-once


def test_celery_once_147_a_crash_leaves_no_lock(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A worker and all its processes are killed in mid-run. After the worker is started again, the
    next message is published and runs.
    """
    task = sent_once_of(client())
    killed = fleet.start("-c", "1", name="again")
    lost = task.delay(147, str(tmp_path / "never"))
    fleet.wait_for_notes("enter")
    killed.close()
    assert task.delay(147).id == lost.id
    fleet.start("-c", "1", name="again")
    following = task.delay(147)
    assert following.id != lost.id
    assert outcome(following) == 147


def test_celery_once_147_a_killed_pool_process_leaves_no_lock(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A process of the pool is killed. Its worker survives and frees the lease."""
    app = client()
    fleet.start("-c", "1")
    app.send_task("waits")
    entered = fleet.wait_for_notes("enter")
    os.kill(entered[0]["pid"], signal.SIGKILL)
    wait_until(lambda: outcomes(app, "waits") == ["lost"], "the lease is free")
    app.send_task("waits")
    assert are_growing((note["fence"] for note in fleet.wait_for_notes("enter", 2)), 2)


def test_celery_once_110_a_run_by_hand_is_not_ignored_silently(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A user who sends a task while it runs can see from the outcome that no second run was
    started.

    With "skip" the result is ``None`` and the worker's log names the lease's holder. With "raise"
    the error names the holder. With ``enqueue_once`` the user gets the result of the run in
    progress.
    """
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-c", "4")
    running = [app.send_task(name, (str(go),)) for name in ("held_and_skipped", "held")]
    once = sent_once_of(app)
    running.append(once.delay(3, str(go)))
    fleet.wait_for_notes("enter", 3)

    skipped = app.send_task("held_and_skipped")
    assert (outcome(skipped), skipped.state) == (None, "SUCCESS")
    said = f"singleton held_and_skipped skipped: held by w0@.* for task {running[0].id}"
    assert re.search(said, worker.output)
    error = outcome(app.send_task("held", (str(go),)))
    assert isinstance(error, LeaderHandoffFailed)
    assert f"for task {running[1].id}" in str(error)
    same = once.delay(3)
    assert same.id == running[2].id
    go.touch()
    assert [outcome(each) for each in (*running, same)] == ["ran", "held", 3, 3]


def test_celery_once_110_a_failed_task_runs_again(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A task that failed can be sent by hand again, and runs."""
    app = client()
    fleet.start("-c", "1")
    for _ in range(2):
        assert isinstance(outcome(app.send_task("fail_after_checkpoint")), LookupError)
    assert outcomes(app, "fail_after_checkpoint") == ["failed", "failed"]


def test_celery_once_136_send_task_is_guarded(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A task is sent by name, from an app that does not know the task. The lease guards it all the
    same.

    Celery's own beat sends tasks by name when it does not import them.
    """
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
    """With ``hold_at_least``, a message within the hold period after a run is skipped, and a later
    message runs.

    One task has a hold period of an hour, so that its second message falls within this period on
    any machine.
    """
    app = client()
    worker = fleet.start("-c", "1")
    assert [outcome(app.send_task("kept")) for _ in range(2)] == [None] * 2
    assert "singleton kept skipped: in the hold period after its last run" in worker.output
    assert len(fleet.notes("enter")) == 1

    assert outcome(app.send_task("skips_with_hold", ("first", ""))) == "first"
    store = runtime_of(app).store

    def free() -> bool:
        row = store.peek("singleton-state:skips_with_hold")
        return row is not None and not row.held

    wait_until(free, "the lease is free")
    assert outcome(app.send_task("skips_with_hold", ("later", ""))) == "later"


# -- celery


def test_celery_5935_a_body_longer_than_the_visibility_timeout_runs_once(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], tmp_path: Path
) -> None:
    """Redis redelivers a message although its run is still in progress.

    The second copy is requeued while the run goes on, and ends as a duplicate after the run has
    saved.
    """
    fleet = make_fleet(TEST_VISIBILITY_TIMEOUT="1")
    app, go = client(), tmp_path / "go"
    workers = [fleet.start("-c", "2", name="a")]
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    # A worker checks for unacknowledged messages when it starts, and then only every ten seconds.
    wait_until(lambda: is_overdue(app), "the message is overdue")
    workers.append(fleet.start("-c", "2", name="b"))

    def say(text: str) -> bool:
        return any(text in worker.output for worker in workers)

    wait_until(lambda: say("its message is requeued"), "the second copy is requeued")
    go.touch()
    assert outcome(result) == 1
    wait_until(lambda: say(f"{result.id} was done before"), "the second copy ends as a duplicate")
    assert len(fleet.notes("enter")) == 1


def is_overdue(app: Celery) -> bool:
    """Return whether a message was delivered longer ago than the visibility timeout of 1 s."""
    with app.connection_for_read() as connection:
        client = connection.default_channel.client
        ((_, taken),) = client.zrange("unacked_index", 0, -1, withscores=True)
        now, _ = client.time()
    return bool(now > taken + 1)


def test_celery_1876_the_last_run_is_known_after_a_crash(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery]
) -> None:
    """A run is recorded when it ends, not minutes later.

    Beat and worker are killed right after the run, before Celery's scheduler has stored the run.
    The next beat and worker do not repeat the run, because its hold period is an hour.
    """
    schedule = {"often": {"task": "kept", "schedule": 0.2}}
    fleet = make_fleet(TEST_SCHEDULE=json.dumps(schedule))
    app = client()
    killed = fleet.start("-c", "1")
    with beat(fleet, "tests.apps.tasks"):
        wait_until(lambda: outcomes(app, "kept"), "the task has run")
    killed.close()
    row = runtime_of(app).store.peek("singleton-state:kept")
    assert row is not None
    assert (row.run_count, row.last_outcome) == (1, "succeeded")
    assert row.last_finished_at is not None
    worker = fleet.start("-c", "1")
    with beat(fleet, "tests.apps.tasks"):
        fleet.wait_for_output(
            worker, "singleton kept skipped: in the hold period after its last run"
        )
    assert len(fleet.notes("enter")) == 1
