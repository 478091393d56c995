"""Handle one delivery: acquire the lease and run the body, or resolve it as a conflict, a duplicate
or a redelivery.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry

from celery_singleton_state import history
from celery_singleton_state.errors import SchemaDecodeFailed, SingletonError, StateLoadFailed
from celery_singleton_state.headers import REPLACES, header
from celery_singleton_state.history import Outcome
from celery_singleton_state.hooks import Conflicted, Skipped
from celery_singleton_state.lease.holder_files import HolderRecord
from celery_singleton_state.lease.lease import clock
from celery_singleton_state.message.coalesce import send_pending_run
from celery_singleton_state.message.delivery import DONE_BEFORE, Delivery
from celery_singleton_state.message.duplicates import end_duplicate, wait_for_record
from celery_singleton_state.message.enqueue_once import dequeue, dequeue_as_sent
from celery_singleton_state.message.place import find_place
from celery_singleton_state.message.resend import can_be_sent_again, end_copy, requeue, wait_on
from celery_singleton_state.message.reused_ids import warn_if_id_reused
from celery_singleton_state.recovery import free_holder, free_own
from celery_singleton_state.store.base import (
    Acquired,
    Row,
    StoreError,
    StoreRefusesValue,
    StoreUnavailable,
)

from .conflict import POLICIES, Conflict
from .run import Run
from .waiting import is_behind_another

#: Seconds until a copy of a retry looks again whether the run that asked for it has ended.
COPY_PAUSE = 0.2
#: How often a lease that was free again by the time of a second look is asked for.
ATTEMPTS = 3


@dataclass(slots=True)
class Claim:
    """What a delivery has asked the store for.

    :param may_hold: whether the holder may have the lease: it has, or a request whose answer was
        lost may have taken it.
    """

    delivery: Delivery
    body: Callable[..., Any]
    holder: str
    may_hold: bool = False


def deliver(delivery: Delivery, body: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run the body under the lease, or resolve a conflict, a duplicate or a redelivery.

    :param body: called with the arguments.
    :raises SingletonError: what went wrong.
    :raises Ignore: the message is put back, or was done before.
    """
    if delivery.pause_left > 0:
        wait_on(delivery.task, delivery.request, delivery.name, delivery.pause_left)
    runtime = delivery.runtime
    try:
        delivery.store, delivery.heartbeat = runtime.home_of(delivery.options)
    except StoreError as error:
        raise _not_loaded(delivery, error) from error
    claim = Claim(delivery, body, runtime.new_holder(delivery.request.hostname))
    # Noted before it is asked for: a process can die at any moment after that.
    holder_record = HolderRecord(delivery.key, claim.holder, delivery.generation, delivery.sent)
    slot = runtime.holder_files.note(holder_record)
    runtime.under_way.add(claim.holder)
    waited = 0.0
    try:
        while True:
            ended, result = _try(claim, args, kwargs, waited)
            if ended:
                return result
            time.sleep(result)
            waited += result
    finally:
        runtime.under_way.discard(claim.holder)
        if claim.may_hold:
            then = partial(send_pending_run, runtime.app, delivery.store, delivery.key)
            runtime.unreleased.add(delivery.store, delivery.key, claim.holder, slot, then)
        else:
            runtime.holder_files.clear(slot)


