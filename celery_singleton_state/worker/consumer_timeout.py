"""Warnings about RabbitMQ's time limit for acknowledgements, which stops workers with long bodies.

A singleton's message is acknowledged when its run has ended. If a message stays unacknowledged for
longer than RabbitMQ's ``consumer_timeout``, 30 minutes by default, RabbitMQ closes the consumer's
channel, and Celery's worker stops. A worker cannot ask RabbitMQ for its ``consumer_timeout``, so
the worker assumes the setting ``singleton_consumer_timeout``. The worker logs

- the assumed value, when the worker starts,
- a warning when the worker starts, if a task's own time limit is longer than this value,
- a warning when a message has been unacknowledged for nearly as long as this value.
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

#: The part of RabbitMQ's time limit after which the worker logs a warning about a message that has
#: not been acknowledged yet.
CLOSE = 5 / 6
#: The name of the argument that gives a queue in RabbitMQ a time limit of its own, in milliseconds.
ARGUMENT = "x-consumer-timeout"
#: The end of each log line about the time limit: what the operator can do.
ADVICE = (
    "raise consumer_timeout in rabbitmq.conf (and singleton_consumer_timeout, which tells the "
    "worker) or the queue's argument x-consumer-timeout: docs/when-things-go-wrong.md, "
    "'RabbitMQ closes the channel'"
)


class ConsumerTimeoutStep(bootsteps.StartStopStep):
    """Warns about runs that may last longer than RabbitMQ waits for a message's acknowledgement."""

    requires = ("celery.worker.components:Timer", "celery.worker.components:Pool")

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._timeout: float = 0.0
        self._timer: Any = None
        #: Maps the request of each message to the time when :meth:`check` first found the message
        #: in the worker, in seconds of the monotonic clock. After a warning the time is set to
        #: infinity, so that there is only one warning for each message.
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
        """Log one warning about each message of a singleton that has not been acknowledged for
        nearly as long as RabbitMQ's time limit.
        """
        now = time.monotonic()
        for request in list(state.requests.values()):
            if request.acknowledged or options_of(request.task) is None:
                continue
            since = self._seen.setdefault(request, now)
            if now - since >= self._timeout * CLOSE:
                self._seen[request] = float("inf")
                logger.warning(
                    "singletons: the message of task %s[%s] has not been acknowledged for %.0f s; "
                    "RabbitMQ closes this worker's channel after %.0f s: %s",
                    request.name,
                    request.id,
                    now - since,
                    self._timeout,
                    ADVICE,
                )


def timeout_of(app: Celery) -> float:
    """Return the seconds for which RabbitMQ waits for an acknowledgement; 0 for other brokers.

    If the worker's queues have different limits, the longest limit is returned, because the queue
    of a task's messages is not known.
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
    """Return the singleton tasks whose messages are acknowledged after their runs."""
    return [task for task in app.tasks.values() if task.acks_late and options_of(task) is not None]


def warn_at_start(worker: Any, timeout: float) -> None:
    """Log which time limit the worker assumes, or warn about tasks whose own limits are longer.

    :param timeout: RabbitMQ's time limit for an acknowledgement, in seconds.
    """
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
            "singletons: messages are acknowledged when their runs have ended, and RabbitMQ closes "
            "the channel of a worker that takes longer than %.0f s: for longer bodies %s",
            timeout,
            ADVICE,
        )


def _limit(worker: Any, task: Any) -> float | None:
    """Return the seconds after which a worker stops a task's body; ``None`` without a limit."""
    given = (
        task.soft_time_limit or worker.soft_time_limit,
        task.time_limit or worker.time_limit,
    )
    return min((float(limit) for limit in given if limit), default=None)
