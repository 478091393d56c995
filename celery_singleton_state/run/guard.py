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

#: Seconds between two tries of a message that arrived too early: the message is a fanout exchange's
#: copy of a retry, and the run that sent the retry has not ended yet.
COPY_PAUSE = 0.2
#: The largest number of requests for a lease in one try. A request is repeated if the store refused
#: it, but the row, read just after that, shows a free lease.
ATTEMPTS = 3


@dataclass(slots=True)
class Claim:
    """A delivery's request for the lease.

    :param body: the task's body.
    :param holder: the name under which the delivery asks for the lease.
    :param may_hold: whether this holder may have the lease: it has acquired the lease, or the
        answer to a request for the lease was lost.
    """

    delivery: Delivery
    body: Callable[..., Any]
    holder: str
    may_hold: bool = False


def deliver(delivery: Delivery, body: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run the body under the lease, or resolve a conflict, a duplicate or a redelivery.

    :param body: the task's body; called with ``args`` and ``kwargs``.
    :returns: the body's result, or what the conflict policy or the duplicate gives in its place.
    :raises SingletonError: the delivery failed; the error's class gives the reason.
    :raises Ignore: the message is requeued, or its work was done before.
    """
    if delivery.pause_left > 0:
        wait_on(delivery.task, delivery.request, delivery.name, delivery.pause_left)
    runtime = delivery.runtime
    try:
        delivery.store, delivery.heartbeat = runtime.home_of(delivery.options)
    except StoreError as error:
        raise _not_loaded(delivery, error) from error
    claim = Claim(delivery, body, runtime.new_holder(delivery.request.hostname))
    # Note the lease in the holder file before asking for it, because the process can die at any
    # time after the request.
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
    """Try once to run the delivery.

    :param waited: seconds that the delivery has waited between the tries before this one.
    :returns: true and the delivery's result; or false and the seconds until the next try.
    """
    delivery = claim.delivery
    request, name = delivery.request, delivery.name
    if delivery.is_unrecorded:
        # Read the row before asking for the lease: if the work was done, the row says so. In that
        # case, acquiring the lease would only delay another delivery that wants to run.
        _wait_for_record(delivery, _peek(delivery))
    try:
        asked_at, acquired, row = _acquire(claim)
    except StateLoadFailed:
        raise  # the message is retried, so it stays queued
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
            # This message is a copy of a retry, and the run that sent the retry has not ended yet.
            # So wait for its end.
            return False, COPY_PAUSE
        return True, _end_duplicate(delivery, None)
    if row is not None and row.held and _is_of_holder(row, request):
        delivery.place.rank = row.fence
        if can_be_sent_again(delivery.task, request):
            requeue(delivery.task, request, name, delivery.resent)
    again = _conflict(Conflict(delivery, row, args, kwargs, waited, asked_at))
    return again is None, again


def _is_of_holder(row: Row, request: Context) -> bool:
    """Return whether the holder runs this same message, or a message that this one replaces.

    A replacement can arrive before the run that it replaces has released the lease.
    """
    return row.task_id is not None and row.task_id in (request.id, header(request, REPLACES))


def _run(claim: Claim, acquired: Acquired, asked_at: float, args: Any, kwargs: Any) -> Any:
    """Run the body under the acquired lease, unless its message or tick was done before."""
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
        # If the next call requeues the message, the lease is released and no run is recorded,
        # because the message has not ended.
        wait_for_record(delivery, done, acquired.acquired_at)
        run.end_as_duplicate(done)
    finally:
        claim.may_hold = not run.given_back
    return _end_duplicate(delivery, done, why)


def _not_loaded(delivery: Delivery, error: StoreError) -> SingletonError:
    """Make the error of a delivery whose request the store did not carry out.

    It is ``SchemaDecodeFailed`` if the store cannot hold a value, else ``StateLoadFailed``, after
    which the message is retried.
    """
    is_of_value = isinstance(error, StoreRefusesValue)
    return (SchemaDecodeFailed if is_of_value else StateLoadFailed)(delivery.name, str(error))


def _peek(delivery: Delivery) -> Row | None:
    try:
        return delivery.store.peek(delivery.key)
    except StoreError as error:
        raise _not_loaded(delivery, error) from error


def _wait_for_record(delivery: Delivery, row: Row | None) -> history.Entry | None:
    """Return the run that did the message's work, if the row's history has one.

    :raises Ignore: that run ended so recently that its result may not be stored yet; the message is
        requeued.
    """
    if row is None:
        return None
    done = delivery.done_by(history.decode(row.history, delivery.name))
    wait_for_record(delivery, done, row.read_at)
    return done


def _end_duplicate(delivery: Delivery, done: history.Entry | None, why: str = DONE_BEFORE) -> Any:
    """End a message whose work was done before.

    :param done: the run that did the work, if it is known.
    :param why: the reason, for the event.
    :returns: the message's result.
    :raises Ignore: nothing more is to be done: Celery has stored the result and sent the rest of
        the chain, or another message with the same task id will do so, a replacement for example.
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
    """Resolve a conflict by the task's policy.

    :returns: seconds until the next try; ``None`` if the delivery has ended.
    """
    delivery = conflict.delivery
    policy = delivery.on_conflict
    if not (delivery.waited or conflict.waited):
        delivery.emit(Conflicted, policy=policy, found=conflict.holder)
    try:
        again = POLICIES[policy](conflict)
    except (Ignore, Reject, Retry):
        raise  # the message comes again or was replaced, so it is not dequeued
    except StoreError as error:
        raise _not_loaded(delivery, error) from error
    except Exception:
        dequeue(delivery)
        raise
    if again is None:
        dequeue(delivery)
    return again


def _acquire(claim: Claim) -> tuple[float, Acquired | None, Row | None]:
    """Acquire the lease, or read the row that says why it is not free.

    If the answer to a request is lost, the request is repeated in the same holder's name. Then the
    answer names the lease that the first request may have taken.

    :returns: the clock just before the request; the lease, or ``None`` if it was refused; and the
        row, or ``None`` if the lease was acquired or there is no row.
    :raises StateLoadFailed: the store is unavailable.
    :raises SchemaDecodeFailed: the store cannot hold such a key, or no larger fence.
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
            # The lease may have become free since the refusal. For example, a run's own retry can
            # arrive just before that run releases the lease, and that must not count as a conflict.
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
            # The pooled connection may have died, so send the request once more over a new
            # connection.
            if clock() >= until:
                raise
            return ask()
    except StoreError as error:
        raise _not_loaded(delivery, error) from error


def _still_taken(claim: Claim) -> Row | None:
    """Return the row if a message must keep waiting; ``None`` if it may try to get the lease.

    The function only reads the row, because most tries of waiting messages find the lease taken. A
    free lease is left to the message that is next in line, except in the last try.
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
    """Free a lease whose run has ended without a release; return whether the lease may be free now.

    Either the holder's process has died, or the holder is this process and its release has failed.
    """
    runtime = delivery.runtime
    return free_holder(runtime, row.holder) or free_own(runtime, row, delivery.store)


def _ask(claim: Claim) -> tuple[float, Acquired | None]:
    """Ask for the lease with its short first life, and renew it if its whole life is longer.

    :returns: the clock just before the last request, from which the lease's life counts; and the
        lease, or ``None`` if the store refused it.
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
        # The refused request took no lease. But an earlier request, whose answer was lost, may have
        # taken the lease or may still take it.
        claim.may_hold = may_have_held
        return asked_at, None
    if delivery.ttl <= delivery.first_ttl:
        return asked_at, acquired
    asked_at, lease = clock(), replace(acquired.lease, ttl=delivery.ttl)
    confirmed = delivery.key in store.renew([lease])
    return asked_at, replace(acquired, lease=lease) if confirmed else None
