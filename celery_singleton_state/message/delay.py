"""Delay a message that is sent again: by a countdown, or by RabbitMQ's delaying queues.

Celery hands a message with a countdown to a worker at once, and the worker keeps it unacknowledged
until it is due. Two things go wrong with that:

- A broker redelivers a message that stays unacknowledged for too long. So this package sends no
  countdown that is longer than half of that time. When such a message arrives with a part of its
  pause left, it is sent again for the rest.
- A worker cannot raise its prefetch count for RabbitMQ's quorum queues, so messages that wait block
  messages that could run. From Celery 5.5 on, RabbitMQ can delay messages itself, by whole seconds,
  in queues that Celery's workers declare. Celery uses these queues for topic exchanges only. This
  package uses them for every queue, with a binding of its own.
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

#: Maps each kind of broker to the transport option that sets after how many seconds the broker
#: redelivers an unacknowledged message, and to the option's default. RabbitMQ has no such transport
#: option: the limit is in the server's configuration, and its default is 30 minutes.
_KEEPS = {
    "amqp": ("", 1800.0),
    "redis": ("visibility_timeout", 3600.0),
    "sqs": ("visibility_timeout", 1800.0),
    "slmq": ("visibility_timeout", 1800.0),
    "pgmq": ("visibility_timeout", 1800.0),
    "azureservicebus": ("peek_lock_seconds", 60.0),
}
#: The longest countdown, as a fraction of the time after which the broker redelivers an
#: unacknowledged message. The rest of this time is left for the run, which follows while the
#: message is still unacknowledged.
_WAITING_PART = 0.5
#: Names of the options that choose the queue of a message.
_PLACES = frozenset({"queue", "exchange", "routing_key"})


def prepare(task: Any, request: Context, signature: Any, chosen: Collection[str]) -> None:
    """Prepare the options of a message that is sent again or retried: its delay and its queue.

    The message goes into the queue that its last delivery came from, unless the sender chose
    another one.

    :param signature: the message as Celery would send it. Its options are changed.
    :param chosen: the names of the options that the sender chose.
    :raises OperationalError: the broker is unavailable.
    """
    app, options = task.app, signature.options
    options["headers"] = without_moves(options.get("headers") or {})
    own_place = _PLACES.isdisjoint(chosen)
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
    """Return the delay that a message will really have, in seconds.

    RabbitMQ's delaying queues round a delay up to whole seconds. Other delays are exact.
    """
    if pause <= 0 or not waits_in_broker(app):
        return max(pause, 0.0)
    return float(min(max(math.ceil(pause), 1), 2**native.MAX_NUMBER_OF_BITS_TO_USE - 1))


def waits_in_broker(app: Celery) -> bool:
    """Whether RabbitMQ delays the app's messages, instead of a worker.

    True if the app has a quorum queue and the installed Celery knows RabbitMQ's delaying queues.
    """
    return (
        native is not None
        and broker_kind(app) == "amqp"
        and any(
            (queue.queue_arguments or {}).get("x-queue-type") == "quorum"
            for queue in app.amqp.queues.values()
        )
    )


def _pause(app: Celery, options: dict[str, Any]) -> float:
    """Return the seconds that a message has to wait, from its ``eta`` or ``countdown``."""
    eta = options.get("eta")
    if eta is None:
        return float(options.get("countdown") or 0.0)
    if isinstance(eta, str):
        eta = datetime.fromisoformat(eta)
    if eta.tzinfo is None:
        eta = eta.replace(tzinfo=app.timezone)
    return float((eta - app.now()).total_seconds())


def _longest(app: Celery) -> float:
    """Return the longest countdown, in seconds, that ends well before the broker would redeliver
    the message; infinity if the broker has no such limit.
    """
    option, default = _KEEPS.get(broker_kind(app), ("visibility_timeout", math.inf))
    configured = (broker_of(app).transport_options or {}).get(option)
    return float(configured or default) * _WAITING_PART


def _wait_in_broker(app: Celery, options: dict[str, Any], seconds: int, target: str | None) -> None:
    """Have RabbitMQ delay a message; if RabbitMQ cannot, a worker delays it.

    :param options: the options of the message. They are changed.
    :param seconds: the delay.
    :param target: the name of the queue; ``None`` if it is not known.
    """
    options["eta"], options["countdown"] = None, seconds
    if target is None:
        return  # the queue is not known here, so leave the delay to Celery's own rules
    if _is_bound(app, target):
        # RabbitMQ delays the message, so the message needs no countdown. With one, a worker whose
        # clock is behind would delay the message a second time.
        options |= into(app, target) | {
            "countdown": None,
            "exchange": native.level_name(native.MAX_LEVEL),
            "exchange_type": "topic",
            "routing_key": native.calculate_routing_key(seconds, delayed_key(target)),
        }
    else:
        # An undeclared queue object stands for a direct exchange. Celery does not use RabbitMQ's
        # delaying queues for such an exchange, so a worker delays the message.
        options |= into(app, target) | {"queue": undeclared(target)}


def _name_of(app: Celery, queue: Any) -> str | None:
    """Return the name of the queue that the sender chose; ``None`` if the sender chose none.

    :param queue: the option ``queue``: a queue object, its name, or ``None``.
    """
    if isinstance(queue, Queue):
        return str(queue.name)
    return None if queue is None else str(app.amqp.queues[queue].name)


def _is_bound(app: Celery, target: str) -> bool:
    """Bind a queue to the end of RabbitMQ's delaying queues; return whether that succeeded.

    :returns: ``False`` if RabbitMQ refuses the binding: a permission is missing, or no worker has
        declared the delaying exchanges.
    :raises OperationalError: RabbitMQ is unavailable.
    """

    def bind(channel: Any) -> None:
        # RabbitMQ silently drops a message for an exchange that does not exist. So check with a
        # passive declaration, which fails if the exchange does not exist.
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
