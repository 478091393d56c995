"""How often messages ask for a lease that they wait for: ``on_conflict="wait"``.

Each try of a message costs a process some milliseconds. A thousand messages that tried every few
seconds would take a fleet's whole time. So

- one message of a singleton is *next in line*: it tries about once a second, and those that waited
  leave a free lease to it. It holds the queue's claim, as a message of ``enqueue_once`` does, until
  it acquires the lease; the claim is brief, so that a message which is lost gives its place away.
- the others try the less often, the more they are: a process sends the messages of one singleton
  again at such distances that their tries take it a few percent of its time.
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

#: Seconds before the second try of a message; later ones come when it has waited twice as long.
FIRST_PAUSE = 0.1
#: Seconds between two tries of the message that is next in line, at most.
NEXT_PAUSE = 1.0
#: Seconds between two tries of another message, at most, if few wait.
LONGEST_PAUSE = 30.0
#: That, as a part of the time that it may wait; it is never less than NEXT_PAUSE.
PART_OF_TIMEOUT = 0.01
#: Seconds after its next try for which a message keeps its place, because it may meet a queue: at
#: least, at most, and as a part of the time that it may wait.
GRACE = 3.0
LONGEST_GRACE = 10.0
GRACE_OF_TIMEOUT = 0.02
#: Seconds after the lease of a holder that may be dead has run out.
AFTER_EXPIRY = 0.1


def is_behind_another(row: Row, task_id: str | None) -> bool:
    """Whether another message is next in line for the lease, which may be free.

    The claim of a message that is merely queued lasts for longer.
    """
    next_one, queued_in = row.queued_task_id, row.queued_in or 0.0
    return next_one not in (None, task_id) and queued_in <= NEXT_PAUSE + LONGEST_GRACE


def send_to_wait(conflict: Conflict) -> None:
    """Send a message again, to try later.

    :raises Ignore: it is sent.
    :raises Reject: it could not be sent.
    :raises LeaderHandoffFailed: it has waited for as long as it may.
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
    """Seconds until the message that is next in line tries again.

    :param waited: seconds since it is next in line. Each pause is about as long as all before it,
        because a lease that was just acquired may be free soon.
    """
    row = conflict.row
    pause = min(max(waited, FIRST_PAUSE), NEXT_PAUSE)
    if row is not None and row.held:
        # A holder that died is succeeded when its lease runs out.
        pause = min(pause, (row.expires_in or 0.0) + AFTER_EXPIRY)
    return pause


def _is_next(conflict: Conflict, pause: float) -> bool:
    """Whether the message is next in line, or can be from now on."""
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
