"""Find the queue that a message came from, and send another message into that queue only.

Celery sends a retry to the exchange of its message, with the same routing key. That is wrong in
three cases, so this package sends to the queue by its name instead:

- The exchange gives each worker a copy (fanout), or two queues have the same binding. Each copy
  that is sent again would come back as several copies.
- RabbitMQ has delayed the message. Its exchange is then one of the delaying exchanges, its routing
  key begins with the delay in binary digits, and Celery sends the retry to the default queue.
- The message came from a queue that is not the default one, through an exchange of another type.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

from celery import Celery
from celery.app.task import Context
from kombu import Exchange, Queue

from celery_singleton_state.compat import DELAY, DELAYING_EXCHANGE, broker_of
from celery_singleton_state.headers import COPY, count_in

#: The prefix of the routing key with which RabbitMQ delays a message for one queue only.
_FOR_QUEUE = "celery-singleton:"
#: The largest number of characters of the routing key with which RabbitMQ delays a message for one
#: queue. AMQP allows 255, and the delay takes up to 56 characters in front of the key.
_LONGEST_KEY = 255 - 56


def broker_kind(app: Celery) -> str:
    """Return kombu's name for the kind of the app's broker, such as ``amqp`` for RabbitMQ."""
    return str(broker_of(app).transport.driver_type)


def came_through_fanout(app: Celery, request: Context) -> bool:
    """Whether a message came through a fanout exchange, which gives a copy to each worker.

    The types of the exchanges are read from the queues in the app's configuration.
    """
    exchange = _delivered(request)[0]
    return any(
        found.type == "fanout"
        for queue in app.amqp.queues.values()
        for found, _ in _bindings(queue)
        if exchange and found.name == exchange
    )


def is_copy(app: Celery, request: Context) -> bool:
    """Whether a message is one of several copies that a fanout exchange made.

    The copy is recognised even after it was sent again through another exchange.
    """
    return bool(count_in(request, COPY)) or came_through_fanout(app, request)


def copy_mark(app: Celery, request: Context) -> dict[str, int]:
    """Return the header that marks a fanout exchange's copy when it is sent again.

    The dict is empty if the message is not such a copy.
    """
    return {COPY: 1} if is_copy(app, request) else {}


def can_be_addressed(app: Celery, request: Context) -> bool:
    """Whether another message can be sent into the queue of this message, and no other queue."""
    return broker_kind(app) == "amqp" or not came_through_fanout(app, request)


def queue_of(app: Celery, request: Context) -> str | None:
    """Return the name of the queue that a message came from; ``None`` if it is not known.

    If several queues of this worker match the message, the first match is returned.
    """
    exchange, routing_key = _delivered(request)
    if exchange == "" and routing_key:
        return routing_key  # the routing keys of the default exchange are queue names
    queues = app.amqp.queues
    if exchange is None and routing_key.startswith(_FOR_QUEUE):
        known_keys = {delayed_key(queue.name): str(queue.name) for queue in queues.values()}
        return known_keys.get(routing_key) or unquote(routing_key.removeprefix(_FOR_QUEUE))
    for known in (queues.consume_from, queues):
        for queue in known.values():
            if any(_leads(bound, exchange, routing_key) for bound in _bindings(queue)):
                return str(queue.name)
    named = {str(queue.name) for queue in queues.values()}
    return routing_key if exchange is None and routing_key in named else None


def address_of(app: Celery, request: Context) -> dict[str, Any]:
    """Return options that send another message into the queue of this message.

    The options can be stored as JSON. Pass them through :func:`resolved` before ``apply_async``. If
    the broker cannot address a single queue of a fanout exchange, the options address the
    exchange.
    """
    info: Mapping[str, Any] = request.delivery_info or {}
    priority = info.get("priority")
    options = {} if priority is None else {"priority": priority}
    if came_through_fanout(app, request) and not can_be_addressed(app, request):
        exchange, routing_key = _delivered(request)
        fanout = {"exchange": exchange, "routing_key": routing_key, "exchange_type": "fanout"}
        return options | fanout
    name = queue_of(app, request)
    if name is not None:
        return options | {"queue": name}
    if _delivered(request)[0] is None:
        return options  # without an address, Celery uses the task's usual queue
    return options | {name: info[name] for name in ("exchange", "routing_key") if name in info}


def resolved(app: Celery, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of :func:`address_of` as ``apply_async`` needs them.

    A queue is addressed by its name through the default exchange. A fanout exchange is declared
    with the message, because kombu treats an exchange that it does not know as a direct one.
    """
    name = options.get("queue")
    if isinstance(name, str):
        return {**options, **into(app, name)}
    if options.get("exchange_type") == "fanout":
        return {**options, "declare": [Exchange(options["exchange"], type="fanout")]}
    return dict(options)


