"""End a message that was done before.

Its first delivery has saved the state. Whether it also recorded the result with Celery, and sent
callbacks and the rest of a chain, only a result backend can tell:

- A result is stored: Celery stores it last, so everything has happened. The copy ends silently.
- None is stored, and the run ended just now: its process may be about to do that. The copy is
  requeued for as long as :data:`GRACE`, unless the process is known to be dead.
- None is stored after that: the first delivery died. The copy ends with the result that was kept
  with the history, and Celery goes on from there.

Without a result backend nothing tells. If the first delivery's process lives, it has gone on, so
the copy ends silently after the grace time. Otherwise the callbacks are sent, if need be a second
time: Celery promises to deliver at least once, and a chain that never goes on is the greater harm.
"""

from __future__ import annotations

import os
import random
from typing import Any, NoReturn

from celery.exceptions import Ignore

from celery_singleton_state.headers import UNRECORDED, count_in
from celery_singleton_state.history import Entry, is_duplicate
from celery_singleton_state.text.storable import storable
from celery_singleton_state.text.visible import logger_of

from .delivery import Delivery
from .resend import can_be_sent_again, send_again
from .results import continues, has_result, is_awaited, is_recorded, restore

logger = logger_of(__name__)

#: Seconds after a run's end in which its process may still record the result.
GRACE = 10.0
FIRST_DELAY = 0.2
MAX_DELAY = 2.0


def wait_for_record(delivery: Delivery, done: Entry | None, now: float) -> None:
    """Requeue a copy that comes so early that the first delivery may still be recording.

    :param done: the run that did the message's work, if it is known.
    :param now: seconds since the epoch, by the store's clock.
    :raises Ignore: the copy is requeued.
    """
    request = delivery.request
    if done is None or is_duplicate(done) or not done.final or delivery.is_copy:
        return
    if not can_be_sent_again(delivery.task, request):
        return
    left = done.finished + GRACE - now
    # The store's clock may have been put back.
    if not 0 < left <= 2 * GRACE or not is_awaited(delivery.task, request):
        return
    if _lives(delivery, done.holder) is False or result_is_stored(delivery):
        return
    _requeue(delivery, min(left, GRACE))


def _requeue(delivery: Delivery, left: float) -> NoReturn:
    request = delivery.request
    count = count_in(request, UNRECORDED)
    delay = min(FIRST_DELAY * 2 ** min(count, 10), MAX_DELAY) * random.uniform(0.75, 1.25)
    logger.info(
        "singleton %s: task %s was done a moment ago, and its result is not recorded yet; its "
        "message is put back for %.1f s",
        delivery.name,
        request.id,
        delay,
    )
    headers = {UNRECORDED: count + 1}
    send_again(delivery.task, request, delivery.name, min(delay, left), headers)


def end_duplicate(delivery: Delivery, done: Entry | None) -> Any:
    """The result with which a copy ends: the first delivery's, if it was kept.

    :param done: the run that did the message's work, if it is known.
    :raises Ignore: the first delivery went on by itself; its result and callbacks are left alone.
    """
    request = delivery.request
    if result_is_stored(delivery) or _has_gone_on(delivery, done):
        raise Ignore(f"task {request.id} was done before")
    if not delivery.is_message:
        # An eager run whose save was carried out and not answered has its result still.
        return delivery.earlier.result
    if not is_awaited(delivery.task, request):
        return None
    return _kept_result(delivery, done)


def _has_gone_on(delivery: Delivery, done: Entry | None) -> bool:
    """Whether the first delivery's process has surely sent what comes next, as it lives on.

    :func:`wait_for_record` has given it the time to do so.
    """
    request = delivery.request
    if done is None or not continues(request) or is_recorded(delivery.task, request):
        return False
    return delivery.is_message and bool(_lives(delivery, done.holder))


def _kept_result(delivery: Delivery, done: Entry | None) -> Any:
    why = "it was larger than a history keeps, could not be serialized, or is too old"
    if done is not None and done.result is not None:
        try:
            return restore(delivery.task, done.result)
        except Exception as error:  # serializers raise what they like
            why = f"it cannot be read: {error}"
    logger.warning(
        "singleton %s: task %s was done before, by a run that did not record its result; it ends "
        "with None, and so do its callbacks, because the result is not known: %s",
        delivery.name,
        delivery.request.id,
        why,
    )
    return None


def result_is_stored(delivery: Delivery) -> bool:
    task = delivery.task
    return is_recorded(task, delivery.request) and has_result(task, delivery.request.id)


def _lives(delivery: Delivery, holder: str) -> bool | None:
    """Whether the process of a run lives; ``None`` if that cannot be known here."""
    lives = delivery.runtime.holder_files.lives(holder)
    if lives is not None:
        return lives
    # A worker removes the file of its child that died, and its node's name is no other worker's.
    node, _, rest = holder.rpartition(":")[0].rpartition(":")
    if node != storable(delivery.request.hostname) or not rest.isdecimal():
        return None
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return None
    return None