def _try(claim: Claim, args: Any, kwargs: Any, waited: float) -> tuple[bool, Any]:
    """Whether the delivery is over, and its result; or the seconds until it is tried again."""
    delivery = claim.delivery
    request, name = delivery.request, delivery.name
    if delivery.is_unrecorded:
        # It need not take the lease, which would be in the way of a delivery that wants to run.
        _wait_for_record(delivery, _peek(delivery))
    try:
        asked_at, acquired, row = _acquire(claim)
    except StateLoadFailed:
        raise  # it is retried
    except Exception:
        dequeue(delivery)
        raise
    if acquired is not None:
        return True, _run(claim, acquired, asked_at, args, kwargs)
    done = _wait_for_record(delivery, row)
    if done is not None:
        return True, _end_duplicate(delivery, done)
    if row is not None:
        entries = history.decode(row.history, name)
        if why := delivery.passed(entries, row.ticks_done):
            return True, _end_duplicate(delivery, None, why)
    if row is not None and row.held and row.task_id == request.id and delivery.is_copy:
        before = delivery.generation - 1
        if before >= 0 and not history.begun_by(entries, str(request.id), before, delivery.sent):
            # A retry through the exchange can be here before the run that asked for it has ended.
            return False, COPY_PAUSE
        return True, _end_duplicate(delivery, None)
    if row is not None and row.held and _is_of_holder(row, request):
        delivery.place.rank = row.fence
        if can_be_sent_again(delivery.task, request):
            requeue(delivery.task, request, name, delivery.resent)
    again = _conflict(Conflict(delivery, row, args, kwargs, waited, asked_at))
    return again is None, again


def _is_of_holder(row: Row, request: Context) -> bool:
    """Whether the lease is held for this message, or for one that it replaces.

    A replacement can be here before the run that it replaces has given its lease back.
    """
    return row.task_id is not None and row.task_id in (request.id, header(request, REPLACES))


def _run(claim: Claim, acquired: Acquired, asked_at: float, args: Any, kwargs: Any) -> Any:
    """Run the body, unless its message or its tick was done before."""
    delivery = claim.delivery
    delivery.place.rank = acquired.lease.fence
    if delivery.options.enqueue_once:
        dequeue_as_sent(delivery)
    run = Run(delivery, acquired, asked_at)
    try:
        done = delivery.done_by(run.entries) if run.entries and delivery.request.id else None
        why = DONE_BEFORE if done else None
        if why is None and delivery.tick is not None:
            why = delivery.passed(run.entries, acquired.ticks_done)
        if why is None:
            if run.entries and delivery.request.id:
                run.refuse_poison()
            return run.execute(claim.body, args, kwargs)
        # Of a copy that is requeued nothing is noted: the lease is given back as it was.
        wait_for_record(delivery, done, acquired.acquired_at)
        run.end_as_duplicate(done)
    finally:
        claim.may_hold = not run.given_back
    return _end_duplicate(delivery, done, why)


def _not_loaded(delivery: Delivery, error: StoreError) -> SingletonError:
    """The error of a delivery that the store did not serve: one that can pass is retried."""
    is_of_value = isinstance(error, StoreRefusesValue)
    return (SchemaDecodeFailed if is_of_value else StateLoadFailed)(delivery.name, str(error))


def _peek(delivery: Delivery) -> Row | None:
    try:
        return delivery.store.peek(delivery.key)
    except StoreError as error:
        raise _not_loaded(delivery, error) from error


def _wait_for_record(delivery: Delivery, row: Row | None) -> history.Entry | None:
    """The run that did what the message asks for, if the row knows one.

    :raises Ignore: it ended so recently that the message is requeued.
    """
    if row is None:
        return None
    done = delivery.done_by(history.decode(row.history, delivery.name))
    wait_for_record(delivery, done, row.read_at)
    return done


def _end_duplicate(delivery: Delivery, done: history.Entry | None, why: str = DONE_BEFORE) -> Any:
    """End a message that was done before.

    :param done: the run that did it, if it is known.
    :raises Ignore: what comes after the first delivery is known to have happened; or the run sent
        a message with its id, a replacement for instance, whose result it will be.
    """
    request, tick, is_copy = delivery.request, delivery.tick, delivery.is_copy
    if is_copy:
        why = "runs or has run as another copy"
    delivery.emit(
        Skipped,
        outcome=Outcome.DUPLICATE,
        why=f"task {request.id} {why}" + (f", for tick {tick}" if tick else ""),
        tick=tick.entry if tick else None,
    )
    if is_copy:
        end_copy(request, delivery.name)
    if done is not None and not done.final:
        raise Ignore(f"task {request.id} goes on in another message")
    dequeue(delivery)
    warn_if_id_reused(delivery)
    return end_duplicate(delivery, done)


