"""Keep the results of runs in the history, for redelivered messages.

A process can die after its run has saved the state, but before Celery has stored the result and
sent the callbacks. The broker then redelivers the message. The run is not repeated. The second
delivery ends with the result from the history, so that callbacks, chain and chord go on with it.
"""

from __future__ import annotations

import base64
from typing import Any

from celery import states
from celery.app.task import Context
from kombu.serialization import dumps, loads

from celery_singleton_state.history import Kept
from celery_singleton_state.text.visible import logger_of

from .delivery import Delivery

logger = logger_of(__name__)

#: The largest number of characters of a serialized result that is kept in the history.
MAX_RESULT_LENGTH = 1024
#: The encoding that a kept result names if its serializer returned bytes: the bytes are kept as
#: base64 text.
BASE64 = "base64"


def keep(delivery: Delivery, result: Any) -> Kept | None:
    """Return a body's result for the history, serialized as the app serializes results.

    :returns: ``None`` if neither a result backend nor a callback needs the result, if the result is
        too large, or if it cannot be serialized.
    """
    request = delivery.request
    if not delivery.deduplicates or not delivery.is_message:
        return None
    if not is_awaited(delivery.task, request):
        return None
    try:
        if hasattr(result, "__len__") and len(result) > MAX_RESULT_LENGTH:
            return None  # the serialized text would be at least as long, and so too long
        return _serialize(result, delivery.task.app.conf.result_serializer)
    except Exception as error:  # a serializer can raise anything, and the run has succeeded
        logger.debug(
            "singleton %s: the result is not kept in the history: %s", delivery.name, error
        )
        return None


def _serialize(result: Any, serializer: str) -> Kept | None:
    content_type, encoding, payload = dumps(result, serializer=serializer)
    if isinstance(payload, bytes):
        text, encoding = base64.b64encode(payload).decode(), BASE64
    else:
        text = str(payload)
        text.encode()  # raises for a lone surrogate, which no database can store
    return Kept(content_type, encoding, text) if len(text) <= MAX_RESULT_LENGTH else None


def restore(task: Any, kept: Kept) -> Any:
    """Return the result that the history has kept.

    :raises Exception: the app no longer accepts the serializer, or the text cannot be decoded.
    """
    is_binary = kept.encoding == BASE64
    return loads(
        base64.b64decode(kept.text) if is_binary else kept.text,
        kept.content_type,
        "binary" if is_binary else kept.encoding,
        accept=task.backend.accept,
    )


def is_awaited(task: Any, request: Context) -> bool:
    """Whether a result backend, a callback or the rest of a chain needs the run's result.

    A chord needs it, too, by way of the result backend.
    """
    return continues(request) or is_recorded(task, request)


def continues(request: Context) -> bool:
    """Whether Celery sends callbacks or the rest of a chain when the task has succeeded."""
    return bool(request.callbacks or request.chain)


def is_recorded(task: Any, request: Context) -> bool:
    """Whether Celery stores the task's result in a result backend that others can read."""
    # Read the message's own value from ``__dict__``: the attribute of Celery's request class has a
    # default, which would hide that the message has none.
    ignored = request.__dict__.get("ignore_result")
    if task.ignore_result if ignored is None else ignored:
        return False
    return bool(getattr(task.backend, "persistent", False))


def has_result(task: Any, task_id: str | None) -> bool:
    """Whether the result backend has a final state for a task id."""
    try:
        return task.AsyncResult(task_id).state in states.READY_STATES
    except Exception:  # without an answer from the backend, act as if there were no result
        return False
