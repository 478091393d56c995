"""The message headers of this package: their names, and how they are read and passed on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from celery.app.task import Context

from .compat import custom_attributes

#: Prefix of the names of all headers of this package.
PREFIX = "singleton_"
#: How often the message was requeued because its run was still active in another process.
REQUEUED = "singleton_requeued"
#: Marks a message that this package has sent again unchanged.
SENT_AGAIN = "singleton_sent_again"
#: Seconds that the message has waited for the lease so far.
WAITED = "singleton_waited"
#: The task id of the run that sent this message by ``self.replace()``.
REPLACES = "singleton_replaces"
#: The value of ``singleton_waited`` when the message became the next one in line for the lease.
NEXT_SINCE = "singleton_next_since"
#: How often this package itself has retried the message, to repeat a run that failed.
RETRIES = "singleton_retries"
#: How often the message was requeued because its run had ended and the result backend did not have
#: the result yet.
UNRECORDED = "singleton_unrecorded"
#: The message's rank for ``on_conflict="replace"``: the message with the larger rank is newer.
RANK = "singleton_rank"
#: When the message was sent, and the host by whose clock.
SENT_AT = "singleton_sent_at"
#: A value that tells the message from other messages that were sent with the same task id.
SENT = "singleton_sent"
#: The whole delay, in seconds, with which the message was last retried or requeued.
PAUSE = "singleton_pause"
#: Seconds that the message has still to wait when a worker receives it. Set when the whole delay is
#: longer than the broker can delay a message at once.
PAUSE_LEFT = "singleton_pause_left"
#: Marks a message that a fanout exchange has copied into several queues.
COPY = "singleton_copy"
#: The schedule entry whose tick the message is for.
ENTRY = "singleton_entry"
#: The due time of the tick that the message is for, in ISO format.
DUE = "singleton_due"
#: The due time of the entry's previous tick that was sent, in ISO format.
PREVIOUS = "singleton_previous"
#: Marks a tick of an entry with ``catch_up="all"``: beat sends the entry's next tick when this one
#: has ended. Such a tick waits for the lease and is never skipped.
ONE_BY_ONE = "singleton_one_by_one"

#: Headers that describe one try of a message. Its retries do not inherit them.
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

#: The name of an inner header: some tracing tools put a dict with a copy of headers into a header
#: of this name. Celery then shows only that dict as ``request.headers``.
INNER = "headers"

#: Names, in lower case, of the headers that tracing tools add to messages; then prefixes of others.
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
#: Prefixes of the headers in which RabbitMQ records how it has moved a message. They are removed
#: from a message that is sent again, because RabbitMQ would count its earlier moves and could drop
#: it as a message that moves in a circle.
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
    ``request.headers``, because that can be an inner header with values from an earlier sending.

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
    """Return this package's headers of a message by name, with the values of :func:`header`."""
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
    """Return all custom headers of a message, for the message that is sent in its place.

    The body finds the same ``request.headers`` in that message. Therefore a header that is only in
    an inner header stays there. This package's headers are moved out of the inner header, because
    later sendings do not update it.
    """
    shown = _kept(_shown(request))
    made = _on_top(request, shown) | own_headers(request)
    inner = {name: value for name, value in shown.items() if name not in OWN}
    if request.is_eager or inner.keys() <= made.keys():
        # No inner header is needed: Celery shows all headers as `request.headers`.
        return inner | made
    return made | {INNER: inner}


def without_moves(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers without those in which RabbitMQ records how it has moved the message."""
    return {
        name: value
        for name, value in headers.items()
        if not str(name).startswith(_BROKERS_PREFIXES)
    }


def is_of_tool(name: object) -> bool:
    """Whether a header has the name of a header that tracing tools add to messages."""
    lower = str(name).lower()
    return lower in _TOOLS or lower.startswith(_TOOLS_PREFIXES)


def names_in(headers: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of all headers, including those within an inner header."""
    for name, value in headers.items():
        if name == INNER and isinstance(value, Mapping):
            yield from names_in(value)
        else:
            yield name


def _shown(request: Context) -> Mapping[str, Any]:
    """Return ``request.headers``; an empty dict if it is not a dict."""
    shown: Any = request.headers
    return shown if isinstance(shown, Mapping) else {}


def _on_top(request: Context, shown: Mapping[str, Any]) -> dict[str, Any]:
    """Return the custom headers that are attributes of the request.

    User code can have set attributes of its own on the request. If Celery shows all headers, an
    attribute that it does not show is not a header. If an inner header hides some of them, such an
    attribute counts as a header when a message can carry its value.

    :param shown: the headers that Celery shows.
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
    """Return headers as they are sent again: without an inner header and without the broker's."""
    return {
        name: _once_each(value) if name == "baggage" else value
        for name, value in without_moves(headers).items()
        if name != INNER
    }


def _once_each(baggage: Any) -> Any:
    """Return the value of the W3C header ``baggage`` with the newest of each member only.

    Some tracing tools append all of their members at each sending, so that the header would grow
    with each retry.
    """
    if not isinstance(baggage, str):
        return baggage
    members = {member.partition("=")[0].strip(): member for member in baggage.split(",")}
    return ",".join(members.values())
