"""The headers in which a message carries what this package knows about it."""

from __future__ import annotations

from typing import Any

from celery.app.task import Context

#: How often the message was requeued because its own run went on.
PUT_BACK = "singleton_put_back"
#: Marks a message that this package sent again, as it is; says for which try, from 1.
SENT_AGAIN = "singleton_sent_again"
#: Seconds that the message has waited for the lease.
WAITED = "singleton_waited"
#: How often this package retried the message.
RETRIES = "singleton_retries"
#: How often the message was requeued because its run had ended a moment before.
UNRECORDED = "singleton_unrecorded"
#: A value by which a message is told from others that were sent with the same id.
SENT = "singleton_sent"
#: The schedule entry whose tick the message is for.
ENTRY = "singleton_entry"
#: The due time of that tick, in ISO format.
DUE = "singleton_due"
#: The due time of the tick of that entry which was sent before, in ISO format.
PREVIOUS = "singleton_previous"
#: Marks a tick whose entry sends the next one when this one has ended, so that it is not skipped.
ONE_BY_ONE = "singleton_one_by_one"


def header(request: Context, name: str, default: Any = None) -> Any:
    """The value of one of this package's headers.

    Celery shows a message's custom headers as ``request.headers``, unless the message has a header
    with that very name, in which some tracing tools keep theirs. Celery then shows only the content
    of that header; all headers are attributes of the request nevertheless.

    :param default: the value of a header that the message does not have.
    """
    value = request.__dict__.get(name)
    if value is None:
        value = (request.headers or {}).get(name)
    return default if value is None else value


def count_in(request: Context, name: str) -> int:
    """The value of a header that counts; 0 if the message does not have it."""
    return int(header(request, name) or 0)


def try_of(retries: int | None) -> int:
    """The number of a message's try, from 1."""
    return (retries or 0) + 1


def custom_headers(request: Context) -> dict[str, Any]:
    """All custom headers of a message, for the message that is sent in its place."""
    shown: Any = request
    hidden = shown._get_custom_headers(request.__dict__) or {}
    return {**(request.headers or {}), **hidden}
