"""Send a message again under its own task id: requeue it, forward it, or leave it to the broker."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from celery.app.task import Context
from celery.exceptions import Ignore, Reject
from kombu.exceptions import EncodeError

from celery_singleton_state.compat import cannot_end_jobs, sending_options
from celery_singleton_state.headers import REQUEUED, SENT_AGAIN, WAITED, count_in, custom_headers
from celery_singleton_state.text.visible import logger_of

from .content import encoding_of
from .delay import possible
from .delivery import is_message
from .routing import can_be_addressed, copy_mark

logger = logger_of(__name__)

#: Errors that show that a message can never be sent, however often it is tried.
UNSENDABLE = (EncodeError, TypeError)
#: Seconds for which a worker waits, at most, before it rejects a message that could not be sent
#: again.
UNSENT_PAUSE = 1.0
#: Seconds for which a message is requeued the first time. Each further delay is doubled.
FIRST_DELAY = 0.5
#: Seconds for which a message is requeued at most.
MAX_DELAY = 8.0


def can_be_sent_again(task: Any, request: Context) -> bool:
    """Whether a request's message can be sent again, into the queue that it came from and no other.

    A message from a fanout exchange can be sent again only if the broker can address a single
    queue.
    """
    return is_message(request) and can_be_addressed(task.app, request)


def send_again(
    task: Any,
    request: Context,
    singleton: str,
    delay: float,
    headers: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Send the delivery's message again with a delay, and end the delivery.

    The new message keeps the task id, the count of retries, the callbacks and the rest of a chain.

    :param singleton: the singleton's name, for log lines.
    :param delay: the delay in seconds.
    :param headers: headers to add to the message's own; left out: none.
    :raises Ignore: the message was sent again. Celery then drops this copy and stores no result.
    :raises Reject: the message could not be sent again. The broker then redelivers it.
    """
    headers = dict(headers or {})
    try:
        if WAITED in headers:
            headers[WAITED] += possible(task.app, delay) - delay
        signature = task.signature_from_request(
            request,
            countdown=delay,
            retries=request.retries,
            headers={
                **custom_headers(request),
                **copy_mark(task.app, request),
                SENT_AGAIN: 1,
                **headers,
            },
            **encoding_of(request),
        )
        send_as_it_is(task, signature.args, signature.kwargs, signature.options)
    except Reject as rejected:
        leave_with_broker(request, singleton, rejected.args[0])
    except Exception as error:  # a broker's client can raise anything when it loses its connection
        leave_with_broker(request, singleton, error)
    raise Ignore(f"task {request.id} is sent again and due in {delay:.1f} s")


def send_as_it_is(task: Any, args: Any, kwargs: Any, options: Mapping[str, Any]) -> None:
    """Send a message with exactly these arguments, without the task's ``apply_async``.

    A base class can override ``apply_async`` to add arguments, which this message already has. The
    override can also need a context that does not exist here. And ``apply_async`` checks that the
    arguments fit the body's signature, which is not necessary for a message that was sent before.

    :param options: the options of the message. Options that are ``None`` are left out.
    """
    given = {name: value for name, value in options.items() if value is not None}
    task.app.send_task(
        task.name,
        args,
        kwargs,
        task_type=task,
        **{"ignore_result": task.ignore_result, **sending_options(task), **given},
    )


def leave_with_broker(request: Context, singleton: str, error: Exception) -> NoReturn:
    """Reject a message that could not be sent again, so that the broker redelivers it.

    With any other error, Celery would acknowledge the message, and it would be lost.

    :param error: the error of the sending.
    :raises Reject: always.
    """
    logger.warning(
        "singleton %s: task %s could not be sent again, so its broker redelivers it: %s",
        singleton,
        request.id,
        error,
    )
    # The broker redelivers the message at once, and the next try to send it is likely to fail, too.
    # Without a pause, rejecting and redelivering the message would be a tight loop.
    time.sleep(random.uniform(0.5, 1.0) * UNSENT_PAUSE)
    raise Reject(error, requeue=True) from error


def reject_if_killed(error: BaseException, request: Context) -> None:
    """Requeue a run's message if the run ends because Celery kills it.

    Celery kills greenlets in a cold shutdown, when it revokes a task, and when it has lost its
    connection to the broker. Celery then counts the task as successful and acknowledges the
    message. So this function rejects the message first. If the task was revoked, Celery drops the
    redelivered message.

    A solo pool cannot kill its task. In a cold shutdown the pool raises an error in the body to say
    this, and Celery would count that error as the body's own. If the error comes while a retry is
    being sent, Celery would count the retry as not sent and drop the message.

    :param error: the error that ends the delivery.
    :raises Reject: Celery kills the run.
    """
    if means_to_kill(error) and is_message(request):
        raise Reject("Celery killed the run, so its message is requeued", requeue=True) from error


def means_to_kill(error: BaseException) -> bool:
    """Return whether an error comes from a request to kill the task.

    In a greenlet it is the error that kills the greenlet. In a solo pool, which cannot kill a task,
    it is the error that says so.
    """
    if isinstance(error, Reject) and isinstance(error.args[0], BaseException):
        error = error.args[0]
    if type(error).__name__ == "GreenletExit":
        return True
    return isinstance(error, NotImplementedError) and cannot_end_jobs(error)


def wait_on(task: Any, request: Context, singleton: str, left: float) -> None:
    """Send a message again that has arrived before the end of its delay.

    A message for which :func:`can_be_sent_again` is false is not sent: the function returns, and
    the run comes early.

    :param left: the rest of the delay in seconds.
    :raises Ignore: the message was sent again.
    :raises Reject: the sending failed. The broker then redelivers the message.
    """
    if can_be_sent_again(task, request):
        send_again(task, request, singleton, left)


def end_copy(request: Context, singleton: str) -> NoReturn:
    """End a fanout exchange's copy of a message, because another copy runs or has run.

    The result of the other copy's run is the result of all copies, so this copy stores no result.

    :raises Ignore: always.
    """
    logger.info(
        "singleton %s: task %s came through the fanout exchange %r, and another copy of it runs or "
        "has run; this copy ends",
        singleton,
        request.id,
        (request.delivery_info or {}).get("exchange"),
    )
    raise Ignore(f"another copy of task {request.id} runs or has run")


def requeue(
    task: Any, request: Context, singleton: str, headers: Mapping[str, Any] | None = None
) -> NoReturn:
    """Requeue a redelivered message whose first delivery is still running.

    The message must not run beside the first delivery. It must not be dropped either, because it
    is the only copy that is left if the running process dies. The delay doubles with each requeue
    up to :data:`MAX_DELAY` seconds, and is jittered.

    :param headers: headers to add to the message's own; left out: none.
    :raises Ignore: the message was requeued.
    :raises Reject: the message could not be requeued. The broker then redelivers it.
    """
    count = count_in(request, REQUEUED)
    delay = min(FIRST_DELAY * 2 ** min(count, 10), MAX_DELAY) * random.uniform(0.5, 1.0)
    logger.info(
        "singleton %s: task %s is still running; its message is requeued for %.1f s",
        singleton,
        request.id,
        delay,
    )
    send_again(task, request, singleton, delay, {**(headers or {}), REQUEUED: count + 1})
