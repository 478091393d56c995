"""What follows a run: its result and callbacks; and a redelivery if its process dies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import celery
import pytest
from celery import Celery, chain
from celery.exceptions import WorkerLostError

from celery_singleton_state import HeartbeatFailed, singleton_task
from celery_singleton_state.runtime import runtime_of
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until

CELERY_COUNTS = celery.VERSION >= (5, 7)

# A long interval, so that a lease becomes free only by being released, not by expiring.
pytestmark = pytest.mark.fleet(
    CELERY_SINGLETON_HEARTBEAT_INTERVAL="60",
    TEST_WORKER_LOST_WAIT="0.1",
    TEST_VISIBILITY_TIMEOUT="1",
)
EACH_BROKER = pytest.mark.fleet(broker=("valkey", "classic", "topic"))


@dataclass
class Counter:
    n: int = 0


def imports(app: Celery, *args: Any, **options: Any) -> Any:
    return app.signature("imports", args, **options)


@pytest.mark.fleet(CELERY_SINGLETON_HEARTBEAT_INTERVAL="4", TEST_VISIBILITY_TIMEOUT="3600")
@pytest.mark.parametrize("backend", [True, False], ids=["backend", "no backend"])
def test_a_chain_goes_on_with_the_result_of_a_run_whose_process_died_before_it_was_recorded(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
    backend: bool,
) -> None:
    """The run saves. Its child process is killed before Celery sends the chain's next message. The
    message is redelivered, and recognised as done: the chain goes on with the result of the run.
    """
    fleet = make_fleet()
    if not backend:
        del fleet.environment["CELERY_RESULT_BACKEND"]
    app = client()
    fleet.start("-c", "1")
    chain(imports(app, "die", str(tmp_path / "died")), app.signature("reports")).apply_async()
    (report,) = fleet.wait_for_notes("reports")
    assert report["result"] == "imported 1"
    assert len(fleet.notes("imports")) == 1


@EACH_BROKER
def test_on_each_broker_a_killed_process_costs_no_result(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    app = client()
    fleet.start("-c", "1")
    assert outcome(imports(app, "die", str(tmp_path / "died")).apply_async()) == "imported 1"


def test_a_result_that_was_too_large_to_keep_is_none_and_a_warning(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    app = client()
    worker = fleet.start("-c", "1")
    assert outcome(imports(app, "die", str(tmp_path / "died"), 2000).apply_async()) is None
    fleet.wait_for_output(worker, "it ends with None")


@EACH_BROKER
def test_a_copy_that_comes_just_as_a_run_ends_sends_no_second_callback(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """The run saves. A copy of its message arrives, and the run is already done. Only then does
    Celery send the callback and record the result of the first delivery.
    """
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-c", "2")
    message = imports(app, "wait", str(go), task_id="the-same", link=app.signature("reports"))
    result = message.apply_async()
    fleet.wait_for_notes("saved")
    message.apply_async()
    fleet.wait_for_output(worker, "its result is not recorded yet")
    go.touch()
    assert outcome(result) == "imported 1"
    fleet.wait_for_output(worker, "task the-same was done before")
    assert [note["result"] for note in fleet.wait_for_notes("reports")] == ["imported 1"]
    assert len(fleet.notes("imports")) == 1


@EACH_BROKER
def test_copies_of_short_runs_send_each_callback_once(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """Each message is sent twice. The second copy arrives before, during or after the end of the
    run.
    """
    app = client()
    fleet.start("-c", "4")
    for number in range(40):
        message = app.signature("keyed", (number,), task_id=f"m{number}")
        message.set(link=app.signature("reports"))
        for _ in range(2):
            message.apply_async()
    fleet.wait_for_notes("reports", 40)
    last = app.send_task("reports", ("last",))
    assert outcome(last) == "last"
    reported = sorted(note["result"] for note in fleet.notes("reports") if note["result"] != "last")
    assert reported == list(range(1, 41))


def unreachable(task_id: str) -> None:
    raise ConnectionError("no way to the result backend")


@EACH_BROKER
@pytest.mark.parametrize("backend", [True, False], ids=["backend", "no backend"])
def test_an_id_that_was_used_before_runs_each_day(
    fleet: Fleet, client: Callable[[], Celery], backend: bool
) -> None:
    """Each day's message has the id of the previous day's message, whose result is still in the
    backend.

    A sender without a result backend cannot delete this result, so the worker deletes it before the
    run.
    """
    app = client()
    fleet.start("-c", "1")

    def body(self: Any, until: str = "") -> None:
        """Do nothing: only the name and the options of this task are used. The worker runs another
        body.
        """

    sender = client()
    if not backend:
        sender.backend.forget = unreachable
    task = singleton_task(sender, state_schema=Counter, name="increment", shared=False)(body)
    for day in range(1, 4):
        task.apply_async(task_id="nightly-import")
        fleet.wait_for_notes("leave", day)
        stored = app.AsyncResult("nightly-import")
        wait_until(lambda: stored.result == day, f"the result of day {day} is stored")  # noqa: B023


def test_a_new_message_with_the_id_of_a_run_that_goes_on_runs_after_it(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A second message with the id of a running message runs after that message, even if that
    message is retried meanwhile: a retry is the same message, not a second one.
    """
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-c", "2")
    made: dict[str, Any] = {"state_schema": Counter, "shared": False}

    def body(self: Any, *_: Any) -> None:
        """Do nothing: only the name and the options of this task are used. The worker runs another
        body.
        """

    increment = singleton_task(app, name="increment", **made)(body)
    increment.apply_async((str(go),), task_id="nightly-import")
    fleet.wait_for_notes("enter")
    increment.apply_async(task_id="nightly-import")
    fleet.wait_for_output(worker, "its message is requeued")
    go.touch()
    fleet.wait_for_notes("leave", 2)
    twice = singleton_task(app, name="retry_twice", **made)(body)
    store = runtime_of(app).store
    for day in (1, 2):
        twice.apply_async(task_id="nightly-report")
        fleet.wait_for_notes("attempt", 3 * day)

        # Check the state, not the result: after the retry's success, Celery can still store that a
        # retry was asked for.
        def is_saved(expected: str = f'{{"n":{day}}}') -> bool:
            row = store.peek("singleton-state:retry_twice")
            return row is not None and not row.held and row.value == expected

        wait_until(is_saved, f"day {day} is saved")
    assert len(fleet.notes("attempt")) == 6


