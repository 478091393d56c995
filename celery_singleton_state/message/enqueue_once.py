"""``enqueue_once``: do not publish a message while another one of the singleton is queued.

The singleton's row stores the task id of the queued message. The id is removed when the message
acquires the lease, ends without a run, or reaches the end of its life (:func:`life_of`). So a lost
message blocks further messages for no longer than its life. The lease guards the run with or
without this option.
"""

from __future__ import annotations

import itertools
import numbers
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from celery.utils.time import maybe_iso8601, maybe_make_aware

from celery_singleton_state.config.options import options_of
from celery_singleton_state.headers import DUE, PAUSE, is_of_tool, names_in
from celery_singleton_state.keys import row_key
from celery_singleton_state.lease.lease import clock, retry_immediately
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import RowRequests, StoreError
from celery_singleton_state.text.visible import logger_of
from celery_singleton_state.ticks import BEAT_HEADERS

from .delivery import Delivery

logger = logger_of(__name__)

#: How often a sender tries at most to note its message as queued, if other senders change the row
#: between its read and its write. After that it sends the message in any case.
ATTEMPTS = 5
#: How often a request is sent at most when its answer is lost. One repetition is useful, because a
#: pooled connection may have been closed while it was idle.
TRIES = 2
#: Seconds for which a message counts as queued after the time at which it may run. A message that
#: expires sooner counts as queued until it expires.
LIFE = 300.0
#: The longest time, in seconds, for which a message counts as queued: ten years. There is a limit
#: because a database column holds no infinite time.
LONGEST_LIFE = 315_360_000.0
#: Options that show that a message belongs to other work: it is a retry, a part of a chain, a chord
#: or a group, or it has a callback. Such a message is always published.
_CONTINUES = ("retries", "chain", "chord", "group_id", "root_id", "parent_id", "link", "link_error")
#: Conflict policies with which a message that is sent during a run causes one more run. The other
#: policies end such a message without a run.
BRING_ANOTHER_RUN = frozenset({"wait", "replace", "coalesce"})


def is_guarded(options: Mapping[str, Any]) -> bool:
    """Whether ``enqueue_once`` applies to a message that is sent with these options.

    It does not apply to retries, to messages that this package sends again, and to parts of a
    chain, a chord or a group. It does not apply either to a message with headers of the sender's
    own. Headers that beat or a tracing tool adds do not count as the sender's own.
    """
    names = names_in(options.get("headers") or {})
    return not any(options.get(name) for name in _CONTINUES) and all(
        name in BEAT_HEADERS or is_of_tool(name) for name in names
    )


def is_retry(options: Mapping[str, Any]) -> bool:
    """Whether a message that is sent with these options is a retry of an earlier message."""
    return bool(options.get("retries")) and bool(options.get("task_id"))


def enqueue(
    task: Any,
    key: str,
    options: Mapping[str, Any],
    publish: Callable[[str], Any],
    beside_run: bool = False,
    has_ended: Callable[[str], bool] = lambda _: False,
) -> str | Any:
    """Publish a message of a singleton, unless another one is queued or running.

    :param task: the task.
    :param key: the key of the singleton's row.
    :param options: the options of ``apply_async``.
    :param publish: publishes the message, given its task id.
    :param beside_run: true to publish the message even if another message is running.
    :param has_ended: a function that takes a task id and returns whether the message with this id
        is known to have ended.
    :returns: the return value of ``publish``; or the task id of the message that is queued or
        running, if nothing was published.
    """
    task_id = options.get("task_id") or str(uuid.uuid4())
    life = life_of(options)
    if life is None:
        return publish(task_id)
    with _counted(task, key, task_id):
        try:
            queued = claim(task, key, task_id, life, beside_run, has_ended)
        except StoreError as error:
            logger.warning(
                "%s: task %s is sent, although another message may be queued, because the store"
                " could not be asked: %s",
                *(key, task_id, error),
            )
            queued = None
        # The beat that noted this tick as queued may have died before it sent the message. So a
        # tick that is noted already is sent again. If its message comes twice, the second delivery
        # ends as a duplicate.
        is_sent_tick = queued == task_id and DUE in (options.get("headers") or {})
        return publish(task_id) if queued is None or is_sent_tick else queued


def publish_retry(
    task: Any, key: str, options: Mapping[str, Any], publish: Callable[[], Any]
) -> Any:
    """Publish a retry, and note it as queued unless another message is queued.

    :param key: the key of the singleton's row.
    :param options: the options of ``apply_async``.
    :param publish: publishes the retry.
    :returns: the return value of ``publish``.
    """
    task_id, life = str(options["task_id"]), life_of(options)
    if life is None:
        return publish()
    with _counted(task, key, task_id):
        try:
            _claim_again(task, key, task_id, life)
        except StoreError as error:
            logger.warning(
                "%s: the retry of task %s does not count as queued, because the store could not be"
                " asked: %s",
                *(key, task_id, error),
            )
        return publish()


