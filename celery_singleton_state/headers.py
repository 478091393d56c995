"""The message headers of this package: their names, and how they are read and passed on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from celery.app.task import Context

from .compat import custom_attributes

#: The prefix of the names of all headers of this package.
PREFIX = "singleton_"
#: Header: how often the message was requeued because its run was still active in another process.
REQUEUED = "singleton_requeued"
#: Header: marks a message that this package has sent again unchanged.
SENT_AGAIN = "singleton_sent_again"
#: Header: seconds that the message has waited for the lease so far.
WAITED = "singleton_waited"
#: Header: the task id of the run that sent the message with ``self.replace()``.
REPLACES = "singleton_replaces"
#: Header: seconds that the message had waited for the lease when it became the next one in line for
#: the lease.
NEXT_SINCE = "singleton_next_since"
#: Header: how often this package itself has retried the message, to repeat a run that failed.
RETRIES = "singleton_retries"
#: Header: how often the message was requeued because its run had ended, but the result backend did
#: not have the result yet.
UNRECORDED = "singleton_unrecorded"
#: Header: the message's rank for ``on_conflict="replace"``. Of two messages, the newer one has the
#: larger rank.
RANK = "singleton_rank"
#: Header: the time when the message was sent, with a name for the clock of the sending host.
SENT_AT = "singleton_sent_at"
#: Header: a value that tells the message from other messages that have the same task id.
SENT = "singleton_sent"
#: Header: the whole delay, in seconds, of the last retry or requeue of the message.
PAUSE = "singleton_pause"
#: Header: the part of the delay, in seconds, that is still left when a worker receives the message.
#: It is set if the whole delay is longer than a message can be delayed at once.
PAUSE_LEFT = "singleton_pause_left"
#: Header: marks a message that a fanout exchange has copied into several queues.
COPY = "singleton_copy"
#: Header: the name of the schedule entry whose tick the message is for.
ENTRY = "singleton_entry"
#: Header: the due time, in ISO format, of the tick that the message is for.
DUE = "singleton_due"
#: Header: the due time, in ISO format, of the tick that beat sent before this message's tick, for
#: the same schedule entry.
PREVIOUS = "singleton_previous"
#: Header: marks a tick of a schedule entry with ``catch_up="all"``. Such a tick waits for the lease
#: and is never skipped, and beat sends the entry's next tick only when this tick has ended.
ONE_BY_ONE = "singleton_one_by_one"

#: The names of headers that describe a single try of a message. Retries of the message do not
#: inherit them.
OF_ONE_TRY = frozenset({WAITED, NEXT_SINCE, REQUEUED, UNRECORDED})

#: The names of all headers of this package.
OWN = frozenset(
    {
        REQUEUED,
        SENT_AGAIN,
        WAITED,
        NEXT_SINCE,
        RETRIES,
        REPLACES,
        UNRECORDED,
        RANK,
        SENT_AT,
        SENT,
        PAUSE,
        PAUSE_LEFT,
        COPY,
        ENTRY,
        DUE,
        PREVIOUS,
        ONE_BY_ONE,
    }
)

#: The name of the *inner header*: some tracing tools put a dict with copies of headers into a
#: header of this name. Celery then shows that dict alone as ``request.headers``.
INNER = "headers"

#: Names, in lower case, of headers that tracing tools add to messages.
_TOOLS = frozenset(
    {
        "b3",
        "baggage",
        "elasticapm",
        "newrelic",
        "traceparent",
        "tracestate",
        "uber-trace-id",
        "x-amzn-trace-id",
        "x-cloud-trace-context",
    }
)
#: Prefixes, in lower case, of the names of further headers that tracing tools add to messages.
_TOOLS_PREFIXES = (
    "dd-",
    "elastic-apm-",
    "ot-tracer-",
    "sentry-",
    "uberctx-",
    "x-b3-",
    "x-datadog-",
    "x-instana-",
    "x-newrelic-",
)
#: Prefixes of the names of headers in which RabbitMQ records how it has moved a message. Such
#: headers are removed from a message that is sent again. Otherwise RabbitMQ would count the earlier
#: moves, and could drop the message because it seems to move in a circle.
_BROKERS_PREFIXES = (
    "x-acquired-count",
    "x-death",
    "x-delivery-count",
    "x-first-death-",
    "x-last-death-",
)


def header(request: Context, name: str, default: Any = None) -> Any:
    """Return the value of one of this package's headers.

    Celery makes each header of a message an attribute of its request. The attribute is preferred to
    ``request.headers``, because ``request.headers`` can be an inner header (:data:`INNER`), which
    has values from an earlier sending.

    :param default: returned if the message does not have the header.
    """
    value = request.__dict__.get(name)
    if value is None and request.headers:
        value = _shown(request).get(name)
    return default if value is None else value


def count_in(request: Context, name: str) -> int:
    """Return the value of a header that is a count; 0 if the message does not have the header."""
    return int(header(request, name) or 0)


def own_headers(request: Context) -> dict[str, Any]:
    """Return this package's headers of a message as a dict, with the values of :func:`header`."""
    shown: Any = request.headers
    found = {}
    if isinstance(shown, Mapping):
        for name in OWN.intersection(shown):
            if shown[name] is not None:
                found[name] = shown[name]
    attributes = request.__dict__
    for name in OWN.intersection(attributes):
        if attributes[name] is not None:
            found[name] = attributes[name]
    return found


