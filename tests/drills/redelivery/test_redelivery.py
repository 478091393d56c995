"""Messages that the broker delivers a second time, to real workers."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import celery
import pytest
from celery import Celery
from celery.exceptions import WorkerLostError
from celery.result import AsyncResult

from celery_singleton_state.history import decode
from celery_singleton_state.runtime import runtime_of
from tests.helpers.fences import are_growing
from tests.helpers.fleet import Fleet, Worker, outcome
from tests.helpers.queues import KINDS
from tests.helpers.rabbitmq import RabbitMQ
from tests.helpers.servers import Proxy
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.fleet(
    broker=KINDS, CELERY_SINGLETON_HEARTBEAT_INTERVAL="60", TEST_WORKER_LOST_WAIT="0.1"
)
EACH_BROKER = pytest.mark.fleet(broker=("valkey", *KINDS), TEST_VISIBILITY_TIMEOUT="1")


@EACH_BROKER
def test_the_same_message_published_twice_runs_once(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    app = client()
    fleet.start("-c", "2")
    go = tmp_path / "go"
    results = [app.send_task("increment", (str(go),), task_id="the-same") for _ in range(2)]
    fleet.wait_for_notes("enter")
    go.touch()
    assert [outcome(result) for result in results] == [1, 1]
    store = runtime_of(app).store

    def ended() -> bool:
        row = store.peek("singleton-state:increment")
        return row is not None and row.holder is None

    wait_until(ended, "the run has ended")
    assert len(fleet.notes("enter")) == 1


@EACH_BROKER
@pytest.mark.skipif(celery.VERSION < (5, 7), reason="Celery bounds this from 5.7 on")
def test_a_message_whose_runs_die_is_redelivered_a_limited_number_of_times(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """Each run kills its process. Celery limits how often it delivers the message again."""
    app = client()
    fleet.start("-c", "1")
    result = app.send_task("dies_twice")
    error = outcome(result)
    assert isinstance(error, WorkerLostError)
    assert are_growing((note["fence"] for note in fleet.notes("enter")), 2)
    row = runtime_of(app).store.peek("singleton-state:dies_twice")
    assert row is not None
    assert [entry.outcome for entry in decode(row.history, row.key)] == ["lost", "lost"]


def send_and_enter(fleet: Fleet, app: Celery, go: Path) -> AsyncResult[int]:
    """Send a message and wait until its body has begun; return the message's result."""
    result: AsyncResult[int] = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    return result


def wait_until_requeued(fleet: Fleet, worker: Worker) -> None:
    """Wait until the second copy of the message is requeued. Do not wait with Celery before 5.5, in
    which a worker that has reconnected starts no message while a body runs.
    """
    if celery.VERSION >= (5, 5):
        fleet.wait_for_output(worker, "its message is requeued")


def test_the_connection_of_a_worker_breaks_in_mid_body(
    rabbitmq: RabbitMQ,
    make_fleet: Callable[..., Fleet],
    make_proxy: Callable[[int], Proxy],
    client: Callable[[], Celery],
    tmp_path: Path,
) -> None:
    """A's body runs. A's connection breaks. RabbitMQ delivers the message again. A reconnects and
    receives the copy while the run goes on.

    The copy is requeued, and ends as a duplicate after the run has saved.
    """
    proxy = make_proxy(rabbitmq.port)
    fleet = make_fleet(CELERY_BROKER_URL=rabbitmq.url_at(proxy.port))
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-c", "2")
    result = send_and_enter(fleet, app, go)
    proxy.cut()
    wait_until_requeued(fleet, worker)
    go.touch()
    assert outcome(result) == 1
    fleet.wait_for_output(worker, f"task {result.id} was done before")
    assert len(fleet.notes("enter")) == 1


def test_another_worker_gets_the_message_of_a_run_that_goes_on(
    rabbitmq: RabbitMQ,
    make_fleet: Callable[..., Fleet],
    make_proxy: Callable[[int], Proxy],
    client: Callable[[], Celery],
    tmp_path: Path,
) -> None:
    """A's body runs. A is cut off from RabbitMQ for good. B receives A's message.

    B requeues the message while A's run goes on, and ends it as a duplicate after the run has
    saved.
    """
    proxy = make_proxy(rabbitmq.port)
    fleet = make_fleet()
    app, go = client(), tmp_path / "go"
    fleet.environment["CELERY_BROKER_URL"] = rabbitmq.url_at(proxy.port)
    fleet.start("-c", "1", name="a")
    result = send_and_enter(fleet, app, go)
    fleet.environment["CELERY_BROKER_URL"] = rabbitmq.url
    other = fleet.start("-c", "1", name="b")
    proxy.mode = "refuse"
    proxy.cut()
    fleet.wait_for_output(other, "its message is requeued")
    go.touch()
    fleet.wait_for_output(other, f"task {result.id} was done before")
    assert outcome(result) == 1
    assert len(fleet.notes("enter")) == 1


