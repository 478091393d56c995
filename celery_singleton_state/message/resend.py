"""Messages that come a second time while their run goes on, and messages that are sent again."""

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

#: Errors of a message that can never be sent.
UNSENDABLE = (EncodeError, TypeError)
#: Seconds that a worker waits before it leaves a message with its broker.
UNSENT_PAUSE = 1.0
FIRST_DELAY = 0.5
MAX_DELAY = 8.0


def can_be_sent_again(task: Any, request: Context) -> bool:
    """Whether the delivery is a message that can be sent again, into its own queue alone.

    One that came through a fanout exchange can, if the broker lets a single queue be addressed.
    """
    return is_message(request) and can_be_addressed(task.app, request)


def send_again(
    task: Any,
    request: Context,
    singleton: str,
    delay: float,
    headers: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Send the message again, as it is, to come back a little later.

    It keeps its id, its count of retries and all that hangs on it.

    :param delay: seconds.
    :param headers: added to the message's own.
    :raises Ignore: it is sent; so that Celery drops this copy and says nothing about the task.
    :raises Reject: it could not be sent; the broker keeps it.
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
    except Exception as error:  # a client whose connection breaks can raise anything
        leave_with_broker(request, singleton, error)
    raise Ignore(f"task {request.id} comes again in {delay:.1f} s")


def send_as_it_is(task: Any, args: Any, kwargs: Any, options: Mapping[str, Any]) -> None:
    """Send a message, but not by its task's ``apply_async``.

    One of a base class may add to the arguments what these have already, or need a context that is
    not there; and what such a class takes off again does not fit the body's signature.
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
    """End the delivery of a message that had to be sent again and could not.

    An error would have it acknowledged, and so lost, as soon as the broker is back.

    :raises Reject: always, with the wish that the broker gives the message out again.
    """
    logger.warning(
        "singleton %s: task %s could not be sent again, its broker keeps it: %s",
        singleton,
        request.id,
        error,
    )
    # The broker gives it out again at once, and sending it is likely to fail again for a while.
    time.sleep(random.uniform(0.5, 1.0) * UNSENT_PAUSE)
    raise Reject(error, requeue=True) from error


def reject_if_killed(error: BaseException, request: Context) -> None:
    """Have the broker give out a message again whose greenlet or only thread is to end.

    Celery kills greenlets in a cold shutdown, and when it revokes a task or lost its connection;
    it takes them for successful then, and acknowledges their messages. A revoked one it drops when
    it comes again. In a cold shutdown of a solo pool, whose jobs cannot be killed, the error that
    says so breaks off the body, as if it were the body's own; where it breaks off a retry that is
    being sent, Celery takes it for the sending's, and drops the message.

    :param error: how the delivery ends.
    :raises Reject: it is killed.
    """
    if means_to_kill(error) and is_message(request):
        raise Reject("it was killed in mid-run", requeue=True) from error


def means_to_kill(error: BaseException) -> bool:
    """Whether it is how Celery ends a body, or fails to."""
    if isinstance(error, Reject) and isinstance(error.args[0], BaseException):
        error = error.args[0]
    if type(error).__name__ == "GreenletExit":
        return True
    return isinstance(error, NotImplementedError) and cannot_end_jobs(error)


def wait_on(task: Any, request: Context, singleton: str, left: float) -> None:
    """Send a message on that has a part of its pause left.

    :param left: seconds.
    :raises Ignore: it is sent.
    """
    if can_be_sent_again(task, request):
        send_again(task, request, singleton, left)


def end_copy(request: Context, singleton: str) -> NoReturn:
    """End a message of which another copy runs, or has run: a fanout exchange made copies of it.

    The run's result is that of all copies, so this one stores none.

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
    """Send a message again whose run goes on.

    It is the only insurance if the run that holds the lease for it dies, so it is neither run
    nor thrown away. Its delays double up to :data:`MAX_DELAY` seconds, jittered.

    :param headers: added to the message's own.
    :raises Ignore: always.
    """
    count = count_in(request, REQUEUED)
    delay = min(FIRST_DELAY * 2 ** min(count, 10), MAX_DELAY) * random.uniform(0.5, 1.0)
    logger.info(
        "singleton %s: task %s is still running; its message is put back for %.1f s",
        singleton,
        request.id,
        delay,
    )
    send_again(task, request, singleton, delay, {**(headers or {}), REQUEUED: count + 1})
