"""The ways in which a body can end in a real worker, and the lease and state after each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state import LeaderHandoffFailed
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Row
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until


def free_row(app: Celery, name: str, runs: int) -> Row:
    """Wait until the lease is free after this number of runs, and return the row."""

    def found() -> Row | None:
        row = runtime_of(app).store.peek(f"singleton-state:{name}")
        return row if row is not None and row.holder is None and row.run_count == runs else None

    return wait_until(found, f"{name} is free after {runs} runs")


def test_a_body_that_raises_keeps_only_its_checkpoint(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    app = client()
    fleet.start("-P", "solo")
    error = outcome(app.send_task("fail_after_checkpoint"))
    assert isinstance(error, LookupError)
    row = free_row(app, "fail_after_checkpoint", 1)
    assert (row.value, row.last_outcome) == ('{"n":1}', "failed")


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_retries_are_sent_and_run(fleet: Fleet, client: Callable[[], Celery], pool: str) -> None:
    """In celery-singleton a retry was lost, because its message met its own run's lease (its issue
    20).

    With a countdown of 0, another process can get the retry before the run that sent it has
    released the lease. The retry then waits. It is neither skipped nor lost.

    The test reads the row, not the result. Celery stores RETRY after it has sent the retry, and can
    overwrite the SUCCESS of a quick retry. This happens with plain tasks, too.
    """
    app = client()
    fleet.start("-P", pool, "-c", "2")
    app.send_task("retry_twice")
    row = free_row(app, "retry_twice", 3)
    assert (row.value, row.last_outcome) == ('{"n":1}', "succeeded")
    assert [note["retries"] for note in fleet.notes("attempt")] == [0, 1, 2]


def test_autoretry_for_goes_through_the_lease(fleet: Fleet, client: Callable[[], Celery]) -> None:
    app = client()
    fleet.start("-c", "2")
    app.send_task("autoretried")
    row = free_row(app, "autoretried", 2)
    assert (row.value, row.last_outcome) == ('{"n":1}', "succeeded")
    assert [note["retries"] for note in fleet.notes("attempt")] == [0, 1]


def test_a_retry_that_a_succeeded_run_asked_for_is_no_duplicate(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A run may send its own next run and succeed (issue 53 of celery-singleton)."""
    app = client()
    fleet.start("-c", "2")
    app.send_task("asks_for_another_and_succeeds")
    assert free_row(app, "asks_for_another_and_succeeds", 2).value == '{"n":2}'


@pytest.mark.parametrize(("name", "ended"), [("ignored", "skipped"), ("rejected", "failed")])
def test_ignore_and_reject_release_without_saving(
    fleet: Fleet, client: Callable[[], Celery], name: str, ended: str
) -> None:
    app = client()
    fleet.start("-P", "solo")
    app.send_task(name)
    row = free_row(app, name, 1)
    assert (row.value, row.last_outcome) == ("null", ended)
    assert len(fleet.notes("attempt")) == 1


def test_a_users_base_class_with_celerys_hooks(fleet: Fleet, client: Callable[[], Celery]) -> None:
    app = client()
    fleet.start("-P", "solo")
    assert outcome(app.send_task("of_own_base")) == 1
    # Celery calls on_success only after it has stored the result.
    fleet.wait_for_notes("on_success")
    events = ["before_start", "call", "become_leader", "lose_leadership", "on_success"]
    assert [len(fleet.notes(event)) for event in events] == [1] * 5


def test_a_skipped_delivery_succeeds_with_none(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Any
) -> None:
    app = client()
    worker = fleet.start("-c", "2")
    go = tmp_path / "go"
    first = app.send_task("held_and_skipped", (str(go),))
    fleet.wait_for_notes("enter")
    second = app.send_task("held_and_skipped")
    assert outcome(second) is None
    assert second.state == "SUCCESS"
    assert "held_and_skipped skipped: held by" in worker.output
    go.touch()
    assert outcome(first) == "ran"
    assert len(fleet.notes("enter")) == 1


def test_a_refused_delivery_names_the_holder(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Any
) -> None:
    app = client()
    fleet.start("-c", "2")
    go = tmp_path / "go"
    first = app.send_task("held", (str(go),))
    fleet.wait_for_notes("enter")
    second = app.send_task("held", (str(go),), link_error=app.signature("on_failure"))
    error = outcome(second)
    assert isinstance(error, LeaderHandoffFailed)
    assert first.id in str(error)
    assert "lease expires in" in str(error)
    assert fleet.wait_for_notes("errback")[0]["is_ours"]
    go.touch()
    assert outcome(first) == "held"


def test_a_duplicate_that_comes_during_the_run_waits_and_is_dropped(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Any
) -> None:
    """The second delivery finds its own task id in the lease. It is requeued until the first
    delivery's run has saved its state.

    Then the second delivery is recognised as a duplicate. The body runs once, and the first
    delivery's result is kept.
    """
    app = client()
    worker = fleet.start("-c", "2")
    go = tmp_path / "go"
    first = app.send_task("increment", (str(go),), task_id="the-same")
    fleet.wait_for_notes("enter")
    app.send_task("increment", (str(go),), task_id="the-same")
    wait_until(lambda: "requeued" in worker.output, "the second delivery is requeued")
    go.touch()
    assert outcome(first) == 1
    wait_until(lambda: "was done before" in worker.output, "the duplicate ends")
    assert len(fleet.notes("enter")) == 1
    assert outcome(app.AsyncResult("the-same")) == 1
    row = runtime_of(app).store.peek("singleton-state:increment")
    assert row is not None
    assert row.value == '{"n":1}'


def test_a_duplicate_that_comes_after_the_run_is_dropped(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    app = client()
    worker = fleet.start("-P", "solo")
    assert outcome(app.send_task("increment", task_id="the-same")) == 1
    app.send_task("increment", task_id="the-same")
    wait_until(lambda: "was done before" in worker.output, "the duplicate ends")
    assert outcome(app.AsyncResult("the-same")) == 1
    assert outcome(app.send_task("increment")) == 2