def delayed_key(name: str) -> str:
    """Return the routing key with which RabbitMQ delays a message for one queue.

    The key contains no dot, so that a topic binding matches it as one word. A name that is too long
    is replaced by its hash.
    """
    key = _FOR_QUEUE + quote(name, safe="").replace(".", "%2E")
    if len(key) <= _LONGEST_KEY:
        return key
    return _FOR_QUEUE + hashlib.sha256(name.encode()).hexdigest()


def into(app: Celery, name: str) -> dict[str, Any]:
    """Return options that send a message into a queue by its name, through the default exchange.

    A queue that is not in the app's configuration is not declared, because its arguments are not
    known here.
    """
    queues: Any = app.amqp.queues
    by_name = {queue.name: queue for queue in queues.values()}
    queue = by_name.get(name) or undeclared(name)
    return {"queue": queue, "exchange": "", "routing_key": name, "exchange_type": "direct"}


def undeclared(name: str) -> Queue:
    """Return an object for an existing queue that Celery can send to, but does not declare."""
    return Queue(name, Exchange(""), no_declare=True)


def _delivered(request: Context) -> tuple[str | None, str]:
    """Return the exchange and the routing key with which a message was sent.

    If RabbitMQ has delayed the message, the delay is removed from the routing key. The exchange is
    then ``None``, because the delayed message does not name it any more.
    """
    info: Mapping[str, Any] = request.delivery_info or {}
    exchange, routing_key = info.get("exchange") or "", info.get("routing_key") or ""
    if DELAYING_EXCHANGE.fullmatch(exchange):
        while DELAY.match(routing_key):
            routing_key = DELAY.sub("", routing_key, count=1)
        return None, routing_key
    return exchange, routing_key


def _bindings(queue: Any) -> Iterator[tuple[Exchange, str]]:
    if queue.exchange:  # the default exchange has no name and no bindings
        yield queue.exchange, queue.routing_key or ""
    for each in queue.bindings or ():
        yield each.exchange, each.routing_key or ""


def _leads(bound: tuple[Exchange, str], exchange: str | None, routing_key: str) -> bool:
    """Whether a binding routes a message with this exchange and routing key to its queue.

    :param bound: the exchange and the routing key of the binding.
    :param exchange: the exchange of the message; ``None`` if it is not known.
    """
    found, key = bound
    if exchange is None:
        # An unknown exchange means that RabbitMQ has delayed the message. It never delays messages
        # for a direct exchange.
        if found.type == "direct":
            return False
    elif found.name != exchange:
        return False
    if found.type == "topic":
        return _topic(key).fullmatch(f".{routing_key}") is not None
    return found.type in ("fanout", "headers") or key == routing_key


def _topic(key: str) -> re.Pattern[str]:
    """Return a pattern that matches the routing keys that a topic binding accepts.

    Match it against the routing key with a dot in front, so that each word begins with a dot.
    """
    wildcards = {"*": r"\.[^.]*", "#": r"(?:\.[^.]*)*"}
    return re.compile("".join(wildcards.get(w, rf"\.{re.escape(w)}") for w in key.split(".")))