def custom_headers(request: Context) -> dict[str, Any]:
    """Return all custom headers of a message, for the new message that is sent in its place.

    The body must find the same ``request.headers`` in the new message. So if a tracing tool has put
    a header into an inner header (:data:`INNER`) only, the header stays in the inner header. This
    package's headers are moved out of the inner header, because a later sending does not update the
    inner header.
    """
    shown = _kept(_shown(request))
    made = _on_top(request, shown) | own_headers(request)
    inner = {name: value for name, value in shown.items() if name not in OWN}
    if request.is_eager or inner.keys() <= made.keys():
        # No inner header is needed: without one, Celery shows all headers as `request.headers`.
        return inner | made
    return made | {INNER: inner}


def without_moves(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message's headers, except those in which RabbitMQ records the message's moves."""
    return {
        name: value
        for name, value in headers.items()
        if not str(name).startswith(_BROKERS_PREFIXES)
    }


def is_of_tool(name: object) -> bool:
    """Whether a header's name is the name of a header that tracing tools add to messages."""
    lower = str(name).lower()
    return lower in _TOOLS or lower.startswith(_TOOLS_PREFIXES)


def names_in(headers: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of a message's headers.

    In place of the name of an inner header (:data:`INNER`), the names in it are yielded.
    """
    for name, value in headers.items():
        if name == INNER and isinstance(value, Mapping):
            yield from names_in(value)
        else:
            yield name


def _shown(request: Context) -> Mapping[str, Any]:
    """Return ``request.headers``, the headers that Celery shows; without them an empty dict."""
    shown: Any = request.headers
    return shown if isinstance(shown, Mapping) else {}


def _on_top(request: Context, shown: Mapping[str, Any]) -> dict[str, Any]:
    """Return the custom headers that are attributes of the request.

    User code can have set further attributes on the request, which are no headers. Usually
    ``request.headers`` names all headers, and only an attribute that it names is one. If the
    message has a header that is itself called ``headers`` (:data:`INNER`), ``request.headers`` is
    that header's value. Then each attribute counts as a header if a message can carry its value.

    :param shown: ``request.headers``.
    """
    found = _kept(custom_attributes(request))
    if any(name not in found or is_of_tool(name) for name in shown):
        return {name: value for name, value in found.items() if name in shown or _is_plain(value)}
    return {name: value for name, value in found.items() if name in shown}


def _is_plain(value: Any) -> bool:
    """Whether a message can carry this value as a header, whatever its broker."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(part) for name, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _kept(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers of a message that are kept when the message is sent again.

    An inner header (:data:`INNER`) and RabbitMQ's own headers are left out.
    """
    return {
        name: _once_each(value) if name == "baggage" else value
        for name, value in without_moves(headers).items()
        if name != INNER
    }


def _once_each(baggage: Any) -> Any:
    """Return the text of the W3C header ``baggage``, reduced to the last value of each member.

    Some tracing tools append all of their members each time the message is sent, so the header
    would grow with each retry.
    """
    if not isinstance(baggage, str):
        return baggage
    members = {member.partition("=")[0].strip(): member for member in baggage.split(",")}
    return ",".join(members.values())
