"""Results that are kept with the history.

A process can die after its run was saved and before Celery recorded the result and sent what comes
next. The broker gives the message out again then. The run is not repeated, and the second copy ends
with the kept result, so that callbacks, chain and chord go on with it.
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

#: Characters of a serialized result that is kept.
MAX_RESULT_LENGTH = 1024
BASE64 = "base64"


def keep(delivery: Delivery, result: Any) -> Kept | None:
    """The result of a body, as the app serializes results, for the history.

    :returns: ``None`` if nobody can ask for it, or if it is too large or cannot be serialized.
    """
    request = delivery.request
    if not delivery.deduplicates or not delivery.is_message:
        return None
    if not is_awaited(delivery.task, request):
        return None
    try:
        if hasattr(result, "__len__") and len(result) > MAX_RESULT_LENGTH:
            return None  # serializing it would only cost time
        return _serialize(result, delivery.task.app.conf.result_serializer)
    except Exception as error:  # a serializer calls the code of users, and this run has succeeded
        logger.debug("singleton %s: its result is not kept: %s", delivery.name, error)
        return None


def _serialize(result: Any, serializer: str) -> Kept | None:
    content_type, encoding, payload = dumps(result, serializer=serializer)
    if isinstance(payload, bytes):
        text, encoding = base64.b64encode(payload).decode(), BASE64
    else:
        text = str(payload)
        text.encode()  # half an emoji could not be stored
    return Kept(content_type, encoding, text) if len(text) <= MAX_RESULT_LENGTH else None


def restore(task: Any, kept: Kept) -> Any:
    """The value of a kept result.

    :raises Exception: the app does not accept its serializer any more, or it cannot be read.
    """
    is_binary = kept.encoding == BASE64
    return loads(
        base64.b64decode(kept.text) if is_binary else kept.text,
        kept.content_type,
        "binary" if is_binary else kept.encoding,
        accept=task.backend.accept,
    )


def is_awaited(task: Any, request: Context) -> bool:
    """Whether anything comes after the run that needs its result: somebody who asks the result
    backend, callbacks, or the rest of a chain. (A chord asks the backend.)
    """
    return continues(request) or is_recorded(task, request)


def continues(request: Context) -> bool:
    """Whether Celery sends more messages when the task has succeeded."""
    return bool(request.callbacks or request.chain)


def is_recorded(task: Any, request: Context) -> bool:
    """Whether Celery records the task's result where it can be found again."""
    # The message's own word, if it has one; Celery's class for requests has a default of its own.
    ignored = request.__dict__.get("ignore_result")
    if task.ignore_result if ignored is None else ignored:
        return False
    return bool(getattr(task.backend, "persistent", False))


def has_result(task: Any, task_id: str | None) -> bool:
    """Whether the result backend says that a message has ended."""
    try:
        return task.AsyncResult(task_id).state in states.READY_STATES
    except Exception:  # a result backend that cannot tell is as good as none
        return False
