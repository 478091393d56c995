"""Resolve conflicts: each policy's function says what to do when a delivery finds the lease taken.

A policy's function has three ways to resolve a conflict:

- It returns ``None``: the delivery ends, successfully.
- It raises a ``LeaderHandoffFailed``: the delivery fails.
- It tries again later. It requeues the message (and raises ``Ignore``), so that the worker is free
  meanwhile. If there is no message that could be requeued, it returns the seconds until the next
  try, which the caller waits.

The time that a delivery has waited is the sum of the pauses that policies gave it. Other time in a
queue does not count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from celery.exceptions import Ignore

from celery_singleton_state.errors import LeaderHandoffFailed
from celery_singleton_state.headers import WAITED
from celery_singleton_state.history import Outcome
from celery_singleton_state.hooks import Skipped
from celery_singleton_state.message.coalesce import pending_run_for
from celery_singleton_state.message.delivery import Delivery
from celery_singleton_state.message.duplicates import result_is_stored
from celery_singleton_state.message.enqueue_once import claim, dequeue
from celery_singleton_state.message.place import a_direct_call, is_older, newest_in
from celery_singleton_state.message.resend import can_be_sent_again, send_again
from celery_singleton_state.store.base import Row

from .waiting import AFTER_EXPIRY, LONGEST_GRACE, NEXT_PAUSE, is_behind_another, send_to_wait

#: Seconds before the second try of a delivery that waits in this process, because it has no message
#: to requeue. Later pauses grow up to LONGEST_WAIT, and all are jittered.
FIRST_WAIT = 0.1
LONGEST_WAIT = 4.0
#: Seconds between two tries of a delivery that has asked the holder to hand over.
HANDOFF_WAIT = 0.2
#: A message that waits for the end of a hold period counts as queued until this many seconds after
#: that end. A message that is next in line counts as queued for a shorter time: the
#: difference tells the two kinds of messages apart.
LIFE_AFTER_HOLD = NEXT_PAUSE + LONGEST_GRACE + LONGEST_WAIT


@dataclass(frozen=True, slots=True)
class Conflict:
    """A delivery that found the lease of its singleton taken.

    :param row: the row as it was read just after the refusal; ``None`` if there was no row.
    :param args, kwargs: the arguments of the body.
    :param waited: seconds that the delivery has waited in this process, without being requeued.
    :param asked_at: when the delivery asked for the lease, on
        :data:`~celery_singleton_state.lease.lease.clock`.
    """

    delivery: Delivery
    row: Row | None
    args: Any
    kwargs: Any
    waited: float
    asked_at: float

    def time_left(self) -> float:
        """Return the seconds that the delivery may still wait; they are more than 0.

        :raises LeaderHandoffFailed: the delivery has waited for its ``conflict_timeout``.
        """
        delivery = self.delivery
        left = delivery.conflict_timeout - delivery.waited - self.waited
        if left <= 0:
            raise LeaderHandoffFailed(
                self.singleton,
                f"lease not obtained within {delivery.conflict_timeout:g} s; {self.holder}",
            )
        return left

    @property
    def singleton(self) -> str:
        """The singleton's name."""
        return self.delivery.name

    @property
    def holder(self) -> str:
        """A text for people: which run holds the lease, and for how long."""
        row = self.row
        if row is None or row.expires_in is None:
            return "held by another run until a moment ago"
        if row.holder is None:
            return f"in the hold period after its last run for {max(row.expires_in, 0):.1f} s more"
        return (
            f"held by {row.holder} for task {row.task_id or '(called directly)'}, "
            f"lease expires in {max(row.expires_in, 0):.1f} s unless renewed"
        )


def skip(conflict: Conflict) -> None:
    """Policy ``"skip"``: the delivery succeeds with ``None``.

    :raises SingletonError: this is a retry of an eager run; its earlier error is raised again,
        because the work was not done.
    """
    if conflict.delivery.earlier.error is not None:
        raise conflict.delivery.earlier.error
    _emit_skipped(conflict, "skipped")


def refuse(conflict: Conflict) -> None:
    """Policy ``"raise"``: the delivery fails.

    :raises LeaderHandoffFailed: always.
    """
    raise LeaderHandoffFailed(conflict.singleton, conflict.holder)


def wait(conflict: Conflict) -> float | None:
    """Policy ``"wait"``: the delivery is tried again until it gets the lease or times out."""
    if can_be_sent_again(conflict.delivery.task, conflict.delivery.request):
        send_to_wait(conflict)
    waited = conflict.delivery.waited + conflict.waited
    # Each pause is about as long as all earlier pauses together, so that long waits need few tries.
    return _try_again(conflict, min(max(waited, FIRST_WAIT), LONGEST_WAIT))


