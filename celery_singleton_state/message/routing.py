"""Which queue a message came through, and how to send another message into that queue alone.

Celery sends a retry where its message was sent to: to the same exchange with the same routing key.
That is wrong in three cases, so this package names the queue instead:

- The exchange gives each worker a copy (fanout), or two queues have one binding in common. Each
  copy that is sent again would come back as several copies.
- RabbitMQ has delayed the message. Its exchange is then one of the delaying exchanges, its routing
  key begins with the delay in binary digits, and Celery sends the retry to the default queue.
- The message came through another queue than the default one, on an exchange of another type.
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

#: Begins the routing key of a delayed message that is for one queue alone.
_FOR_QUEUE = "celery-singleton:"
#: The longest that leaves room for the delay in front of it.
_LONGEST_KEY = 255 - 56


def broker_kind(app: Celery) -> str:
    """The kind of the app's broker, in kombu's words: ``amqp`` for RabbitMQ, ``redis``, ..."""
    return str(broker_of(app).transport.driver_type)


def came_through_fanout(app: Celery, request: Context) -> bool:
    """Whether the exchange of a message gives a copy of it to each worker.

    It is known from the queues in the app's configuration.
    """
    exchange = _delivered(request)[0]
    return any(
        found.type == "fanout"
        for queue in app.amqp.queues.values()
        for found, _ in _bindings(queue)
        if exchange and found.name == exchange
    )


def is_copy(app: Celery, request: Context) -> bool:
    """Whether a message is one of several copies that a fanout exchange made, also if it was sent
    again since.
    """
    return bool(count_in(request, COPY)) or came_through_fanout(app, request)


def copy_mark(app: Celery, request: Context) -> dict[str, int]:
    """The header by which a copy is recognised when it comes again through another exchange."""
    return {COPY: 1} if is_copy(app, request) else {}


def can_be_addressed(app: Celery, request: Context) -> bool:
    """Whether a message can be sent into the queue of this one, and into no other."""
    return broker_kind(app) == "amqp" or not came_through_fanout(app, request)


def queue_of(app: Celery, request: Context) -> str | None:
    """The name of the queue that a message came through; ``None`` if it is not known.

    If several queues of this worker match, each copy of the message goes into the same one.
    """
    exchange, routing_key = _delivered(request)
    if exchange == "" and routing_key:
        return routing_key  # the default exchange takes a queue's name
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
    """Options that send a message where this one came from, as JSON can keep them.

    ``apply_async`` takes them after :func:`resolved`. With a fanout exchange whose queues cannot be
    addressed, they send to the exchange.
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
        return options  # where Celery sends the task's messages
    return options | {name: info[name] for name in ("exchange", "routing_key") if name in info}


def resolved(app: Celery, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of :func:`address_of`, with the queue addressed by its name alone.

    A fanout exchange is declared: a process of kombu's takes one that it does not know for direct.
    """
    name = options.get("queue")
    if isinstance(name, str):
        return {**options, **into(app, name)}
    if options.get("exchange_type") == "fanout":
        return {**options, "declare": [Exchange(options["exchange"], type="fanout")]}
    return dict(options)


def delayed_key(name: str) -> str:
    """The routing key of a delayed message that is for the queue of this name: one word."""
    key = _FOR_QUEUE + quote(name, safe="").replace(".", "%2E")
    if len(key) <= _LONGEST_KEY:
        return key
    return _FOR_QUEUE + hashlib.sha256(name.encode()).hexdigest()


def into(app: Celery, name: str) -> dict[str, Any]:
    """Options that send a message into the queue of this name through the default exchange.

    A queue that is not in the app's configuration is not declared: how is not known.
    """
    queues: Any = app.amqp.queues
    by_name = {queue.name: queue for queue in queues.values()}
    queue = by_name.get(name) or undeclared(name)
    return {"queue": queue, "exchange": "", "routing_key": name, "exchange_type": "direct"}


def undeclared(name: str) -> Queue:
    """A queue that is addressed by its name, and taken to be there."""
    return Queue(name, Exchange(""), no_declare=True)


def _delivered(request: Context) -> tuple[str | None, str]:
    """The exchange and the routing key of a message before it was delayed.

    The exchange is ``None`` if the message was delayed, because nothing keeps it.
    """
    info: Mapping[str, Any] = request.delivery_info or {}
    exchange, routing_key = info.get("exchange") or "", info.get("routing_key") or ""
    if DELAYING_EXCHANGE.fullmatch(exchange):
        while DELAY.match(routing_key):
            routing_key = DELAY.sub("", routing_key, count=1)
        return None, routing_key
    return exchange, routing_key


def _bindings(queue: Any) -> Iterator[tuple[Exchange, str]]:
    if queue.exchange:  # an unnamed one is the default exchange
        yield queue.exchange, queue.routing_key or ""
    for each in queue.bindings or ():
        yield each.exchange, each.routing_key or ""


def _leads(bound: tuple[Exchange, str], exchange: str | None, routing_key: str) -> bool:
    """Whether a binding leads a message of this exchange and routing key to its queue."""
    found, key = bound
    if exchange is None:
        if found.type == "direct":
            return False  # RabbitMQ does not delay for these
    elif found.name != exchange:
        return False
    if found.type == "topic":
        return _topic(key).fullmatch(f".{routing_key}") is not None
    return found.type in ("fanout", "headers") or key == routing_key


def _topic(key: str) -> re.Pattern[str]:
    """A pattern for the routing keys that a binding of a topic exchange takes.

    The routing key has one more dot in front of it, so that each word has one.
    """
    wildcards = {"*": r"\.[^.]*", "#": r"(?:\.[^.]*)*"}
    return re.compile("".join(wildcards.get(w, rf"\.{re.escape(w)}") for w in key.split(".")))
