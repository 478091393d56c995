"""The headers in which a message carries what this package knows about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from celery.app.task import Context

from .compat import custom_attributes

#: What all names begin with.
PREFIX = "singleton_"
#: How often the message was requeued because its own run went on.
REQUEUED = "singleton_requeued"
#: Marks a message that this package sent again, as it is.
SENT_AGAIN = "singleton_sent_again"
#: Seconds that the message has waited for the lease.
WAITED = "singleton_waited"
#: The id of the task that this message replaces, wholly or in part, by ``self.replace()``.
REPLACES = "singleton_replaces"
#: Seconds that it had waited when it became the next in line.
NEXT_SINCE = "singleton_next_since"
#: How often this package retried the message.
RETRIES = "singleton_retries"
#: How often the message was requeued because its run had ended a moment before.
UNRECORDED = "singleton_unrecorded"
#: The message's rank among those that replace each other.
RANK = "singleton_rank"
#: When the message was sent, by the clock of a host that the value names.
SENT_AT = "singleton_sent_at"
#: A value by which a message is told from others that were sent with the same id.
SENT = "singleton_sent"
#: Seconds that the message was to wait in all when it was sent again or retried.
PAUSE = "singleton_pause"
#: Seconds that the message has still to wait when it comes, because no delay is as long.
PAUSE_LEFT = "singleton_pause_left"
#: Marks a message that is one of several copies that a fanout exchange made.
COPY = "singleton_copy"
#: The schedule entry whose tick the message is for.
ENTRY = "singleton_entry"
#: The due time of that tick, in ISO format.
DUE = "singleton_due"
#: The due time of the tick of that entry which was sent before, in ISO format.
PREVIOUS = "singleton_previous"
#: Marks a tick whose entry sends the next one when this one has ended, so that it is not skipped.
ONE_BY_ONE = "singleton_one_by_one"

#: What is said of one try of a message, and not of its retries.
OF_ONE_TRY = frozenset({WAITED, NEXT_SINCE, REQUEUED, UNRECORDED})

#: All headers of this package.
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

#: The header in which some tracing tools put a copy of their own headers, and some also the
#: message's. Celery then shows only its content as ``request.headers``.
INNER = "headers"

#: Names, in lower case, of headers that tracing tools add to a message, and how others begin.
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
#: How names of headers begin in which RabbitMQ notes what became of one delivery. A broker that
#: finds them on a new message takes it for one that goes round in circles.
_BROKERS_PREFIXES = (
    "x-acquired-count",
    "x-death",
    "x-delivery-count",
    "x-first-death-",
    "x-last-death-",
)


def header(request: Context, name: str, default: Any = None) -> Any:
    """The value of one of this package's headers.

    All headers of a message are attributes of its request. They come first: each sending sets them,
    where a copy in an inner header may be from an earlier sending.

    :param default: the value of a header that the message does not have.
    """
    value = request.__dict__.get(name)
    if value is None and request.headers:
        value = _shown(request).get(name)
    return default if value is None else value


def count_in(request: Context, name: str) -> int:
    """The value of a header that counts; 0 if the message does not have it."""
    return int(header(request, name) or 0)


def own_headers(request: Context) -> dict[str, Any]:
    """The headers of this package that a message has; of each name the value of :func:`header`."""
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
    """All custom headers of a message, for the message that is sent in its place.

    A body finds the same ``request.headers`` when the message comes again: what only an inner
    header has stays there. This package's own are never left there, where they would be old.
    """
    shown = _kept(_shown(request))
    made = _on_top(request, shown) | own_headers(request)
    inner = {name: value for name, value in shown.items() if name not in OWN}
    if request.is_eager or inner.keys() <= made.keys():
        # Celery shows all of them, without an inner header.
        return inner | made
    return made | {INNER: inner}


def without_moves(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The headers without those in which RabbitMQ notes how it has moved the message."""
    return {
        name: value
        for name, value in headers.items()
        if not str(name).startswith(_BROKERS_PREFIXES)
    }


def is_of_tool(name: object) -> bool:
    """Whether a header is one that tracing tools add to a message."""
    lower = str(name).lower()
    return lower in _TOOLS or lower.startswith(_TOOLS_PREFIXES)


def names_in(headers: Mapping[str, Any]) -> Iterator[str]:
    """The names of all headers, of those in an inner header, too."""
    for name, value in headers.items():
        if name == INNER and isinstance(value, Mapping):
            yield from names_in(value)
        else:
            yield name


def _shown(request: Context) -> Mapping[str, Any]:
    """The headers that Celery shows."""
    shown: Any = request.headers
    return shown if isinstance(shown, Mapping) else {}


def _on_top(request: Context, shown: Mapping[str, Any]) -> dict[str, Any]:
    """The custom headers that are attributes of the request.

    Other attributes were put there by somebody in this process. Where nothing is hidden they are
    not taken for headers, and never what a message cannot carry.
    """
    found = _kept(custom_attributes(request))
    if any(name not in found or is_of_tool(name) for name in shown):
        return {name: value for name, value in found.items() if name in shown or _is_plain(value)}
    return {name: value for name, value in found.items() if name in shown}


def _is_plain(value: Any) -> bool:
    """Whether a message of any broker can carry it."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(part) for name, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _kept(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Headers as they are sent again: without an inner one and without what the broker added."""
    return {
        name: _once_each(value) if name == "baggage" else value
        for name, value in without_moves(headers).items()
        if name != INNER
    }


def _once_each(baggage: Any) -> Any:
    """The header ``baggage`` with each of its members once, the newest.

    Some tools append all of theirs at each sending, without end.
    """
    if not isinstance(baggage, str):
        return baggage
    members = {member.partition("=")[0].strip(): member for member in baggage.split(",")}
    return ",".join(members.values())
