"""End a duplicate: a second delivery of a message whose run has already saved its state.

The process of the first delivery may have died before Celery stored the result, and sent the
callbacks and the rest of a chain. Only the result backend shows whether Celery did so before:

- The backend has a result. Celery stores it last, so everything has been sent. The duplicate ends
  silently.
- The backend has no result, and the run ended within the last :data:`GRACE` seconds. The first
  process may still be about to store it. The duplicate is requeued, unless that process is known to
  be dead.
- The backend has no result after that time. The first process died. The duplicate ends with the
  result that the history has kept, and Celery sends the callbacks and the rest of the chain.

A task without a result backend has no such evidence. If the process of the first delivery is alive
after the grace time, it has sent the callbacks, and the duplicate ends silently. Otherwise the
duplicate sends the callbacks, possibly a second time. Celery promises to deliver at least once, and
a chain that never goes on is the greater harm.
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

#: Seconds after a run's end in which its process may still store the result and send callbacks.
GRACE = 10.0
#: Seconds for which a duplicate is requeued the first time. Each further delay is doubled.
FIRST_DELAY = 0.2
#: Seconds for which a duplicate is requeued at most.
MAX_DELAY = 2.0


def wait_for_record(delivery: Delivery, done: Entry | None, now: float) -> None:
    """Requeue a duplicate that arrives while the first delivery may still store its result.

    :param done: the run that did the message's work; ``None`` if it is not known.
    :param now: the time by the store's clock, in seconds since the epoch.
    :raises Ignore: the duplicate is requeued.
    """
    request = delivery.request
    if done is None or is_duplicate(done) or not done.final or delivery.is_copy:
        return
    if not can_be_sent_again(delivery.task, request):
        return
    left = done.finished + GRACE - now
    # If more than twice the grace time is left, the store's clock was set back. Do not wait then.
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
        "singleton %s: task %s has just been done, and its result is not recorded yet; its "
        "message is requeued for %.1f s",
        delivery.name,
        request.id,
        delay,
    )
    headers = {UNRECORDED: count + 1}
    send_again(delivery.task, request, delivery.name, min(delay, left), headers)


def end_duplicate(delivery: Delivery, done: Entry | None) -> Any:
    """Return the result with which a duplicate ends: the first run's result, if it is known.

    :param done: the run that did the message's work; ``None`` if it is not known.
    :raises Ignore: the first delivery has stored its result or sent its callbacks itself. The
        duplicate then stores and sends nothing.
    """
    request = delivery.request
    if result_is_stored(delivery) or _has_gone_on(delivery, done):
        raise Ignore(f"task {request.id} was done before")
    if not delivery.is_message:
        # The store carried out the save of an earlier try, but its answer was lost. The result of
        # that try is still in memory.
        return delivery.earlier.result
    if not is_awaited(delivery.task, request):
        return None
    return _kept_result(delivery, done)


def _has_gone_on(delivery: Delivery, done: Entry | None) -> bool:
    """Whether the first delivery's process is alive, and so has sent the callbacks by now.

    :func:`wait_for_record` has given that process the time to do so. False for a task with a result
    backend, because the backend itself shows whether the callbacks were sent.
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
        except Exception as error:  # a serializer can raise anything
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
    """Whether the process of a run is alive; ``None`` if this process cannot find that out."""
    lives = delivery.runtime.holder_files.lives(holder)
    if lives is not None:
        return lives
    # The process has no holder file: its worker may have removed the file after the process died.
    # No two workers have the same node name. So a holder with this worker's node name was one of
    # this worker's processes, and it is dead if the process id is not in use.
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
