"""``enqueue_once``: a second copy of a message that waits in its queue is not published.

The row remembers the id of the message that is queued, until the message acquires the lease, ends
without a run, or its life is over. So a message that was lost keeps others out for no longer than
its life. What the lease guards it guards with or without this.
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

#: How often a queue that changes meanwhile is looked at.
ATTEMPTS = 5
#: How often a request is sent whose answer is lost: the first one may have met a connection that
#: was closed while nobody used it.
TRIES = 2
#: Seconds that a message counts as queued from when it may run, if it does not expire before.
LIFE = 300.0
#: Ten years: databases have no times without an end.
LONGEST_LIFE = 315_360_000.0
#: What only messages have that go on with something, or that something hangs on: a retry, a part of
#: a chain, a chord or a group, one with a callback.
_CONTINUES = ("retries", "chain", "chord", "group_id", "root_id", "parent_id", "link", "link_error")
#: Policies by which a message that meets a run brings one more run. The others drop it.
BRING_ANOTHER_RUN = frozenset({"wait", "replace", "coalesce"})


def is_guarded(options: Mapping[str, Any]) -> bool:
    """Whether a message that is sent with these options can be dropped for another one.

    Retries, what is sent again, and parts of a larger work never are; nor is a message with headers
    of its sender's own. Those that beat and tracing tools add are not the sender's.
    """
    names = names_in(options.get("headers") or {})
    return not any(options.get(name) for name in _CONTINUES) and all(
        name in BEAT_HEADERS or is_of_tool(name) for name in names
    )


def is_retry(options: Mapping[str, Any]) -> bool:
    """Whether a message that is sent with these options is the retry of another one."""
    return bool(options.get("retries")) and bool(options.get("task_id"))


def enqueue(
    task: Any,
    key: str,
    options: Mapping[str, Any],
    publish: Callable[[str], Any],
    beside_run: bool = False,
    has_ended: Callable[[str], bool] = lambda _: False,
) -> str | Any:
    """Publish a message of a task unless one is queued or running.

    :param key: of the singleton's row.
    :param publish: sends it, given its id.
    :param beside_run: whether it is published while another message runs.
    :param has_ended: whether a message, by its id, is known to have ended.
    :returns: the id of the one that is queued or running; or what publishing returned.
    """
    task_id = options.get("task_id") or str(uuid.uuid4())
    life = life_of(options)
    if life is None:
        return publish(task_id)
    with _counted(task, key, task_id):
        try:
            queued = claim(task, key, task_id, life, beside_run, has_ended)
        except StoreError as error:
            logger.warning("%s: sent, though it may be queued already: %s", key, error)
            queued = None
        # The beat that claimed for this tick may have died before it sent its message. The run
        # refuses the second copy of a tick.
        is_sent_tick = queued == task_id and DUE in (options.get("headers") or {})
        return publish(task_id) if queued is None or is_sent_tick else queued


def publish_retry(
    task: Any, key: str, options: Mapping[str, Any], publish: Callable[[], Any]
) -> Any:
    """Publish a retry, which then counts as queued unless another message does."""
    task_id, life = str(options["task_id"]), life_of(options)
    if life is None:
        return publish()
    with _counted(task, key, task_id):
        try:
            _claim_again(task, key, task_id, life)
        except StoreError as error:
            logger.warning("%s: task %s does not count as queued: %s", key, task_id, error)
        return publish()


def claim(
    task: Any,
    key: str,
    task_id: str,
    life: float,
    beside_run: bool = False,
    has_ended: Callable[[str], bool] = lambda _: False,
) -> str | None:
    """Note a message as queued, or find the one that is queued or running.

    A claim names the number of the queue that it was made for, so that one which is carried out
    late, when its message has long been done, is refused.

    :param beside_run: whether a message that runs does not count.
    :param has_ended: whether a message, by its id, is known to have ended.
    :returns: the id of the message that is queued or running; ``None`` if this one is to be sent,
        which it is as well when the queue changes at every look.
    :raises StoreError: the store is unavailable.
    """
    requests = _requests(task)
    until = clock() + runtime_of(task.app).io_timeout * TRIES
    for _ in range(ATTEMPTS):
        seen = retry_immediately(partial(requests.queued, key), TRIES, until)
        found = None if seen.running and beside_run else seen.task_id
        # An id that is used again has the result of its last use.
        may_have_ended = found != task_id and not seen.running
        if found is not None and not (may_have_ended and has_ended(found)):
            return found
        if _claim(task, key, task_id, life, seen.number, until):
            return None
    return None


def dequeue(delivery: Delivery) -> None:
    """The message of a delivery that ended without a run is queued no more."""
    if delivery.options.enqueue_once and delivery.request.id:
        _dequeue(delivery.task, delivery.key, delivery.request.id)
        dequeue_as_sent(delivery)


def dequeue_as_sent(delivery: Delivery) -> None:
    """A message whose arguments a ``__call__`` has changed is queued no more.

    It counts as queued under the key of the arguments that it was sent with, and the acquisition
    for the key of those that reach the body does not see that.
    """
    task, request, runtime = delivery.task, delivery.request, delivery.runtime
    if not request.id:
        return
    try:
        name = task._name(tuple(request.args or ()), request.kwargs or {})
    except Exception:  # it was sent without a key, then
        return
    if name != delivery.name:
        _dequeue(task, row_key(runtime.settings.key_prefix, name), request.id)


def life_of(options: Mapping[str, Any]) -> float | None:
    """Seconds for which a message that is sent with these options counts as queued.

    Celery takes a number of seconds, a datetime or an ISO text, and a datetime without a time zone
    for UTC.

    :returns: ``None`` if Celery refuses one of the options.
    """
    countdown, eta = options.get("countdown"), options.get("eta")
    expires, expiration = options.get("expires"), options.get("expiration")
    try:
        begins = 0.0
        if countdown:
            begins = _seconds_until(countdown)
        elif eta:
            begins = _seconds_until(eta, may_be_number=False)
        # A retry may be kept by the broker, without a countdown, or be given a part of it.
        begins = max(begins, float((options.get("headers") or {}).get(PAUSE) or 0.0))
        ends = [begins + LIFE, LONGEST_LIFE]
        if expires is not None:
            ends.append(_seconds_until(expires))
        if expiration is not None:
            # The broker drops the message if it is not delivered by then.
            ends.append(begins + float(expiration))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None
    return min(ends)


def _seconds_until(given: Any, may_be_number: bool = True) -> float:
    """Seconds until what Celery takes for a moment, never below zero; raises what Celery would."""
    now = datetime.now(UTC)
    if may_be_number and isinstance(given, numbers.Real):
        moment: datetime = now + timedelta(seconds=given)  # type: ignore[arg-type]  # it says so itself
    else:
        parsed = maybe_iso8601(given if isinstance(given, str) else given.isoformat())
        if parsed is None:
            raise ValueError("an empty text is no time")
        moment = maybe_make_aware(parsed)
    return max((moment - now).total_seconds(), 0.0)


def _claim(task: Any, key: str, task_id: str, life: float, number: int, until: float) -> bool:
    """Claim the queue as it was seen; a message that has expired already claims nothing."""
    if life <= 0:
        return True
    requests, tries = _requests(task), itertools.count()
    return retry_immediately(
        # Only a repetition may find the claim in the row: another caller's with the same task id
        # would look the same.
        lambda: requests.claim(key, task_id, life, number, next(tries) == 0, task.name),
        TRIES,
        until,
    )


def _claim_again(task: Any, key: str, task_id: str, life: float) -> None:
    """Note a message that is sent again as queued, if no other message is."""
    seen = _requests(task).queued(key)
    if seen.running or seen.task_id in (None, task_id):
        _claim(task, key, task_id, life, seen.number, clock() + runtime_of(task.app).io_timeout)


@contextmanager
def _counted(task: Any, key: str, task_id: str) -> Iterator[None]:
    """Has a message that could not be published count as queued no more.

    A claim without an answer, or one that a time limit interrupted, may be in the row, too.
    """
    try:
        yield
    except BaseException:
        _dequeue(task, key, task_id)
        raise


def _requests(task: Any) -> RowRequests:
    """What can be asked of the rows of a task.

    :raises StoreError: the store is unavailable.
    """
    return runtime_of(task.app).store_of(options_of(task)).requests


def _dequeue(task: Any, key: str, task_id: str) -> None:
    until = clock() + runtime_of(task.app).io_timeout
    try:
        retry_immediately(partial(_requests(task).dequeue, key, task_id, task.name), TRIES, until)
    except StoreError as error:
        logger.warning("%s: task %s counts as queued until its life ends: %s", key, task_id, error)
