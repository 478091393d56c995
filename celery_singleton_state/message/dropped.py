"""Messages that end without reaching a run: Celery's signals say so, and they are queued no more.

What happens within :meth:`SingletonTask.__call__ <celery_singleton_state.SingletonTask>` that
method sees to itself. Here is what ends a message before, or without its process:

- a worker drops it because it was revoked or has expired,
- a worker cannot read it, or does not take it (its ``eta`` is no time),
- ``before_start``, or a ``__call__`` of the user's own, raises,
- its process dies, or its hard time limit ends it, before it has the lease.
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

#: Requests whose own delivery sees to their end, or whose end was seen to.
_settled: weakref.WeakSet[Context] = weakref.WeakSet()


def watch_for_dropped() -> None:
    """Follow Celery's signals in this process and in those that it forks."""
    signals.task_revoked.connect(dequeue_dropped)
    signals.task_rejected.connect(dequeue_rejected)
    signals.task_failure.connect(dequeue_failed)
    signals.task_internal_error.connect(dequeue_failed)
    signals.task_postrun.connect(dequeue_unreached)


def settle(request: Context) -> None:
    """Note that a message has reached its delivery, which sees to its end."""
    _settled.add(request)


def dequeue_dropped(sender: Any, request: Context, **_: Any) -> None:
    """A message that a worker drops, as it was revoked or has expired, is queued no more."""
    options = options_of(sender)
    if options is None or not options.enqueue_once or request in _settled:
        return
    _settled.add(request)
    try:
        dequeue(sender._delivery(request, tuple(request.args or ()), request.kwargs or {}))
    except Exception as error:  # its arguments, or what unique_on makes of them, can be anything
        logger.warning("task %s[%s] may count as queued: %s", sender.name, request.id, error)


def dequeue_rejected(sender: Any, message: Any, **_: Any) -> None:
    """A message that a worker cannot read is queued no more."""
    headers = message.headers or {}
    app: Celery = sender.app
    task = app.tasks.get(headers.get("task", ""))
    options = options_of(task)
    if options is None or not options.enqueue_once:
        return
    try:
        args, kwargs = message.payload[:2] if options.unique_on is not None else ((), {})
    except Exception as error:  # what cannot be read has arguments that are not known
        logger.warning("task %s[%s] may count as queued: %s", task, headers.get("id"), error)
        return
    dequeue_dropped(task, Context(id=headers.get("id"), args=args, kwargs=kwargs))


def dequeue_failed(sender: Any, task_id: str, args: Any, kwargs: Any, **_: Any) -> None:
    """A message that fails outside its delivery is queued no more."""
    if options_of(sender) is None:
        return
    request = sender.request
    if request.id != task_id:
        request = Context(id=task_id, args=args, kwargs=kwargs)
    dequeue_dropped(sender, request)


def dequeue_unreached(sender: Any, task_id: str, state: str, retval: Any, **_: Any) -> None:
    """A message that ended before its delivery is queued no more, unless it comes again."""
    if options_of(sender) is None or sender.request.id != task_id or state == states.RETRY:
        return
    if not (isinstance(retval, Reject) and getattr(retval, "requeue", False)):
        dequeue_dropped(sender, sender.request)
