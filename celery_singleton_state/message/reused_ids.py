"""Messages that are sent anew with an id that was used before.

``apply_async(task_id="nightly-import")`` sends another message each day, all with one id. A copy
of a message, from a broker or from a retry, has that id, too. So a message whose sender chose the
id also carries a value of its own, which stays with the message however often it is delivered,
sent again or retried, and which the history keeps with the run. A message with the same id and
another value is new work.

A message that a task sends carries a value that follows from that task's own message: a task
that runs a second time, because its process died, sends a copy and no new message.

Messages of ``send_task`` and of other clients carry no such value. Their id alone tells them apart.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from celery import states
from celery.app.task import Context
from celery.canvas import chord

from celery_singleton_state.compat import Chain
from celery_singleton_state.headers import DUE, REQUEUED, SENT, SENT_AGAIN, header
from celery_singleton_state.text.visible import logger_of

from .delivery import Delivery
from .results import is_recorded

logger = logger_of(__name__)

#: What only messages have that go on with something: their ids were given to them by Celery, and
#: are to be recognised.
_CONTINUES = ("retries", "chain", "chord", "group_id", "root_id", "parent_id")
#: Values of messages whose sending failed, of which nobody knows whether they were sent.
_unsure: dict[tuple[str, str], str] = {}
MAX_UNSURE = 10_000
#: Tasks of which this process has warned.
_warned: set[str] = set()


def marking(task: Any, task_id: str | None, send: Callable[..., Any]) -> Callable[..., Any]:
    """Have a message carry a value of its own, if it needs one.

    A sender that gets an error does not know whether the message was sent, and may try again: that
    is the same message.

    :param task_id: the id that the sender chose; ``None``: Celery makes one, and it is new.
    :param send: Celery's own ``apply_async``; returned as it is, or wrapped.
    """
    if not task_id:
        return send

    def send_marked(*args: Any, **options: Any) -> Any:
        headers = options.get("headers") or {}
        continues = any(options.get(name) for name in _CONTINUES)
        if continues or SENT in headers or DUE in headers:
            inherited = {} if SENT in headers else _value_of_replaced(task, task_id)
            more = {"headers": {**headers, **inherited}} if inherited else {}
            return send(*args, **options | more)
        value = _value_from_sender(task) or _unsure.pop((task.name, task_id), None)
        if value is None:
            value = str(uuid.uuid4())
            _forget(task, task_id, options.get("ignore_result"))
        try:
            return send(*args, **options | {"headers": {**headers, SENT: value}})
        except BaseException:
            if len(_unsure) >= MAX_UNSURE:
                _unsure.clear()
            _unsure[task.name, task_id] = value
            raise

    return send_marked


def _value_of_replaced(task: Any, task_id: str) -> dict[str, str]:
    """The header of the message that a task replaces, or retries, by another one with its id."""
    sender = task.app.current_worker_task
    if sender is None or sender.request.id != task_id:
        return {}
    value = header(sender.request, SENT)
    return {} if value is None else {SENT: value}


def mark_replacement(signature: Any, request: Context) -> None:
    """Have the last message of what replaces a task carry the value of the task's own message.

    It has the task's id, and within a chain or a chord another task sends it.
    """
    value = header(request, SENT)
    if value is None:
        return
    last = signature
    while isinstance(last, Chain | chord):
        last = last.tasks[-1] if isinstance(last, Chain) else last.body
    if last.options.get("task_id") == request.id:
        last.set(headers={**(last.options.get("headers") or {}), SENT: value})


def _value_from_sender(task: Any) -> str | None:
    """The value that follows from the message of the task that sends; ``None`` outside of tasks."""
    sender = task.app.current_worker_task
    return None if sender is None else header(sender.request, SENT) or sender.request.id


def _forget(task: Any, task_id: str, ignore_result: bool | None) -> None:
    """Forget the result of an earlier message with this id.

    Whoever asks for the result of the new message would get the old one. Many result backends
    never replace a success, either.
    """
    request = Context() if ignore_result is None else Context(ignore_result=ignore_result)
    if not is_recorded(task, request) or task.app.conf.task_always_eager:
        return
    try:
        task.backend.forget(task_id)
    except Exception as error:  # a sender may have no way to the result backend
        logger.debug("task %s: an earlier result of %s stays: %s", task.name, task_id, error)


def forget_result(delivery: Delivery) -> None:
    """Forget, before a body runs, what an earlier message with this id has left in the backend.

    The sender may have had no backend. From here on a result under this id is this message's.
    """
    task, request = delivery.task, delivery.request
    if header(request, SENT) is None or request.is_eager or not is_recorded(task, request):
        return
    try:
        if task.AsyncResult(request.id).state in states.READY_STATES:
            task.backend.forget(request.id)
    except Exception as error:
        logger.debug("singleton %s: an earlier result stays: %s", delivery.name, error)


def warn_if_id_reused(delivery: Delivery) -> None:
    """Warn, once for each task, of a duplicate that looks like a message that was sent anew."""
    request, task = delivery.request, delivery.task
    if task.name in _warned or not _seems_new(request):
        return
    _warned.add(task.name)
    logger.warning(
        "singleton %s: a message with the id %s was done before, so this one is dropped, though "
        "its broker does not call it redelivered. If it was sent anew, its body has NOT run: send "
        "each message with a new task_id, or with apply_async() of the task itself, which tells "
        "messages with one id apart; or set deduplicate=False on task %s",
        delivery.name,
        request.id,
        task.name,
    )


def _seems_new(request: Context) -> bool:
    """Whether nothing says that the message is a copy, or was sent by Celery or this package."""
    info: Any = request.delivery_info or {}
    if request.called_directly or request.is_eager or info.get("redelivered"):
        return False
    if request.retries or request.parent_id:
        return False
    return all(header(request, name) is None for name in (DUE, REQUEUED, SENT, SENT_AGAIN))
