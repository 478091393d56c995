"""Tell new messages from redelivered ones if a sender uses one task id again and again.

``apply_async(task_id="nightly-import")`` sends a new message each day, always with the same task
id. Redelivered and retried messages have the same task id, too. So a message whose sender chose the
id also carries a *value* in a header, which is normally different for each call of ``apply_async``.
A message keeps its value when it is redelivered, requeued or retried, and the history stores the
value with the run. A message with a known id and another value is new work.

If a task sends the message, the value is derived from the task's own message. So if that task runs
a second time because its process died, it sends a duplicate, and not new work.

Messages from ``send_task`` and from other clients carry no value. Only their ids tell them apart.
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

#: Options that show that a message belongs to other work: it is a retry, or a part of a chain, a
#: chord or a group. Such a message gets no value of its own: either Celery has made its task id, or
#: it takes over the value of the message that it continues.
_CONTINUES = ("retries", "chain", "chord", "group_id", "root_id", "parent_id")
#: The values that mark messages whose sending raised an error, by task name and task id. The broker
#: may have such a message nevertheless, so a second try to send the message takes the same value.
_unsure: dict[tuple[str, str], str] = {}
#: The largest number of messages whose sending raised an error and whose values this process keeps.
#: The limit bounds the memory; when it is reached, the process forgets all these values.
MAX_UNSURE = 10_000
#: Names of the tasks for which this process has logged the warning of :func:`warn_if_id_reused`.
_warned: set[str] = set()


def marking(task: Any, task_id: str | None, send: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Celery's ``apply_async``, to tell a message from earlier ones with the same task id.

    The wrapper adds a header with the value that marks the message. A sender that gets an error
    cannot know whether the broker has the message, and may call ``apply_async`` again. The second
    message then carries the value of the first one, so that the second message counts as a
    duplicate.

    :param task_id: the task id that the sender chose. With ``None`` no value is needed, because
        Celery makes a new id.
    :param send: Celery's own ``apply_async``.
    :returns: ``send`` itself if no value is needed; otherwise a function that wraps ``send``.
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
    """Return the header with which a retry or a replacement takes over the running task's value.

    Such a message has the task id of the running task's message. The value tells these two messages
    from other messages with that id.

    :returns: an empty dict if no task with this id is running here, or if its message has no value.
    """
    sender = task.app.current_worker_task
    if sender is None or sender.request.id != task_id:
        return {}
    value = header(sender.request, SENT)
    return {} if value is None else {SENT: value}


def mark_replacement(signature: Any, request: Context) -> None:
    """Copy the value that marks a task's message to the message that replaces the task.

    If a chain or a chord replaces the task, its last message has the task's id and gets the value.
    That message is sent by another task, which does not know the value.

    :param signature: the signature that was given to ``self.replace()``. It is changed.
    :param request: the request of the task that is replaced.
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
    """Return the value for a message that a task sends, derived from the task's own message.

    :returns: ``None`` if no task is running here.
    """
    sender = task.app.current_worker_task
    return None if sender is None else header(sender.request, SENT) or sender.request.id


def _forget(task: Any, task_id: str, ignore_result: bool | None) -> None:
    """Delete the result of an earlier message with this task id from the result backend.

    Otherwise the sender of the new message would get the old result. Many result backends also
    refuse to replace a successful result.
    """
    request = Context() if ignore_result is None else Context(ignore_result=ignore_result)
    if not is_recorded(task, request) or task.app.conf.task_always_eager:
        return
    try:
        task.backend.forget(task_id)
    except Exception as error:  # the sender's process may have no access to the result backend
        logger.debug(
            "task %s: an earlier result under the id %s could not be deleted: %s",
            *(task.name, task_id, error),
        )


def forget_result(delivery: Delivery) -> None:
    """Delete the result of an earlier message with the delivery's task id, before the body runs.

    The sender of the message also deletes the earlier result, but may have no access to the result
    backend. From here on, a result under this id belongs to this message.
    """
    task, request = delivery.task, delivery.request
    if header(request, SENT) is None or request.is_eager or not is_recorded(task, request):
        return
    try:
        if task.AsyncResult(request.id).state in states.READY_STATES:
            task.backend.forget(request.id)
    except Exception as error:
        logger.debug(
            "singleton %s: an earlier result under the id %s could not be deleted: %s",
            *(delivery.name, request.id, error),
        )


def warn_if_id_reused(delivery: Delivery) -> None:
    """Warn if a duplicate looks like a new message with a used id. Warn once for each task."""
    request, task = delivery.request, delivery.task
    if task.name in _warned or not _seems_new(request):
        return
    _warned.add(task.name)
    logger.warning(
        "singleton %s: a message with the id %s was done before, so this one is dropped, although "
        "its broker does not mark it as redelivered. If it is a new message, its body has NOT run: "
        "send each message with a new task_id, or with apply_async() of the task itself, which "
        "tells messages with one id apart; or set deduplicate=False on task %s",
        delivery.name,
        request.id,
        task.name,
    )


def _seems_new(request: Context) -> bool:
    """Whether a message looks like new work: nothing marks it as redelivered or retried, and
    neither Celery nor this package has sent it again.
    """
    info: Any = request.delivery_info or {}
    if request.called_directly or request.is_eager or info.get("redelivered"):
        return False
    if request.retries or request.parent_id:
        return False
    return all(header(request, name) is None for name in (DUE, REQUEUED, SENT, SENT_AGAIN))
