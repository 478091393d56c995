"""Many messages wait for one singleton, while other tasks need the same workers."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from amqp.exceptions import ChannelError
from celery import Celery

from celery_singleton_state import LeaderHandoffFailed
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until

WAITING = int(os.environ.get("TEST_WAITING", "300"))

pytestmark = pytest.mark.fleet(
    store="postgresql", broker=("valkey", "classic"), app="tests.apps.many_app"
)


@pytest.fixture
def queue(tmp_path: Path) -> str:
    """The name of a queue of this test's own, because all tests share one RabbitMQ."""
    return tmp_path.name


def start(make_fleet: Callable[..., Fleet], queue: str, timeout: float) -> Fleet:
    """Start a worker for the lease's holder, and another worker with two processes."""
    fleet = make_fleet(TEST_QUEUE=queue, TEST_CONFLICT_TIMEOUT=timeout)
    fleet.start("-c", "1", "-Q", f"{queue}-holder", name="holder")
    fleet.start("-c", "2")
    return fleet


def messages_in(app: Celery, queue: str) -> int:
    with app.connection_for_read() as connection:
        try:
            found: int = connection.default_channel.queue_declare(queue, passive=True).message_count
        except ChannelError:
            return 0  # Redis has no list for an empty queue
    return found


def test_plain_tasks_are_not_delayed_by_many_waiting_messages(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    queue: str,
    tmp_path: Path,
) -> None:
    """Plain tasks are not delayed by 300 waiting messages, and one of these messages runs soon
    after the lease is free.

    They were delayed when each waiting message was delivered again within four seconds, because a
    plain task then queued behind all of these messages.
    """
    fleet = start(make_fleet, queue, 600)
    app, go = client(), tmp_path / "go"
    app.send_task("patient", (0, str(go)), queue=f"{queue}-holder")
    fleet.wait_for_notes("holds")
    for number in range(1, WAITING + 1):
        app.send_task("patient", (number,), queue=queue)
    # Some waiting messages have been delivered before this plain task runs.
    app.send_task("plain", (0, time.monotonic()), queue=queue)
    fleet.wait_for_notes("plain")
    wait_until(lambda: messages_in(app, queue) == 0, "the worker has all messages")
    begin = time.monotonic()
    for number in range(1, 201):
        due = begin + number / 20
        wait_until(lambda due=due: time.monotonic() >= due, "the next plain task is due")
        app.send_task("plain", (number, time.monotonic()), queue=queue)
    took = [note["took"] for note in fleet.wait_for_notes("plain", 201)[1:]]
    assert statistics.median(took) < 0.5, (
        "the limit is a hundred times the figure of an idle machine"
    )
    go.touch()
    freed = time.monotonic()
    first = fleet.wait_for_notes("served")[0]
    assert first["at"] - freed < 10
    served = fleet.wait_for_notes("served", 20)
    assert len({note["number"] for note in served}) == len(served)


def test_messages_that_wait_for_too_long_fail_in_time(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    queue: str,
    tmp_path: Path,
) -> None:
    """Fifty messages wait for a lease that stays taken. Each fails when its ``conflict_timeout``
    has passed.
    """
    fleet = start(make_fleet, queue, 3)
    app, go = client(), tmp_path / "go"
    app.send_task("patient", (0, str(go)), queue=f"{queue}-holder")
    fleet.wait_for_notes("holds")
    results = [app.send_task("patient", (number,), queue=queue) for number in range(1, 51)]
    errors = [outcome(result) for result in results]
    go.touch()
    assert {type(error) for error in errors} == {LeaderHandoffFailed}
    assert all("not obtained within 3 s" in error.detail for error in errors)