def _conflict(conflict: Conflict) -> float | None:
    """Do as the policy says; the message is queued no more unless it comes again."""
    delivery = conflict.delivery
    policy = delivery.on_conflict
    if not (delivery.waited or conflict.waited):
        delivery.emit(Conflicted, policy=policy, found=conflict.holder)
    try:
        again = POLICIES[policy](conflict)
    except (Ignore, Reject, Retry):
        raise  # it comes again
    except StoreError as error:
        raise _not_loaded(delivery, error) from error
    except Exception:
        dequeue(delivery)
        raise
    if again is None:
        dequeue(delivery)
    return again


def _acquire(claim: Claim) -> tuple[float, Acquired | None, Row | None]:
    """Take the lease; the row of whoever holds it where that fails.

    A request whose answer was lost is repeated in the same holder's name, and so answered with
    what it took already.

    :raises StateLoadFailed: the store is out of reach.
    :raises SchemaDecodeFailed: the store can hold no such key, or no larger fence.
    """
    delivery = claim.delivery
    until = clock() + delivery.first_ttl

    def ask() -> tuple[float, Acquired | None, Row | None]:
        if delivery.on_conflict == "replace":
            find_place(delivery)
        elif delivery.on_conflict == "wait" and (seen := _still_taken(claim)) is not None:
            return until - delivery.first_ttl, None, seen
        for _ in range(ATTEMPTS):
            asked_at, acquired = _ask(claim)
            if acquired is not None:
                return asked_at, acquired, None
            # A run's own retry can be here before that run has given its lease back, and must
            # not be taken for a conflict when it has by now.
            row = delivery.store.peek(delivery.key)
            if row is not None and row.held and not _is_freed(delivery, row):
                break
            if row is not None and delivery.place.is_below(row):
                break
        return asked_at, None, row

    try:
        try:
            return ask()
        except StoreUnavailable:
            # The connection may have died in the pool: once more, over a new one.
            if clock() >= until:
                raise
            return ask()
    except StoreError as error:
        raise _not_loaded(delivery, error) from error


def _still_taken(claim: Claim) -> Row | None:
    """The row, if a message that waited must go on waiting.

    It only reads: of many messages that wait, few find the lease free. A free one is left to the
    message that is next in line, but for the last try.
    """
    delivery = claim.delivery
    if not delivery.waited or claim.may_hold:
        return None
    row = delivery.store.peek(delivery.key)
    if row is None:
        return None
    if row.held:
        return None if _is_freed(delivery, row) else row
    has_time = delivery.waited < delivery.conflict_timeout
    return row if has_time and is_behind_another(row, delivery.request.id) else None


def _is_freed(delivery: Delivery, row: Row) -> bool:
    """Free a lease that nobody runs under: its holder's process has died, or is this one and has
    ended the run.
    """
    runtime = delivery.runtime
    return free_holder(runtime, row.holder) or free_own(runtime, row, delivery.store)


def _ask(claim: Claim) -> tuple[float, Acquired | None]:
    """Ask for the lease, for its short first life; confirm it if its whole life is longer.

    :returns: the time before the request by which the lease is trusted, and the lease.
    """
    delivery, store = claim.delivery, claim.delivery.store
    asked_at, may_have_held = clock(), claim.may_hold
    claim.may_hold = True
    place = delivery.place
    acquired = store.acquire(
        delivery.key,
        claim.holder,
        delivery.first_ttl,
        delivery.request.id,
        place.rank or 0,
        place.sent,
        delivery.task.name,
    )
    if acquired is None:
        # An earlier request, whose answer was lost, may still take it.
        claim.may_hold = may_have_held
        return asked_at, None
    if delivery.ttl <= delivery.first_ttl:
        return asked_at, acquired
    asked_at, lease = clock(), replace(acquired.lease, ttl=delivery.ttl)
    confirmed = delivery.key in store.renew([lease])
    return asked_at, replace(acquired, lease=lease) if confirmed else None