def test_a_message_of_another_client_with_an_id_used_before_is_a_loud_duplicate(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    app = client()
    worker = fleet.start("-c", "1")
    assert outcome(app.send_task("increment", task_id="nightly-import")) == 1
    for _ in range(2):
        app.send_task("increment", task_id="nightly-import")
    assert outcome(app.send_task("increment")) == 2
    fleet.wait_for_output(worker, "its body has NOT run")
    assert worker.output.count("its body has NOT run") == 1


@EACH_BROKER
def test_the_message_of_a_killed_child_runs_again(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    app = client()
    fleet.start("-c", "1")
    assert outcome(app.send_task("dies_until", (2,))) == 3
    assert len(fleet.notes("enter")) == 3


@EACH_BROKER
def test_a_task_that_always_kills_its_process_ends(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A task kills its process in every run. After ``max_retries`` the task is not run again."""
    app = client()
    fleet.start("-c", "1")
    error = outcome(app.send_task("dies_until", (100,)))
    assert isinstance(error, WorkerLostError if CELERY_COUNTS else HeartbeatFailed)
    assert len(fleet.notes("enter")) == 3
    assert outcome(app.send_task("increment")) == 1
    row = runtime_of(app).store.peek("singleton-state:dies_until")
    assert row is not None
    assert row.holder is None


@pytest.mark.fleet(broker="classic")
def test_a_run_that_comes_close_to_the_consumer_timeout_of_rabbitmq_is_a_warning(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
) -> None:
    fleet = make_fleet(CELERY_SINGLETON_CONSUMER_TIMEOUT="3")
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-c", "1")
    assert "closes the channel of a worker that takes longer than 3 s" in worker.output
    result = app.send_task("increment", (str(go),))
    warning = f"the message of task increment[{result.id}] has not been acknowledged"
    fleet.wait_for_output(worker, warning)
    go.touch()
    assert outcome(result) == 1
