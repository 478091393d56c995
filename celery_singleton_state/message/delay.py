"""How a message that is sent again is delayed: one place decides it for all messages and brokers.

Celery hands a message with a countdown to a worker at once, which keeps it unacknowledged until it
is due. Two things go wrong with that:

- A broker gives a message out again that stays unacknowledged for too long. No countdown is longer
  than half of that time: the message comes, has a part of its pause left, and is sent again.
- A worker of RabbitMQ's quorum queues cannot raise its prefetch count, so messages that wait keep
  out messages that could run. From Celery 5.5 on RabbitMQ can keep them itself, for whole seconds,
  in queues that Celery's workers declare. Celery uses them for topic exchanges alone; this package
  uses them for every queue, with a binding of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from datetime import datetime
from typing import Any

from amqp.exceptions import IrrecoverableConnectionError
from celery import Celery
from celery.app.task import Context
from kombu import Queue
from kombu.exceptions import OperationalError

from celery_singleton_state.compat import broker_of
from celery_singleton_state.compat import native_delays as native
from celery_singleton_state.headers import PAUSE, PAUSE_LEFT, without_moves
from celery_singleton_state.text.visible import logger_of

from .routing import address_of, broker_kind, delayed_key, into, queue_of, resolved, undeclared

logger = logger_of(__name__)

#: By the kind of broker, the transport option that says for how many seconds it keeps a message
#: that is not acknowledged, and the default. RabbitMQ has that in its own configuration.
_KEEPS = {
    "amqp": ("", 1800.0),
    "redis": ("visibility_timeout", 3600.0),
    "sqs": ("visibility_timeout", 1800.0),
    "slmq": ("visibility_timeout", 1800.0),
    "pgmq": ("visibility_timeout", 1800.0),
    "azureservicebus": ("peek_lock_seconds", 60.0),
}
#: The part of that time for which a message may wait: its run comes after.
_WAITING_PART = 0.5
#: What says in which queue a message is to go.
_PLACES = frozenset({"queue", "exchange", "routing_key"})


def prepare(task: Any, request: Context, signature: Any, said: Collection[str]) -> None:
    """Let a message that is sent again, or retried, come when it should, where it came from.

    :param signature: the message, as Celery would send it; it is changed.
    :param said: the options that whoever sends the message has chosen.
    :raises OperationalError: the broker is out of reach.
    """
    app, options = task.app, signature.options
    options["headers"] = without_moves(options.get("headers") or {})
    own_place = _PLACES.isdisjoint(said)
    if own_place:
        for name in _PLACES:
            options.pop(name, None)
        options.update(resolved(app, address_of(app, request)))
    pause = possible(app, _pause(app, options))
    rest = 0.0
    if pause > 0 and waits_in_broker(app):
        target = queue_of(app, request) if own_place else _name_of(app, options.get("queue"))
        _wait_in_broker(app, options, round(pause), target)
    elif pause > _longest(app):
        options["eta"], options["countdown"] = None, _longest(app)
        rest = pause - _longest(app)
    if pause or PAUSE in options["headers"]:
        options["headers"][PAUSE] = pause
    if rest or PAUSE_LEFT in options["headers"]:
        options["headers"][PAUSE_LEFT] = rest


def possible(app: Celery, pause: float) -> float:
    """The pause that a message really has: whole seconds where RabbitMQ keeps the message."""
    if pause <= 0 or not waits_in_broker(app):
        return max(pause, 0.0)
    return float(min(max(math.ceil(pause), 1), 2**native.MAX_NUMBER_OF_BITS_TO_USE - 1))


def waits_in_broker(app: Celery) -> bool:
    """Whether messages do not wait in workers: they have quorum queues, and RabbitMQ keeps them."""
    return (
        native is not None
        and broker_kind(app) == "amqp"
        and any(
            (queue.queue_arguments or {}).get("x-queue-type") == "quorum"
            for queue in app.amqp.queues.values()
        )
    )


def _pause(app: Celery, options: dict[str, Any]) -> float:
    """Seconds that a message is to wait."""
    eta = options.get("eta")
    if eta is None:
        return float(options.get("countdown") or 0.0)
    if isinstance(eta, str):
        eta = datetime.fromisoformat(eta)
    if eta.tzinfo is None:
        eta = eta.replace(tzinfo=app.timezone)
    return float((eta - app.now()).total_seconds())


def _longest(app: Celery) -> float:
    """The longest countdown that the broker does not take for a lost message."""
    option, default = _KEEPS.get(broker_kind(app), ("visibility_timeout", math.inf))
    said = (broker_of(app).transport_options or {}).get(option)
    return float(said or default) * _WAITING_PART


def _wait_in_broker(app: Celery, options: dict[str, Any], seconds: int, target: str | None) -> None:
    """Let RabbitMQ keep a message; if it cannot, the message waits in a worker."""
    options["eta"], options["countdown"] = None, seconds
    if target is None:
        return  # as Celery does it, which takes whole seconds alone, and at least one
    if _is_bound(app, target):
        # Without a countdown: the worker would compare it with its own clock, which may be behind.
        options |= into(app, target) | {
            "countdown": None,
            "exchange": native.level_name(native.MAX_LEVEL),
            "exchange_type": "topic",
            "routing_key": native.calculate_routing_key(seconds, delayed_key(target)),
        }
    else:
        # Of this queue Celery does not know an exchange that delays.
        options |= into(app, target) | {"queue": undeclared(target)}


def _name_of(app: Celery, queue: Any) -> str | None:
    """The name of the queue that whoever sends a message has chosen."""
    if isinstance(queue, Queue):
        return str(queue.name)
    return None if queue is None else str(app.amqp.queues[queue].name)


def _is_bound(app: Celery, target: str) -> bool:
    """Whether RabbitMQ moves a message that was delayed into this queue: bind it, if it does not.

    :returns: ``False`` if RabbitMQ refuses: permissions, or no worker has declared the exchanges.
    :raises OperationalError: RabbitMQ is out of reach.
    """

    def bind(channel: Any) -> None:
        # A message to an exchange that is not there would be lost without a word.
        first = native.level_name(native.MAX_LEVEL)
        channel.exchange_declare(first, "topic", passive=True)
        last = native.CELERY_DELAYED_DELIVERY_EXCHANGE
        channel.queue_bind(target, last, f"#.{delayed_key(target)}")
        channel.close()

    with app.producer_or_acquire() as producer:
        connection = producer.connection
        try:
            connection.autoretry(bind, **app.conf.task_publish_retry_policy)()
        except (*connection.channel_errors, IrrecoverableConnectionError) as error:
            logger.warning("RabbitMQ does not delay messages for the queue %s: %s", target, error)
            return False
        except connection.connection_errors as error:
            raise OperationalError(str(error)) from error
    return True
