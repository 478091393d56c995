"""Use Celery's signals to record that messages which end without a run have left the queue.

With ``enqueue_once`` the singleton's row names the message that is queued.
:meth:`SingletonTask.__call__ <celery_singleton_state.SingletonTask>` updates the row for every
message that reaches it. This module updates the row for the messages that do not reach it:

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

#: Requests that this module ignores, because the delivery itself records that the message is no
#: longer queued, or because this module has recorded it already.
_settled: weakref.WeakSet[Context] = weakref.WeakSet()


def watch_for_dropped() -> None:
    """Connect this module to Celery's signals, in this process and in the processes it forks."""
    signals.task_revoked.connect(dequeue_dropped)
    signals.task_rejected.connect(dequeue_rejected)
    signals.task_failure.connect(dequeue_failed)
    signals.task_internal_error.connect(dequeue_failed)
    signals.task_postrun.connect(dequeue_unreached)


def settle(request: Context) -> None:
    """Have this module ignore a message, because it has reached ``SingletonTask.__call__``.

    The task itself then records that the message is no longer queued.
    """
    _settled.add(request)


def dequeue_dropped(sender: Any, request: Context, **_: Any) -> None:
    """Record that a message is no longer queued, because a worker has dropped it.

    A worker drops a message because it was revoked or because it has expired. Celery's signal
    ``task_revoked`` calls this function.
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
    """Record that a message is no longer queued, because a worker has refused it.

    A worker refuses a message that it cannot decode. Celery's signal ``task_rejected`` calls this
    function.
    """
    headers = message.headers or {}
    app: Celery = sender.app
    task = app.tasks.get(headers.get("task", ""))
    options = options_of(task)
    if options is None or not options.enqueue_once:
        return
    try:
        args, kwargs = message.payload[:2] if options.unique_on is not None else ((), {})
    except Exception as error:  # the arguments cannot be decoded, so the row's key is not known
        logger.warning(
            "task %s[%s] was refused by a worker, but may still count as queued: %s",
            task,
            headers.get("id"),
            error,
        )
        return
    dequeue_dropped(task, Context(id=headers.get("id"), args=args, kwargs=kwargs))


def dequeue_failed(sender: Any, task_id: str, args: Any, kwargs: Any, **_: Any) -> None:
    """Record that a message is no longer queued, because it failed before its task was called.

    Celery's signals ``task_failure`` and ``task_internal_error`` call this function.
    """
    if options_of(sender) is None:
        return
    request = sender.request
    if request.id != task_id:
        request = Context(id=task_id, args=args, kwargs=kwargs)
    dequeue_dropped(sender, request)


def dequeue_unreached(sender: Any, task_id: str, state: str, retval: Any, **_: Any) -> None:
    """Record that a message is no longer queued, because it ended before its task was called.

    A message that is retried or requeued stays queued. Celery's signal ``task_postrun`` calls this
    function.
    """
    if options_of(sender) is None or sender.request.id != task_id or state == states.RETRY:
        return
    if not (isinstance(retval, Reject) and getattr(retval, "requeue", False)):
        dequeue_dropped(sender, sender.request)
