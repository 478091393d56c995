"""The pauses between the tries of messages that wait for a lease (``on_conflict="wait"``).

Each try of a message costs a process some milliseconds. A thousand messages that try every few
seconds would take all the time of a fleet of workers. Therefore:

- One message of a singleton is *next in line*. This message tries about once a second, and other
  messages that have waited leave a free lease to it. Until it acquires the lease, it holds a claim
  in the row, as a queued message of ``enqueue_once`` does. The claim is short, so that another
  message becomes the next one if this message is lost.
- The more other messages wait, the less often they try. A process spaces the messages of one
  singleton so that their tries take a few percent of the process's time.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from celery_singleton_state.headers import NEXT_SINCE, WAITED, header
from celery_singleton_state.lease.lease import clock
from celery_singleton_state.message.enqueue_once import LIFE
from celery_singleton_state.message.resend import send_again
from celery_singleton_state.store.base import Row

if TYPE_CHECKING:
    from .conflict import Conflict

#: Seconds before the second try of a message. Each later pause is as long as the message has waited
#: so far, within the limits below.
FIRST_PAUSE = 0.1
#: The longest pause in seconds of the message that is next in line.
NEXT_PAUSE = 1.0
#: The longest pause in seconds of a message that is not next in line, if few messages wait.
LONGEST_PAUSE = 30.0
#: The longest pause of a message that is not next in line, as a fraction of its
#: ``conflict_timeout``. The smaller of this pause and LONGEST_PAUSE counts, but never less than
#: NEXT_PAUSE.
PART_OF_TIMEOUT = 0.01
#: How long the message that is next in line keeps its claim after the time of its next try, because
#: the message may still wait in a queue then: the fraction GRACE_OF_TIMEOUT of its
#: ``conflict_timeout``, but at least GRACE seconds and at most LONGEST_GRACE seconds.
GRACE = 3.0
LONGEST_GRACE = 10.0
GRACE_OF_TIMEOUT = 0.02
#: Seconds from the expiry of a holder's lease to the next try. If the holder is dead, the lease is
#: free then.
AFTER_EXPIRY = 0.1


def is_behind_another(row: Row, task_id: str | None) -> bool:
    """Return whether another message is next in line for the lease, even if the lease is free.

    A message of ``enqueue_once`` that is only queued holds a claim in the row, too, but a longer
    claim. So the length tells the two kinds of messages apart.

    :param task_id: the task id of this message.
    """
    next_one, queued_in = row.queued_task_id, row.queued_in or 0.0
    return next_one not in (None, task_id) and queued_in <= NEXT_PAUSE + LONGEST_GRACE


def send_to_wait(conflict: Conflict) -> None:
    """Requeue the message of a delivery, so that it tries again later. This always raises.

    :raises Ignore: the message was requeued.
    :raises Reject: the message could not be requeued.
    :raises LeaderHandoffFailed: the delivery has waited for its ``conflict_timeout``.
    """
    delivery, row = conflict.delivery, conflict.row
    try:
        left = conflict.time_left()
    except Exception:
        if row is not None and row.queued_task_id and row.queued_task_id == delivery.request.id:
            delivery.store.requests.dequeue(delivery.key, row.queued_task_id)
        raise
    since = float(header(delivery.request, NEXT_SINCE, delivery.waited))
    pause = _pause_of_next(conflict, delivery.waited - since)
    is_next = _is_next(conflict, min(pause, left))
    if not is_next:
        longest = max(NEXT_PAUSE, delivery.conflict_timeout * PART_OF_TIMEOUT)
        at_least = min(max(delivery.waited, FIRST_PAUSE), longest, LONGEST_PAUSE)
        at_least *= random.uniform(0.75, 1.25)
        cost = clock() - conflict.asked_at
        pause = delivery.runtime.pace.pause(delivery.key, at_least, cost)
    pause = min(pause, left)
    send_again(
        delivery.task,
        delivery.request,
        delivery.name,
        pause,
        {WAITED: delivery.waited + pause, NEXT_SINCE: since if is_next else None},
    )


def _pause_of_next(conflict: Conflict, waited: float) -> float:
    """Return the seconds until the message that is next in line tries again.

    :param waited: seconds for which the message has been next in line. The pause is about as long,
        because a lease that was just acquired may be free again soon.
    """
    row = conflict.row
    pause = min(max(waited, FIRST_PAUSE), NEXT_PAUSE)
    if row is not None and row.held:
        # Do not pause for longer than until the holder's lease expires: if the holder has died, the
        # lease is free then.
        pause = min(pause, (row.expires_in or 0.0) + AFTER_EXPIRY)
    return pause


def _is_next(conflict: Conflict, pause: float) -> bool:
    """Return whether the message is next in line; make it the next if no other message is.

    :param pause: seconds until the message's next try.
    """
    delivery, row = conflict.delivery, conflict.row
    task_id = delivery.request.id
    if row is None or not task_id or row.queued_task_id not in (None, task_id):
        return False
    is_queued = row.queued_task_id == task_id
    life = min(max(delivery.conflict_timeout * GRACE_OF_TIMEOUT, GRACE), LONGEST_GRACE)
    if delivery.options.enqueue_once:
        life = LIFE
    if is_queued and (row.queued_in or 0.0) > pause + life / 2:
        return True
    claim = delivery.store.requests.claim
    is_claimed = claim(
        row.key, task_id, pause + life, row.queue, first=True, task=delivery.task.name
    )
    return is_claimed or is_queued
