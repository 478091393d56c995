"""``enqueue_once``: a second copy of a message that waits in its queue is not published.

The row remembers the id of the message that is queued. An acquisition for it, a conflict that ends
it, a worker that drops it as revoked or expired, and its life forget it; so one that was lost keeps
others out for no longer than its life. What the lease guards it guards with or without this.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from celery.app.task import Context

from .delivery import Delivery
from .in_place import in_place
from .lease import clock
from .options import Options
from .runtime import Runtime
from .store.base import StoreError
from .ticks import BEAT_HEADERS

logger = logging.getLogger(__name__)

#: How often a queue that changes meanwhile is looked at.
LOOKS = 5
#: How often a claim is sent whose answer is lost.
CLAIM_TRIES = 2
#: Seconds that a message counts as queued, if it does not expire before.
LIFE = 300.0
#: What only messages have that go on with something, or that something hangs on: a retry, a part of
#: a chain, a chord or a group, one with a callback.
_CONTINUES = ("retries", "chain", "chord", "group_id", "root_id", "parent_id", "link", "link_error")


def is_guarded(options: Mapping[str, Any]) -> bool:
    """Whether a message that is sent with these options can be dropped for another one.

    Retries, what is sent again, and parts of a larger work never are.
    """
    headers = options.get("headers") or {}
    return not any(options.get(name) for name in _CONTINUES) and BEAT_HEADERS.issuperset(headers)


def enqueue(
    runtime: Runtime, key: str, options: Mapping[str, Any], publish: Callable[[str], Any]
) -> str | Any:
    """Publish a message unless one is queued or running.

    :param publish: sends it, given its id.
    :returns: the id of the one that is queued or running; or what publishing returned.
    """
    task_id = options.get("task_id") or str(uuid.uuid4())
    try:
        try:
            queued = claim(runtime, key, task_id, _life(options))
        except StoreError as error:
            logger.warning("%s: sent, though it may be queued already: %s", key, error)
            queued = None
        if queued not in (None, task_id):
            return queued
        return publish(task_id)
    except BaseException:
        # Also a claim without an answer, or one that a time limit interrupted, may be in the row.
        _dequeue(runtime, key, task_id)
        raise


def claim(runtime: Runtime, key: str, task_id: str, life: float) -> str | None:
    """Note a message as queued, or find the one that is queued or running.

    A claim names the number of the queue that it was made for, so that one which is carried out
    late, when its message has long been done, is refused.

    :returns: the id of the other message; ``None`` if this one is to be sent, which it is as well
        when the queue changes at every look.
    :raises StoreError: the store is unavailable.
    """
    wishes = runtime.store.wishes
    until = clock() + runtime.io_timeout * CLAIM_TRIES
    for _ in range(LOOKS):
        seen = wishes.queued(key)
        if seen.task_id is not None:
            return seen.task_id
        request = partial(wishes.claim, key, task_id, life, seen.number)
        if in_place(request, CLAIM_TRIES, until):
            return None
    return None


def dequeue(delivery: Delivery) -> None:
    """The message of a delivery that ended without a run is queued no more."""
    if delivery.options.enqueue_once and delivery.request.id:
        _dequeue(delivery.runtime, delivery.key, delivery.request.id)


def dequeue_dropped(sender: Any, request: Context, **_: Any) -> None:
    """A message that a worker drops, as it was revoked or has expired, is queued no more.

    Celery's signal ``task_revoked`` calls it, for all tasks.
    """
    options = getattr(sender, "_options", None)
    if isinstance(options, Options) and options.enqueue_once:
        dequeue(sender._delivery(request, tuple(request.args or ()), request.kwargs or {}))


def _dequeue(runtime: Runtime, key: str, task_id: str) -> None:
    try:
        runtime.store.wishes.dequeue(key, task_id)
    except StoreError as error:
        logger.warning("%s: task %s counts as queued until its life ends: %s", key, task_id, error)


def _life(options: Mapping[str, Any]) -> float:
    countdown, expires = options.get("countdown") or 0.0, options.get("expires")
    life = LIFE + countdown
    return min(life, float(expires)) if isinstance(expires, int | float) else life