def claim(
    task: Any,
    key: str,
    task_id: str,
    life: float,
    beside_run: bool = False,
    has_ended: Callable[[str], bool] = lambda _: False,
) -> str | None:
    """Note a message as queued, unless another message is queued or running.

    The request to the store is called a *claim*. The row counts the changes of its queue, and a
    claim names the count that its sender has read. The store refuses a claim with an old count. So
    a claim that is carried out late, when its message has already ended, has no effect.

    :param key: the key of the singleton's row.
    :param task_id: the task id of the message.
    :param life: the seconds for which the message counts as queued.
    :param beside_run: true to note the message even if another message is running.
    :param has_ended: a function that takes a task id and returns whether the message with this id
        is known to have ended.
    :returns: the task id of the other message; ``None`` if this message is to be sent. The result
        is also ``None`` if other senders changed the queue at each of :data:`ATTEMPTS` tries.
    :raises StoreError: the store is unavailable.
    """
    requests = _requests(task)
    until = clock() + runtime_of(task.app).io_timeout * TRIES
    for _ in range(ATTEMPTS):
        seen = retry_immediately(partial(requests.queued, key), TRIES, until)
        found = None if seen.running and beside_run else seen.task_id
        # A task id that is used again still has the result of its last use. So the result does not
        # show that this message has ended.
        may_have_ended = found != task_id and not seen.running
        if found is not None and not (may_have_ended and has_ended(found)):
            return found
        if _claim(task, key, task_id, life, seen.number, until):
            return None
    return None


def dequeue(delivery: Delivery) -> None:
    """Record that the message of a delivery is no longer queued, because it ended without a run."""
    if delivery.options.enqueue_once and delivery.request.id:
        _dequeue(delivery.task, delivery.key, delivery.request.id)
        dequeue_as_sent(delivery)


def dequeue_as_sent(delivery: Delivery) -> None:
    """Record that a message is no longer queued if the user's ``__call__`` changed its arguments.

    The message was noted as queued in the row for the arguments that were sent. If the arguments
    that reach the body belong to another row, the acquisition of the lease does not update the
    first row.
    """
    task, request, runtime = delivery.task, delivery.request, delivery.runtime
    if not request.id:
        return
    try:
        name = task._name(tuple(request.args or ()), request.kwargs or {})
    except Exception:  # the arguments have no key, so the sender did not note the message
        return
    if name != delivery.name:
        _dequeue(task, row_key(runtime.settings.key_prefix, name), request.id)


def life_of(options: Mapping[str, Any]) -> float | None:
    """Return the seconds for which a message with these options counts as queued.

    Celery accepts a time as a number of seconds, a datetime or an ISO text. A datetime without a
    time zone counts as UTC.

    :returns: ``None`` if Celery would refuse one of the options.
    """
    countdown, eta = options.get("countdown"), options.get("eta")
    expires, expiration = options.get("expires"), options.get("expiration")
    try:
        begins = 0.0
        if countdown:
            begins = _seconds_until(countdown)
        elif eta:
            begins = _seconds_until(eta, may_be_number=False)
        # The header ``PAUSE`` has the whole delay of a retry. The retry's countdown can be shorter,
        # or missing if the broker delays the message.
        begins = max(begins, float((options.get("headers") or {}).get(PAUSE) or 0.0))
        ends = [begins + LIFE, LONGEST_LIFE]
        if expires is not None:
            ends.append(_seconds_until(expires))
        if expiration is not None:
            # The broker drops a message that it has not delivered within ``expiration`` seconds.
            ends.append(begins + float(expiration))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None
    return min(ends)


def _seconds_until(given: Any, may_be_number: bool = True) -> float:
    """Return the seconds until a time that is given as Celery accepts it; 0 for a time in the past.

    :raises Exception: the same errors as Celery raises for a value that it refuses.
    """
    now = datetime.now(UTC)
    if may_be_number and isinstance(given, numbers.Real):
        moment: datetime = now + timedelta(seconds=given)  # type: ignore[arg-type]  # any real number
    else:
        parsed = maybe_iso8601(given if isinstance(given, str) else given.isoformat())
        if parsed is None:
            raise ValueError("an empty text is no time")
        moment = maybe_make_aware(parsed)
    return max((moment - now).total_seconds(), 0.0)


def _claim(task: Any, key: str, task_id: str, life: float, number: int, until: float) -> bool:
    """Note a message as queued if the queue has not changed since it was read.

    A message that has already expired is not noted.

    :param number: the count of the queue's changes that was read.
    :param until: the time, by this process's clock, after which no request is repeated.
    :returns: whether the message may be sent now.
    """
    if life <= 0:
        return True
    requests, tries = _requests(task), itertools.count()
    return retry_immediately(
        # A repeated request succeeds if the message is noted already, because the first request may
        # have noted it. The first request does not: if it finds this task id noted, another sender
        # has used the same id.
        lambda: requests.claim(key, task_id, life, number, next(tries) == 0, task.name),
        TRIES,
        until,
    )


def _claim_again(task: Any, key: str, task_id: str, life: float) -> None:
    """Note a message that is sent again as queued, unless another message is queued."""
    seen = _requests(task).queued(key)
    if seen.running or seen.task_id in (None, task_id):
        _claim(task, key, task_id, life, seen.number, clock() + runtime_of(task.app).io_timeout)


@contextmanager
def _counted(task: Any, key: str, task_id: str) -> Iterator[None]:
    """A context manager around noting a message as queued and publishing the message.

    After any error in it, the row no longer notes the message as queued. This is also done if the
    noting failed, because the row may have the note nevertheless: the store's answer may have been
    lost, or a time limit may have interrupted the noting.
    """
    try:
        yield
    except BaseException:
        _dequeue(task, key, task_id)
        raise


def _requests(task: Any) -> RowRequests:
    """Return the part of the task's store that records queued messages and pending runs.

    :raises StoreError: the store is unavailable.
    """
    return runtime_of(task.app).store_of(options_of(task)).requests


def _dequeue(task: Any, key: str, task_id: str) -> None:
    until = clock() + runtime_of(task.app).io_timeout
    try:
        retry_immediately(partial(_requests(task).dequeue, key, task_id, task.name), TRIES, until)
    except StoreError as error:
        logger.warning(
            "%s: task %s counts as queued until its life ends, because the store could not be"
            " asked: %s",
            *(key, task_id, error),
        )