def test_a_run_that_celery_kills_over_a_lost_connection_is_repeated(
    rabbitmq: RabbitMQ,
    make_fleet: Callable[..., Fleet],
    make_proxy: Callable[[int], Proxy],
    client: Callable[[], Celery],
    tmp_path: Path,
) -> None:
    """With ``worker_cancel_long_running_tasks_on_connection_loss``, A's connection breaks. Celery
    kills the body's process. The lease is free at once. The message is redelivered and runs.
    """
    proxy = make_proxy(rabbitmq.port)
    fleet = make_fleet(CELERY_BROKER_URL=rabbitmq.url_at(proxy.port), TEST_CANCEL="1")
    app, go = client(), tmp_path / "go"
    fleet.start("-c", "1")
    result = send_and_enter(fleet, app, go)
    proxy.cut()
    assert are_growing((note["fence"] for note in fleet.wait_for_notes("enter", 2)), 2)
    go.touch()
    assert outcome(result) == 1


def test_a_worker_that_dies_leaves_its_message_to_another(
    rabbitmq: RabbitMQ,
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
) -> None:
    """A and all its processes are killed in mid-body. Three more messages have been waiting for A's
    only child. B, on the same host, receives all four messages and takes over the lease.
    """
    fleet = make_fleet(TEST_PREFETCH="4")
    app, go = client(), tmp_path / "go"
    killed = fleet.start("-c", "1", name="a")
    result = send_and_enter(fleet, app, go)
    waiting = [app.send_task("keyed", (number,)) for number in range(3)]
    for each in waiting:
        fleet.wait_for_output(killed, f"{each.id}] received")
    fleet.start("-c", "1", name="b")
    killed.close()
    assert are_growing((note["fence"] for note in fleet.wait_for_notes("enter", 2)), 2)
    go.touch()
    assert outcome(result) == 1
    assert [outcome(each) for each in waiting] == [1, 2, 3]


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_worker_that_falls_silent_to_rabbitmq_in_mid_body(
    rabbitmq: RabbitMQ,
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
    pool: str,
) -> None:
    """A's main thread stops sending heartbeats to RabbitMQ: with threads, a cold shutdown has ended
    the thread; in a solo pool, the thread runs the body. RabbitMQ considers A dead while A's run
    goes on, and delivers its message to B.

    A cannot acknowledge the message. B requeues it, and ends it as a duplicate after the run has
    saved.
    """
    fleet = make_fleet(TEST_BROKER_HEARTBEAT="1")
    app, go = client(), tmp_path / "go"
    silent = fleet.start("-P", pool, "-c", "1", name="a")
    result = send_and_enter(fleet, app, go)
    if pool == "threads":
        silent.process.send_signal(signal.SIGQUIT)
    fleet.environment["TEST_BROKER_HEARTBEAT"] = "120"
    other = fleet.start("-c", "1", name="b")
    fleet.wait_for_output(other, "its message is requeued")
    go.touch()
    fleet.wait_for_output(other, f"task {result.id} was done before")
    assert outcome(result) == 1
    assert len(fleet.notes("enter")) == 1


@pytest.mark.skipif(celery.VERSION < (5, 5), reason="soft shutdown is new in Celery 5.5")
def test_a_soft_shutdown_of_gevent_in_mid_body(
    rabbitmq: RabbitMQ,
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
) -> None:
    """Celery 5.7 cannot wait in a signal handler under gevent, so A exits at once and leaves its
    lease behind. B, on the same host, receives the message and takes over the lease.
    """
    fleet = make_fleet(TEST_SOFT_SHUTDOWN="0.5")
    app, go = client(), tmp_path / "go"
    stopped = fleet.start("-P", "gevent", "-c", "1", name="a")
    result = send_and_enter(fleet, app, go)
    stopped.process.send_signal(signal.SIGQUIT)
    stopped.process.wait(30)
    fleet.start("-c", "1", name="b")
    assert are_growing((note["fence"] for note in fleet.wait_for_notes("enter", 2)), 2)
    go.touch()
    assert outcome(result) == 1


def test_rabbitmq_dies_in_mid_body(
    own_rabbitmq: RabbitMQ,
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
) -> None:
    """RabbitMQ is killed while a body runs, and started again. It has kept the body's message and
    redelivers it. The run is not repeated, and the next message runs.
    """
    fleet = make_fleet(CELERY_BROKER_URL=own_rabbitmq.url)
    app, go = client(), tmp_path / "go"
    worker = fleet.start("-c", "2")
    # Wait for this task, because RabbitMQ 3.10 can lose a quorum queue that is younger than half a
    # second when it is killed.
    assert outcome(app.send_task("retries_later", (0, 1))) == 1
    result: AsyncResult[int] = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter", 3)
    own_rabbitmq.stop()
    fleet.wait_for_output(worker, "Connection to broker lost")
    own_rabbitmq.start()
    wait_until_requeued(fleet, worker)
    go.touch()
    assert outcome(result) == 1
    fleet.wait_for_output(worker, f"task {result.id} was done before")
    assert outcome(app.send_task("increment")) == 2
    assert [note["task"] for note in fleet.notes("enter")[2:]] == ["increment"] * 2
