"""RabbitMQ's quorum queues, with real workers: delayed messages wait in RabbitMQ, however long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import celery
import pytest
from celery import Celery

from tests.helpers.fleet import Fleet, outcome
from tests.helpers.queues import QUORUM
from tests.helpers.rabbitmq import RabbitMQ
from tests.helpers.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(
        celery.VERSION < (5, 5), reason="before Celery 5.5 nothing in RabbitMQ delays messages"
    ),
    pytest.mark.fleet(broker=QUORUM, CELERY_SINGLETON_HEARTBEAT_INTERVAL="60"),
]


def test_a_retry_after_less_than_a_second_arrives(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """A retry with a countdown of 0.3 s arrives after a second. Celery's own delay would refuse the
    countdown (``countdown must be a positive number``) and drop the retry.
    """
    app = client()
    fleet.start("-c", "2")
    assert outcome(app.send_task("retries_later", (1, 0.3))) == 1


def test_a_message_that_is_retried_again_and_again_stays_in_its_queue(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """Each of Celery's delays adds 56 characters to the routing key, which holds at most 255. A
    message that was retried 20 times must still reach its queue.
    """
    app = client()
    worker = fleet.start("-c", "2")
    assert outcome(app.send_task("retries_later", (1, 0.1, 20))) == 20
    assert len(fleet.notes("enter")) == 21
    assert "is sent again" not in worker.output


def test_messages_that_wait_do_not_block_others(fleet: Fleet, client: Callable[[], Celery]) -> None:
    """A worker prefetches as many messages as it may, and all of them ask for a retry in an hour.
    Then a plain task runs.
    """
    app = client()
    worker = fleet.start("-c", "2")
    waiting = [app.send_task("retries_later", (number, 3600)) for number in range(4)]
    for each in waiting:
        fleet.wait_for_output(worker, f"Task retries_later[{each.id}] retry")
    assert outcome(app.send_task("plain_add", (1, 2))) == 3


@pytest.mark.fleet(broker="direct")
def test_a_message_waits_through_the_deaths_of_its_worker_and_of_rabbitmq(
    own_rabbitmq: RabbitMQ,
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    tmp_path: Path,
) -> None:
    """A's run asks for a retry in 5 s. A is killed. Then RabbitMQ is killed and started again. B
    runs the retry.
    """
    fleet = make_fleet(CELERY_BROKER_URL=own_rabbitmq.url)
    app = client()
    killed = fleet.start("-c", "1", name="a")
    # Wait for this task, because RabbitMQ 3.10 can lose a quorum queue that is younger than half a
    # second when it is killed.
    assert outcome(app.send_task("retries_later", (0, 3))) == 1
    result = app.send_task("retries_later", (1, 5))
    fleet.wait_for_output(killed, f"Task retries_later[{result.id}] retry")
    killed.close()
    own_rabbitmq.stop()
    own_rabbitmq.start()
    fleet.start("-c", "1", name="b")
    assert outcome(result) == 1
    # The first message may run again, because RabbitMQ may not have received its acknowledgement.
    last = fleet.notes("enter")[-1]
    assert (last["number"], last["retries"]) == (1, 1)


def delete_delay_exchange(app: Celery) -> None:
    """Delete an exchange for delays, as if no worker had declared it or had the right to declare
    it.
    """
    with app.connection_for_write() as connection, connection.channel() as channel:
        channel.exchange_delete("celery_delayed_27")


def test_a_message_that_rabbitmq_cannot_delay_waits_in_the_worker(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """RabbitMQ would lose a message that is published to an exchange that does not exist."""
    app = client()
    worker = fleet.start("-c", "2")
    delete_delay_exchange(app)
    assert outcome(app.send_task("retries_later", (1, 0.3))) == 1
    wait_until(lambda: "RabbitMQ does not delay messages" in worker.output, "the worker says so")
