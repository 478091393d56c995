"""What a delivery does that finds the lease taken: one function for each policy.

A policy ends the delivery by coming back, fails it by raising, or tries again: as a message of its
own, which frees the worker, or in place where there is no message. How long it has waited it
knows from what it waited for itself; time in a queue does not count.
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

#: Seconds before the second try of one that waits in place; doubled up to the longest, jittered.
FIRST_WAIT = 0.1
LONGEST_WAIT = 4.0
#: Seconds between two looks of one that asked the holder to hand over.
HANDOVER_WAIT = 0.2
#: Seconds after a hold period for which the message that waits for its end counts as queued: for
#: longer than one that is next in line, by which it is told from that.
LIFE_AFTER_HOLD = NEXT_PAUSE + LONGEST_GRACE + LONGEST_WAIT


@dataclass(frozen=True, slots=True)
class Conflict:
    """A delivery that found the lease of its singleton taken.

    :param row: the row as it was seen just after; it may have changed since.
    :param waited: seconds that it has waited in place.
    :param asked_at: when it asked for the lease, on
        :data:`~celery_singleton_state.lease.lease.clock`.
    """

    delivery: Delivery
    row: Row | None
    args: Any
    kwargs: Any
    waited: float
    asked_at: float

    def time_left(self) -> float:
        """Seconds that it may go on waiting.

        :raises LeaderHandoffFailed: none.
        """
        delivery = self.delivery
        left = delivery.conflict_timeout - delivery.waited - self.waited
        if left <= 0:
            raise LeaderHandoffFailed(
                self.singleton,
                f"not obtained within {delivery.conflict_timeout:g} s; {self.holder}",
            )
        return left

    @property
    def singleton(self) -> str:
        """The singleton's name."""
        return self.delivery.name

    @property
    def holder(self) -> str:
        """Who holds the lease, for how long, for people."""
        row = self.row
        if row is None or row.expires_in is None:
            return "held by another run until a moment ago"
        if row.holder is None:
            return f"in the hold period after its last run for {max(row.expires_in, 0):.1f} s more"
        return (
            f"held by {row.holder} for task {row.task_id or '(called directly)'}, "
            f"lease runs out in {max(row.expires_in, 0):.1f} s unless renewed"
        )


def skip(conflict: Conflict) -> None:
    """The delivery succeeds with ``None``.

    :raises SingletonError: a try of an eager run whose earlier try failed: nothing was done.
    """
    if conflict.delivery.earlier.error is not None:
        raise conflict.delivery.earlier.error
    _emit_skipped(conflict, "skipped")


def refuse(conflict: Conflict) -> None:
    """The delivery fails."""
    raise LeaderHandoffFailed(conflict.singleton, conflict.holder)


def wait(conflict: Conflict) -> float | None:
    """The delivery is tried again until the lease is free."""
    if can_be_sent_again(conflict.delivery.task, conflict.delivery.request):
        send_to_wait(conflict)
    waited = conflict.delivery.waited + conflict.waited
    # Each wait is about as long as all before it.
    return _try_again(conflict, min(max(waited, FIRST_WAIT), LONGEST_WAIT))


def replace(conflict: Conflict) -> float | None:
    """The delivery gives up if a newer message came. Otherwise it asks the holder to stop, once,
    and is tried again until the holder has stopped.
    """
    row, delivery = conflict.row, conflict.delivery
    place = delivery.place
    if row is None:
        return _try_again(conflict, HANDOVER_WAIT)
    if is_older(delivery, row):
        _give_up(conflict, newest_in(row))
        return None
    if place.is_below(row):
        # What came into the row since was no newer run, so the message is the newest still.
        place.rank = row.rank
        return 0.0
    if row.held and row.newest < (place.rank or row.next_rank):
        had_rank = place.rank is not None
        place.rank = place.rank or row.next_rank
        asking = delivery.request.id or a_direct_call()
        requests = delivery.store.requests
        if not requests.request_handoff(row, asking, place.rank, place.sent):
            # Another message asked before, or the holder has changed: look again.
            place.rank = place.rank if had_rank else None
            return 0.0
    return _try_again(conflict, HANDOVER_WAIT)


def _give_up(conflict: Conflict, newer: str) -> None:
    """The delivery succeeds with ``None``, in favour of a newer message.

    :raises Ignore: its result is stored, by the run that the newer message replaced.
    """
    delivery = conflict.delivery
    why = f"skipped: replaced by {newer}, which is newer"
    delivery.emit(Skipped, outcome=Outcome.SKIPPED, why=why)
    dequeue(delivery)
    if result_is_stored(delivery):
        raise Ignore(f"task {delivery.request.id} has ended before")


def coalesce(conflict: Conflict) -> float | None:
    """The delivery succeeds with ``None``, and one more run is sent when the lease is released."""
    row, delivery = conflict.row, conflict.delivery
    if row is None:
        return 0.0
    requests = delivery.store.requests
    if row.in_hold_period:
        # Nobody is there to send it: the first one waits for the end, the others rely on it.
        left = max(row.expires_in or 0.0, 0.0)
        if not can_be_sent_again(delivery.task, delivery.request):
            return _try_again(conflict, left)
        task_id, life = str(delivery.request.id), left + LIFE_AFTER_HOLD
        # A run that has begun since says nothing of the arguments of this message.
        found = claim(delivery.task, row.key, task_id, life, beside_run=True)
        if found in (None, task_id) or is_behind_another(row, task_id):
            send_again(delivery.task, delivery.request, delivery.name, left)
    elif not requests.request_run(row, pending_run_for(delivery, conflict.args, conflict.kwargs)):
        return 0.0
    _emit_skipped(conflict, "skipped, and one more run is wanted")
    return None


def _emit_skipped(conflict: Conflict, what: str) -> None:
    conflict.delivery.emit(Skipped, outcome=Outcome.SKIPPED, why=f"{what}: {conflict.holder}")


def _try_again(conflict: Conflict, pause: float) -> float:
    """Send the message again, or return the seconds after which to try in place.

    :raises LeaderHandoffFailed: it has waited for as long as it may.
    """
    delivery = conflict.delivery
    waited = delivery.waited + conflict.waited
    left = conflict.time_left()
    pause *= random.uniform(0.75, 1.25)
    if conflict.row is not None and conflict.row.held:
        # A holder that died is succeeded when its lease runs out, and not when the wait is over.
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


#: The policies that ``on_conflict`` names. One that wants another try in place returns the seconds
#: until then.
POLICIES: Mapping[str, Callable[[Conflict], float | None]] = {
    "skip": skip,
    "wait": wait,
    "raise": refuse,
    "replace": replace,
    "coalesce": coalesce,
}
