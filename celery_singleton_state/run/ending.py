"""The end of a run: its outcome, and the record of ended ticks that its row keeps."""

from __future__ import annotations

import logging

from celery.exceptions import Ignore, Reject, Retry

from celery_singleton_state import history, ticks_done
from celery_singleton_state.config.retry import RetryAfter
from celery_singleton_state.errors import HeartbeatFailed, SingletonError
from celery_singleton_state.history import Outcome
from celery_singleton_state.message.delivery import Delivery
from celery_singleton_state.message.resend import means_to_kill
from celery_singleton_state.text.visible import logger_of
from celery_singleton_state.ticks import Tick
from celery_singleton_state.ticks_done import EntryTicks

logger = logger_of(__name__)

#: The largest number of spans of done ticks that a row keeps for one schedule entry. (In a span,
#: all ticks that were sent are done.) The number is larger with the policies "wait" and "replace",
#: because there messages of ticks can overtake each other and leave gaps. With other policies, a
#: gap is nearly always a skipped tick.
SPANS_OF_WAITING, SPANS = 1000, 300


def outcome_of(error: BaseException, delivery: Delivery, replaced_itself: bool) -> Outcome:
    """Return the outcome of a run whose body raised an error.

    :param replaced_itself: whether the body has replaced itself.
    """
    if replaced_itself and isinstance(error, Ignore):
        return Outcome.SUCCEEDED
    if isinstance(error, Retry):
        return Outcome.RETRIED
    if isinstance(error, Ignore):
        return Outcome.SKIPPED
    return Outcome.LOST if is_of_lease(error, delivery) else Outcome.FAILED


def is_of_lease(error: BaseException, delivery: Delivery) -> bool:
    """Return whether the error says that this delivery's run lost its lease or hands it over."""
    return isinstance(error, HeartbeatFailed) and error.singleton == delivery.name


def is_for_good(error: BaseException, delivery: Delivery) -> bool:
    """Return whether this error ends the message, so that the message does not come again."""
    if isinstance(error, Reject):
        return not getattr(error, "requeue", False)
    if isinstance(error, Retry) or not isinstance(error, Exception) or means_to_kill(error):
        return False
    if isinstance(error, SingletonError) and error.singleton == delivery.name:
        return not isinstance(delivery.answer_to(error), RetryAfter)
    return True


def ticks_after(
    delivery: Delivery,
    entry: history.Entry,
    raw: str | None,
    handed_over: bool,
    replaced_itself: bool,
    continues: bool,
) -> str | None:
    """Return the new record of ended ticks for the row; ``None`` if the run does not change it.

    If a run lost its lease, its tick has not ended, and the beat sends the tick again. If the run
    was asked to hand over to a newer message, its tick has ended and does not come again.

    :param entry: the run's entry in the history.
    :param raw: the record that the row has before the run ends, as JSON.
    :param handed_over: whether the run was asked to hand over to a newer message.
    :param replaced_itself: whether the run's body has replaced itself.
    :param continues: for a run that has replaced itself: whether its tick continues in the new
        message.
    """
    tick, outcome = entry.tick, entry.outcome
    if tick is None or (outcome == Outcome.LOST and not handed_over):
        return None
    known, before = delivery.ticks_of(raw)
    if replaced_itself and continues and outcome in history.DONE:
        after = before.with_retried(tick.due)
    elif outcome in history.DONE and (entry.final or replaced_itself):
        after = _with_done(delivery, before, tick)
    elif outcome == Outcome.DUPLICATE:
        return None
    elif entry.final or handed_over:
        after = before.with_failed(tick.due)
    else:
        after = before.with_retried(tick.due)
    return None if after == before else ticks_done.encode(known, tick, after)


def _with_done(delivery: Delivery, before: EntryTicks, tick: Tick) -> EntryTicks:
    after = before.with_done(tick.due, delivery.previous)
    waits = delivery.on_conflict in ("wait", "replace")
    kept = after.with_at_most(SPANS_OF_WAITING if waits else SPANS)
    if kept is not after:
        logger.log(
            logging.WARNING if waits else logging.INFO,
            "singleton %s: the record of done ticks of schedule entry %s has too many gaps; from "
            "now on the oldest missing ticks count as done",
            delivery.name,
            tick.entry,
        )
    return kept
