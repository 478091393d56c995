"""Entries of Celery's own kind, and of those that grew from it: what the store keeps of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery.utils.time import maybe_make_aware

from celery_singleton_state.schedules.due import next_due, spelled

from .entry_state import EntryState

#: How often a schedule with an ``is_due`` of its own is asked for one tick.
QUESTIONS = 500


def state_of(entry: Any, due: datetime | None, after: Any) -> EntryState:
    """An entry as it is to be stored.

    :param due: the tick that it was sent for, if it was; ``after``: the entry as it is after that.
    """
    return EntryState(
        entry=entry.name,
        task=entry.task,
        schedule=spelled(entry.schedule),
        next_tick=_next_tick(entry.schedule, after.last_run_at),
        last_tick=due,
        last_run_at=maybe_make_aware(after.last_run_at),
        total_run_count=after.total_run_count,
    )


def due_after(schedule: Any, moment: datetime) -> datetime:
    """The tick that follows a moment; the moment itself for a schedule that cannot tell."""
    moment = maybe_make_aware(moment)
    return _next_tick(schedule, moment) or moment


def _next_tick(schedule: Any, moment: datetime) -> datetime | None:
    """The next tick; ``None`` for a schedule that is never due again, or cannot tell."""
    try:
        return next_due(schedule, maybe_make_aware(moment), QUESTIONS)
    except Exception:  # the class evaluates for itself what is due, and says so
        return None


def count_from(entry: Any, last_run_at: datetime, total_run_count: int) -> None:
    """Set what an entry counts from, and its row's in a database of django-celery-beat's."""
    for each in (entry, getattr(entry, "model", None)):
        if each is not None:
            each.last_run_at = last_run_at
            each.total_run_count = total_run_count
