"""Remove the ``enqueue_once`` claim of a message that ends before a run, by Celery's signals.

:meth:`SingletonTask.__call__ <celery_singleton_state.SingletonTask>` removes the claim of every
message that reaches it. This module handles the messages that do not reach it:

- A worker drops the message because it was revoked or has expired.
- A worker cannot decode the message, or refuses it because its ``eta`` is not a time.
- ``before_start``, or a ``__call__`` of the user's own, raises an error.
- The process dies, or is killed at the hard time limit, before the message has acquired the lease.
"""

from __future__ import annotations

import weakref
from typing import Any

from celery import Celery, signals, states
from celery.app.task import Context
from celery.exceptions import Reject

from celery_singleton_state.config.options import options_of
from celery_singleton_state.text.visible import logger_of

from .enqueue_once import dequeue

logger = logger_of(__name__)

#: Requests that need nothing more from this module: their delivery removes the claim, or this
#: module has removed it.
_settled: weakref.WeakSet[Context] = weakref.WeakSet()


def watch_for_dropped() -> None:
    """Connect this module to Celery's signals, in this process and in the processes it forks."""
    signals.task_revoked.connect(dequeue_dropped)
    signals.task_rejected.connect(dequeue_rejected)
    signals.task_failure.connect(dequeue_failed)
    signals.task_internal_error.connect(dequeue_failed)
    signals.task_postrun.connect(dequeue_unreached)


def settle(request: Context) -> None:
    """Note that a message has reached ``SingletonTask.__call__``, which removes its claim."""
    _settled.add(request)


def dequeue_dropped(sender: Any, request: Context, **_: Any) -> None:
    """Remove the claim of a message that a worker dropped, as a receiver of ``task_revoked``.

    A worker drops a message because it was revoked or because it has expired.
    """
    options = options_of(sender)
    if options is None or not options.enqueue_once or request in _settled:
        return
    _settled.add(request)
    try:
        dequeue(sender._delivery(request, tuple(request.args or ()), request.kwargs or {}))
    except Exception as error:  # unique_on is the user's code and can raise anything
        logger.warning(
            "task %s[%s] ended without a run, but may still count as queued: %s",
            sender.name,
            request.id,
            error,
        )


def dequeue_rejected(sender: Any, message: Any, **_: Any) -> None:
    """Remove the claim of a message that a worker refused, as a receiver of ``task_rejected``."""
    headers = message.headers or {}
    app: Celery = sender.app
    task = app.tasks.get(headers.get("task", ""))
    options = options_of(task)
    if options is None or not options.enqueue_once:
        return
    try:
        args, kwargs = message.payload[:2] if options.unique_on is not None else ((), {})
    except Exception as error:  # without its arguments the key of its claim is not known
        logger.warning(
            "task %s[%s] was refused by a worker, but may still count as queued: %s",
            task,
            headers.get("id"),
            error,
        )
        return
    dequeue_dropped(task, Context(id=headers.get("id"), args=args, kwargs=kwargs))


def dequeue_failed(sender: Any, task_id: str, args: Any, kwargs: Any, **_: Any) -> None:
    """Remove the claim of a message that failed before ``SingletonTask.__call__`` saw it.

    It is a receiver of ``task_failure`` and ``task_internal_error``.
    """
    if options_of(sender) is None:
        return
    request = sender.request
    if request.id != task_id:
        request = Context(id=task_id, args=args, kwargs=kwargs)
    dequeue_dropped(sender, request)


def dequeue_unreached(sender: Any, task_id: str, state: str, retval: Any, **_: Any) -> None:
    """Remove the claim of a message that ended before ``SingletonTask.__call__`` saw it.

    It is a receiver of ``task_postrun``. A message that is retried or requeued keeps its claim.
    """
    if options_of(sender) is None or sender.request.id != task_id or state == states.RETRY:
        return
    if not (isinstance(retval, Reject) and getattr(retval, "requeue", False)):
        dequeue_dropped(sender, sender.request)
