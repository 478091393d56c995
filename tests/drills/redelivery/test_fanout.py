"""A singleton's message that is sent to all workers (kombu's ``Broadcast``) runs once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.helpers.fleet import Fleet, Worker
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.fleet(
    broker=("valkey", "fanout"),
    CELERY_SINGLETON_HEARTBEAT_INTERVAL="60",
    TEST_QUEUE_KIND="fanout",
    TEST_QUEUE="heard",
)


@pytest.fixture
def workers(fleet: Fleet, client: Callable[[], Celery]) -> list[Worker]:
    """Start three workers, and wait until they listen to the fanout exchange. On Redis this is a
    little after they are ready.
    """
    started = [fleet.start("-c", "2", ready=False, name=name) for name in "abc"]
    for worker in started:
        worker.wait_ready()
    app = client()

    def listen() -> bool:
        send_to_all(app, "joined", "listen")
        return all("Task joined[" in worker.output for worker in started)

    wait_until(listen, "all workers listen")
    return started


def send_to_all(app: Celery, task: str, *args: Any, **options: Any) -> Any:
    """Send a message through the fanout exchange.

    Declare the exchange first, because on Redis kombu treats an exchange that its process has not
    declared as a direct exchange.
    """
    queue = app.amqp.queues[f"{app.conf.task_default_queue}-all"]
    declare = [queue.exchange]
    return app.send_task(task, args, queue=queue, declare=declare, **options)


def ended(workers: list[Worker], task: str, task_id: str) -> int:
    """Return how many deliveries of a message have ended."""
    of_it = f"Task {task}[{task_id}] "
    ends = ("succeeded", "ignored", "raised", "retry")
    return sum(worker.output.count(of_it + end) for worker in workers for end in ends)


def received(workers: list[Worker], task_id: str) -> int:
    return sum(worker.output.count(f"[{task_id}] received") for worker in workers)


@pytest.mark.parametrize(
    ("policy", "deduplicate"),
    [("skip", True), ("wait", False), ("replace", False), ("coalesce", False)],
)
def test_a_message_to_all_workers_runs_once(
    workers: list[Worker],
    fleet: Fleet,
    client: Callable[[], Celery],
    tmp_path: Path,
    policy: str,
    deduplicate: bool,
) -> None:
    """Three workers get a copy each. One copy runs while the others find the lease taken, and no
    copy is redelivered. If a copy arrives after the run, it finds the run in the row's history.
    """
    app, go = client(), tmp_path / "go"
    task = f"broadcast_{policy}_{deduplicate}"
    result = send_to_all(app, task, "one", str(go))
    fleet.wait_for_notes("enter")
    wait_until(lambda: ended(workers, task, result.id) == 2, "the other copies have ended")
    go.touch()
    wait_until(lambda: ended(workers, task, result.id) == 3, "the run has ended")
    assert received(workers, result.id) == 3
    send_to_all(app, task, "one", "", task_id=result.id)
    wait_until(lambda: received(workers, result.id) == 6, "copies that come late are received")
    wait_until(lambda: ended(workers, task, result.id) == 6, "copies that come late have ended")
    assert len(fleet.notes("enter")) == 1
    assert any("came through the fanout exchange" in worker.output for worker in workers)


def test_a_message_to_all_workers_waits_for_another_run(
    workers: list[Worker], fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """The three copies find that the run of another message has the lease. One copy runs after that
    run.
    """
    app, go = client(), tmp_path / "go"
    task = "broadcast_wait_False"
    first = app.send_task(task, ("first", str(go)))
    fleet.wait_for_notes("enter")
    second = send_to_all(app, task, "second", "")
    wait_until(lambda: received(workers, second.id) >= 3, "all copies are received")
    go.touch()
    wait_until(lambda: ended(workers, task, first.id) == 1, "the first run has ended")
    ends = [f"Task {task}[{second.id}] succeeded", "came through the fanout exchange"]

    def over() -> bool:
        return sum(worker.output.count(end) for worker in workers for end in ends) >= 3

    wait_until(over, "one copy has run, and two have ended")
    assert [note["what"] for note in fleet.notes("enter")] == ["first", "second"]


def test_a_retry_that_the_body_of_one_copy_asks_for_runs_once(
    workers: list[Worker], fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """The body of a fanout message calls ``self.retry()``. On Redis the retry goes to all workers,
    on RabbitMQ it goes into the queue of one worker. On both brokers the retry runs once.
    """
    result = send_to_all(client(), "retries_later", 1, 0.2, 3)
    wait_until(lambda: ended(workers, "retries_later", result.id) >= 6, "all retries have run")
    wait_until(lambda: len(fleet.notes("leave")) == 4, "the last retry has run")
    assert [note["retries"] for note in fleet.notes("enter")] == [0, 1, 2, 3]