def replace(conflict: Conflict) -> float | None:
    """Policy ``"replace"``: the delivery asks the holder to hand over, and waits for the lease.

    The holder is asked once. If a newer message of the singleton has come, the delivery gives up.
    """
    row, delivery = conflict.row, conflict.delivery
    place = delivery.place
    if row is None:
        return _try_again(conflict, HANDOFF_WAIT)
    if is_older(delivery, row):
        _give_up(conflict, newest_in(row))
        return None
    if place.is_below(row):
        # The row's rank has grown without a newer message: by the acquisition of a duplicate, for
        # example. So this message is still the newest, and takes the row's rank.
        place.rank = row.rank
        return 0.0
    if row.held and row.newest < (place.rank or row.next_rank):
        had_rank = place.rank is not None
        place.rank = place.rank or row.next_rank
        asking = delivery.request.id or a_direct_call()
        requests = delivery.store.requests
        if not requests.request_handoff(row, asking, place.rank, place.sent):
            # Another message asked first, or the holder has changed: read the row again at once.
            place.rank = place.rank if had_rank else None
            return 0.0
    return _try_again(conflict, HANDOFF_WAIT)


def _give_up(conflict: Conflict, newer: str) -> None:
    """End the delivery with ``None``, because a newer message replaces it.

    :raises Ignore: this message ran before and its result is stored, so it must not be overwritten.
    """
    delivery = conflict.delivery
    why = f"skipped: replaced by {newer}, which is newer"
    delivery.emit(Skipped, outcome=Outcome.SKIPPED, why=why)
    dequeue(delivery)
    if result_is_stored(delivery):
        raise Ignore(f"task {delivery.request.id} has ended before")


def coalesce(conflict: Conflict) -> float | None:
    """Policy ``"coalesce"``: note a pending run in the row; the delivery succeeds with ``None``.

    The holder sends the pending run's message when it releases the lease. In a hold period there is
    no holder. Then the first message waits for the end of the period, and later messages end,
    because the first one brings the run that they ask for.
    """
    row, delivery = conflict.row, conflict.delivery
    if row is None:
        return 0.0
    requests = delivery.store.requests
    if row.in_hold_period:
        left = max(row.expires_in or 0.0, 0.0)
        if not can_be_sent_again(delivery.task, delivery.request):
            return _try_again(conflict, left)
        task_id, life = str(delivery.request.id), left + LIFE_AFTER_HOLD
        # Note this message as queued even if a run has begun since the row was read. That run may
        # have other arguments, so it does not replace the run of this message.
        found = claim(delivery.task, row.key, task_id, life, beside_run=True)
        if found in (None, task_id) or is_behind_another(row, task_id):
            send_again(delivery.task, delivery.request, delivery.name, left)
    elif not requests.request_run(row, pending_run_for(delivery, conflict.args, conflict.kwargs)):
        return 0.0
    _emit_skipped(conflict, "skipped, and one more run is pending")
    return None


def _emit_skipped(conflict: Conflict, what: str) -> None:
    conflict.delivery.emit(Skipped, outcome=Outcome.SKIPPED, why=f"{what}: {conflict.holder}")


def _try_again(conflict: Conflict, pause: float) -> float:
    """Requeue the message, or return the seconds until the caller should try again.

    :param pause: seconds until the next try, before jitter and limits.
    :raises Ignore: the message was requeued.
    :raises LeaderHandoffFailed: the delivery has waited for its ``conflict_timeout``.
    """
    delivery = conflict.delivery
    waited = delivery.waited + conflict.waited
    left = conflict.time_left()
    pause *= random.uniform(0.75, 1.25)
    if conflict.row is not None and conflict.row.held:
        # Do not pause for longer than until the holder's lease expires: if the holder has died, the
        # lease is free then.
        pause = min(pause, (conflict.row.expires_in or 0.0) + AFTER_EXPIRY)
    pause = min(pause, left)
    if can_be_sent_again(delivery.task, delivery.request):
        send_again(
            delivery.task,
            delivery.request,
            delivery.name,
            pause,
            {**delivery.resent, WAITED: waited + pause},
        )
    return pause


#: Maps each value of the option ``on_conflict`` to its function. The function returns the seconds
#: until the next try in this process; ``None`` if the delivery has ended.
POLICIES: Mapping[str, Callable[[Conflict], float | None]] = {
    "skip": skip,
    "wait": wait,
    "raise": refuse,
    "replace": replace,
    "coalesce": coalesce,
}
