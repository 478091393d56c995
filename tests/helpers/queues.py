"""The queues of the tests' apps on RabbitMQ: classic ones, or quorum queues on each exchange."""

from __future__ import annotations

import os
from typing import Any

import celery
from celery import Celery, bootsteps
from kombu import Exchange, Queue
from kombu.common import Broadcast, QoS

#: Says which kind of queues an app has; classic ones without it.
KIND = "TEST_QUEUE_KIND"
#: Kinds of queues: quorum queues by the type of the exchange to which they are bound.
QUORUM = ("direct", "topic")
KINDS = ("classic", *QUORUM)


class PrefetchForEach(bootsteps.StartStopStep):
    """What quorum queues need before Celery 5.5: they refuse a prefetch count of a whole channel.

    Celery sets one before this step, which takes it back.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        def set_prefetch_count(prefetch_count: int) -> Any:
            return parent.task_consumer.qos(prefetch_count=prefetch_count, apply_global=False)

        parent.connection.default_channel.basic_qos(0, 0, True)
        parent.qos = QoS(set_prefetch_count, parent.initial_prefetch_count)
        set_prefetch_count(parent.initial_prefetch_count)


def use_queues(app: Celery, name: str) -> None:
    """Give an app the queue of this name, of the kind that the environment says.

    With ``fanout`` it has a second one, ``<name>-all``, from which each worker gets a copy.
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
