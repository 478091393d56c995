"""Deliveries that find the lease taken, with real workers: each policy, also when a
process dies.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, chain

from celery_singleton_state import HeartbeatFailed, LeaderHandoffFailed
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Row
from tests.helpers.fleet import Fleet, Worker, outcome
from tests.helpers.queues import QUORUM
from tests.helpers.waiting import wait_until

#: After how many seconds the broker delivers a message again if it was not acknowledged.
VISIBILITY_TIMEOUT = 2.0

# A short heartbeat interval, so that a holder soon learns of a handoff request.
pytestmark = pytest.mark.fleet(
    broker=("valkey", *QUORUM),
    CELERY_SINGLETON_HEARTBEAT_INTERVAL="0.5",
    TEST_VISIBILITY_TIMEOUT=VISIBILITY_TIMEOUT,
)


@pytest.fixture
def go(tmp_path: Path) -> Path:
    return tmp_path / "go"


def row_of(app: Celery, name: str) -> Row:
    row = runtime_of(app).store.peek(f"singleton-state:{name}")
    assert row is not None
    return row


def entered(fleet: Fleet) -> list[str]:
    return [note["what"] for note in fleet.notes("enter")]


def send(app: Celery, name: str, what: str, until: Any = "", **options: Any) -> Any:
    return app.send_task(name, (what, str(until)), **options)


def test_a_delivery_waits_and_runs_when_the_lease_is_free(
    fleet: Fleet, client: Callable[[], Celery], go: Path
) -> None:
    """A delivery finds the lease taken, waits, and runs when the lease is free. The delivery uses
    up none of the task's own retries, and its chain goes on.

    Users know the faults from celery-singleton #19 (a duplicate drops its chain) and celery-once
    #110 (a task sent by hand is ignored silently).
    """
    app = client()
    worker = fleet.start("-c", "2")
    send(app, "waits_its_turn", "first", go)
    fleet.wait_for_notes("enter")
    chained = chain(
        app.signature("waits_its_turn", ("second", "")), app.signature("joined", (" ends",))
    ).apply_async()
    fleet.wait_for_output(worker, f"Task waits_its_turn[{chained.parent.id}] ignored")
    go.touch()
    assert outcome(chained) == "second ends"
    notes = fleet.notes("enter")
    assert [(note["what"], note["n"], note["retries"]) for note in notes] == [
        ("first", 0, 0),
        ("second", 1, 0),
    ]


def test_a_delivery_that_waited_for_too_long_fails(
    fleet: Fleet, client: Callable[[], Celery], go: Path
) -> None:
    app = client()
    fleet.start("-c", "2")
    first = send(app, "impatient", "first", go)
    fleet.wait_for_notes("enter")
    error = outcome(send(app, "impatient", "second"))
    assert isinstance(error, LeaderHandoffFailed)
    assert "not obtained within 1 s" in error.detail
    assert f"for task {first.id}" in error.detail
    go.touch()
    assert outcome(first) == "first"


@pytest.mark.parametrize("policy", ["waits_its_turn", "replaces"])
def test_the_holder_dies_while_another_waits(
    fleet: Fleet, client: Callable[[], Celery], policy: str
) -> None:
    app = client()
    fleet.start("-c", "2")
    send(app, policy, "first", "for ever")
    child = fleet.wait_for_notes("enter")[0]["pid"]
    second = send(app, policy, "second")
    os.kill(child, signal.SIGKILL)
    assert outcome(second) == "second"


def stop_with_message(worker: Worker, app: Celery, task_id: str) -> bool:
    """Pause a worker if it holds this message unacknowledged; return whether it does. If not, let
    the worker go on.
    """
    worker.signal_all(signal.SIGSTOP)
    with app.connection() as connection:
        waiting = connection.default_channel.client.hvals("unacked")
    if any(task_id.encode() in message for message in waiting):
        return True
    worker.signal_all(signal.SIGCONT)
    return False


@pytest.mark.fleet(broker="valkey")
def test_the_worker_of_a_waiting_delivery_dies(
    fleet: Fleet, client: Callable[[], Celery], go: Path
) -> None:
    """A waiting delivery's worker is killed. The broker redelivers the message at its next check.
    Redis checks when a worker starts, and otherwise every ten seconds, so the test starts another
    worker.
    """
    app = client()
    fleet.start("-c", "1", "-Q", "a", name="a")
    send(app, "waits_its_turn", "first", go, queue="a")
    fleet.wait_for_notes("enter")
    killed = fleet.start("-c", "1", "-Q", "b", name="b")
    second = send(app, "waits_its_turn", "second", queue="b")
    fleet.wait_for_output(killed, f"Task waits_its_turn[{second.id}] ignored")
    # Wait, because Redis loses a message that is on its way to a worker when this worker is killed.
    wait_until(
        lambda: stop_with_message(killed, app, second.id), "the worker is stopped with its message"
    )
    killed.close()
    restored_from = time.monotonic() + VISIBILITY_TIMEOUT
    wait_until(lambda: time.monotonic() > restored_from, "the broker may restore the message")
    fleet.start("-c", "1", "-Q", "b", name="b")
    go.touch()
    assert outcome(second) == "second"


def test_a_delivery_that_replaces_stops_the_holder(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """The holder learns of the handoff request at its next heartbeat and ends with the state of its
    last checkpoint. The replacing run goes on from that state.
    """
    app = client()
    fleet.start("-c", "2")
    first = send(app, "replaces", "first", "for ever")
    fleet.wait_for_notes("enter")
    second = send(app, "replaces", "second")
    error = outcome(first)
    assert isinstance(error, HeartbeatFailed)
    assert f"asked to hand over to {second.id}" in error.detail
    assert outcome(second) == "second"
    assert [(note["what"], note["n"]) for note in fleet.notes("enter")] == [
        ("first", 0),
        ("second", 1),
    ]


def test_of_four_messages_that_replace_within_a_second_the_last_completes(
    fleet: Fleet, client: Callable[[], Celery], go: Path
) -> None:
    """Each of the four runs would go on for ever if it were not replaced. Their first statements
    may reach the store in any order.
    """
    app = client()
    worker = fleet.start("-c", "4")
    whats = ["first", "second", "third", "last"]
    sent = [send(app, "replaces", what, go if what == "last" else "for ever") for what in whats]
    endings = [outcome(each) for each in sent[:-1]]
    assert all(ending is None or isinstance(ending, HeartbeatFailed) for ending in endings)
    go.touch()
    assert outcome(sent[-1]) == "last"
    assert entered(fleet)[-1] == "last"
    assert worker.output.count(", which is newer") == endings.count(None)
    assert row_of(app, "replaces").last_outcome == "succeeded"


def test_a_replaced_message_that_is_retried_does_not_replace_its_replacer(
    fleet: Fleet, client: Callable[[], Celery], go: Path
) -> None:
    """The replaced task retries on every error, even on the error that says that it was replaced.
    Its retry does not ask the replacing run to hand over.
    """
    app = client()
    fleet.start("-c", "2")
    first = send(app, "replaces_and_retries", "first", "for ever")
    fleet.wait_for_notes("enter")
    second = send(app, "replaces_and_retries", "second", go)
    assert isinstance(outcome(first), HeartbeatFailed)
    fleet.wait_for_notes("enter", 2)
    go.touch()
    assert outcome(second) == "second"
    assert entered(fleet) == ["first", "second"]


def test_a_holder_that_does_not_stop_is_not_replaced(
    fleet: Fleet, client: Callable[[], Celery], go: Path
) -> None:
    app = client()
    fleet.start("-c", "2")
    first = send(app, "stubborn", "first", go)
    fleet.wait_for_notes("enter")
    assert isinstance(outcome(send(app, "stubborn", "second")), LeaderHandoffFailed)
    go.touch()
    assert outcome(first) == "first"


def test_many_coalesced_messages_are_one_run_with_the_newest_arguments(
    fleet: Fleet, client: Callable[[], Celery], go: Path
) -> None:
    app = client()
    fleet.start("-c", "2")
    first = send(app, "coalesces", "first", go)
    fleet.wait_for_notes("enter")
    assert [outcome(send(app, "coalesces", f"message {n}")) for n in range(5)] == [None] * 5
    go.touch()
    assert outcome(first) == "first"
    fleet.wait_for_notes("leave", 2)
    wait_until(lambda: row_of(app, "coalesces").run_count == 2, "the pending run has run")
    assert entered(fleet) == ["first", "message 4"]
    assert outcome(send(app, "coalesces", "later")) == "later"
    assert entered(fleet) == ["first", "message 4", "later"]


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.fleet(broker="valkey")
def test_the_run_after_coalesced_messages_has_the_newest_typed_arguments(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
    go: Path,
    serializer: str,
) -> None:
    """Messages with typed arguments are coalesced. The run after them has arguments of the same
    types. It also has the tenant's argument, which a base class of the task takes away before the
    body sees the arguments.
    """
    fleet = make_fleet(TEST_SERIALIZER=serializer)
    values: list[Any] = [datetime(2026, 11, 27, tzinfo=UTC), Decimal("0.10"), UUID(int=7)]
    if serializer == "pickle":
        values.append({1, 2})
    app = client()
    fleet.start("-c", "2")
    first = app.send_task("coalesces_typed", ("a", str(go)), serializer=serializer)
    fleet.wait_for_notes("enter")
    for tenant in "ab":
        arguments = (tenant, "", *values)
        assert outcome(app.send_task("coalesces_typed", arguments, serializer=serializer)) is None
    go.touch()
    assert outcome(first) == []
    fleet.wait_for_notes("leave", 2)
    assert [note["tenant"] for note in fleet.notes("tenant")] == ["a", "a", "b", "b"]
    assert fleet.notes("enter")[-1]["values"] == [repr(value) for value in values]


def test_a_pending_run_survives_the_death_of_the_holder(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    app = client()
    fleet.start("-c", "2")
    send(app, "coalesces", "first", "for ever")
    child = fleet.wait_for_notes("enter")[0]["pid"]
    assert outcome(send(app, "coalesces", "second")) is None
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: "second" in entered(fleet), "the pending run has run")


def test_messages_in_the_hold_period_are_one_run_after_it(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """Messages arrive in the hold period after a run. The first message waits for the end of the
    hold period and runs. The others are coalesced into that run.
    """
    app = client()
    fleet.start("-c", "1")
    assert outcome(send(app, "coalesces_with_hold", "first")) == "first"
    second, third = (send(app, "coalesces_with_hold", what) for what in ("second", "third"))
    assert outcome(third) is None
    assert outcome(second) == "second"
    assert entered(fleet) == ["first", "second"]
