"""Queues of the tests' apps on RabbitMQ: classic queues, or quorum queues with each type of
exchange.
"""

from __future__ import annotations

import os
from typing import Any

import celery
from celery import Celery, bootsteps
from kombu import Exchange, Queue
from kombu.common import Broadcast, QoS

#: The environment variable that names the kind of an app's queues. Default: classic.
KIND = "TEST_QUEUE_KIND"
#: The kinds of quorum queues. Each has the name of the exchange type to which the queue is bound.
QUORUM = ("direct", "topic")
KINDS = ("classic", *QUORUM)


class PrefetchForEach(bootsteps.StartStopStep):
    """A step of Celery's consumer that lets Celery before 5.5 use quorum queues.

    Quorum queues refuse a prefetch count for a whole channel, which Celery sets in an earlier step.
    This step removes that count and sets one for each consumer.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        def set_prefetch_count(prefetch_count: int) -> Any:
            return parent.task_consumer.qos(prefetch_count=prefetch_count, apply_global=False)

        parent.connection.default_channel.basic_qos(0, 0, True)
        parent.qos = QoS(set_prefetch_count, parent.initial_prefetch_count)
        set_prefetch_count(parent.initial_prefetch_count)


def use_queues(app: Celery, name: str) -> None:
    """Give an app a queue with a name, of the kind that the environment names.

    With ``fanout`` the app gets a second queue, ``<name>-all``, of which each worker has a copy.
    """
    app.conf.task_default_queue = name
    kind = os.environ.get(KIND, "classic")
    if kind == "fanout":
        app.conf.task_queues = [Queue(name), Broadcast(f"{name}-all")]
    if kind not in QUORUM:
        return
    exchange = Exchange(f"{name}-{kind}", type=kind)
    arguments = {"x-queue-type": "quorum"}
    app.conf.task_queues = [Queue(name, exchange, routing_key=name, queue_arguments=arguments)]
    app.conf.task_default_exchange = exchange.name
    app.conf.task_default_exchange_type = kind
    app.conf.task_default_routing_key = name
    if celery.VERSION < (5, 5):
        app.steps["consumer"].add(PrefetchForEach)
