"""RabbitMQ's time limit for acknowledgements, which ends workers with long bodies.

A singleton's message is acknowledged when its run is over. RabbitMQ closes the channel of a
consumer that keeps a message for longer than its ``consumer_timeout``, 30 minutes by default, and
Celery's worker ends over that. A worker cannot ask RabbitMQ for the value. So it tells once when it
starts what it relies on, and warns where a task's own time limit is longer, and while a message
comes close.
"""

from __future__ import annotations

import time
import weakref
from typing import Any

from celery import Celery, bootsteps
from celery.worker import state

from celery_singleton_state.config.options import options_of
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)

#: The part of the time after which a message that is not acknowledged yet is worth a warning.
CLOSE = 5 / 6
ARGUMENT = "x-consumer-timeout"
ADVICE = (
    "raise consumer_timeout in rabbitmq.conf (and singleton_consumer_timeout, which tells the "
    "worker) or the queue's argument x-consumer-timeout: docs/when-things-go-wrong.md, "
    "'RabbitMQ closes the channel'"
)


class ConsumerTimeoutStep(bootsteps.StartStopStep):
    """Warns of singletons whose messages RabbitMQ may take back before they are acknowledged."""

    requires = ("celery.worker.components:Timer", "celery.worker.components:Pool")

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._timeout: float = 0.0
        self._timer: Any = None
        #: When each message was first seen here, by the monotonic clock; of a warning: never again.
        self._seen: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()

    def include_if(self, parent: Any) -> bool:
        return bool(timeout_of(parent.app)) and bool(late(parent.app))

    def start(self, parent: Any) -> None:
        self._timeout = timeout_of(parent.app)
        warn_at_start(parent, self._timeout)
        pause = min(60.0, self._timeout * (1 - CLOSE) / 2)
        self._timer = parent.timer.call_repeatedly(pause, self.check)

    def stop(self, parent: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()

    terminate = stop

    def check(self) -> None:
        """Warn once of each singleton's message that is close to the limit."""
        now = time.monotonic()
        for request in list(state.requests.values()):
            if request.acknowledged or options_of(request.task) is None:
                continue
            since = self._seen.setdefault(request, now)
            if now - since >= self._timeout * CLOSE:
                self._seen[request] = float("inf")
                logger.warning(
                    "singletons: the message of task %s[%s] is not acknowledged after %.0f s; "
                    "RabbitMQ closes this worker's channel after %.0f s: %s",
                    request.name,
                    request.id,
                    now - since,
                    self._timeout,
                    ADVICE,
                )


def timeout_of(app: Celery) -> float:
    """Seconds after which RabbitMQ takes a message back from the app's worker; 0: never.

    Of several queues the longest: which one a task's messages are in is not known.
    """
    broker: Any = app.connection_for_read()
    if broker.transport.driver_type != "amqp":
        return 0.0
    usual = runtime_of(app).settings.consumer_timeout
    queues: Any = app.amqp.queues.consume_from
    return max((_timeout_of(queue, usual) for queue in queues.values()), default=usual)


def _timeout_of(queue: Any, usual: float) -> float:
    for arguments in (queue.consumer_arguments, queue.queue_arguments):
        milliseconds = (arguments or {}).get(ARGUMENT)
        if isinstance(milliseconds, int | float):
            return milliseconds / 1000
    return usual


def late(app: Celery) -> list[Any]:
    """The singletons whose messages are acknowledged when their runs are over."""
    return [task for task in app.tasks.values() if task.acks_late and options_of(task) is not None]


def warn_at_start(worker: Any, timeout: float) -> None:
    """Say what the worker relies on; loudly where a task's own limit is longer."""
    limits = {task.name: _limit(worker, task) for task in late(worker.app)}
    longer = sorted(name for name, limit in limits.items() if limit is not None and limit > timeout)
    if longer:
        logger.warning(
            "singletons: the time limits of %s are longer than the %.0f s after which RabbitMQ "
            "closes the channel of a worker that has not acknowledged a message: %s",
            ", ".join(longer),
            timeout,
            ADVICE,
        )
    elif any(limit is None for limit in limits.values()):
        logger.info(
            "singletons: messages are acknowledged when their runs are over, and RabbitMQ closes "
            "the channel of a worker that takes longer than %.0f s: for longer bodies %s",
            timeout,
            ADVICE,
        )


def _limit(worker: Any, task: Any) -> float | None:
    """Seconds after which a body is ended; ``None``: never."""
    given = (
        task.soft_time_limit or worker.soft_time_limit,
        task.time_limit or worker.time_limit,
    )
    return min((float(limit) for limit in given if limit), default=None)
