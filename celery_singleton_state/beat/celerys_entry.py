"""Store and restore the entries of other scheduler classes: Celery's own and subclasses of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery.utils.time import maybe_make_aware

from celery_singleton_state.schedules.due import next_due, spelled

from .entry_state import EntryState

#: How often, at most, a schedule whose class overrides ``is_due`` is asked to find its next tick.
QUESTIONS = 500


def state_of(entry: Any, due: datetime | None, after: Any) -> EntryState:
    """Return the state of an entry as the store keeps it.

    :param entry: the entry.
    :param due: the tick for which the entry was sent; ``None`` if it was not sent.
    :param after: the entry object after the sending; the same object if the entry was not sent.
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
    """Return the first tick after a time; the time itself if no such tick is known."""
    moment = maybe_make_aware(moment)
    return _next_tick(schedule, moment) or moment


def _next_tick(schedule: Any, moment: datetime) -> datetime | None:
    """Return the first tick after a time; ``None`` if the schedule is never due again, or if it
    cannot tell its ticks.
    """
    try:
        return next_due(schedule, maybe_make_aware(moment), QUESTIONS)
    except Exception:  # the scheduler class asks the schedule itself, and reports its errors
        return None


def count_from(entry: Any, last_run_at: datetime, total_run_count: int) -> None:
    """Set the last run time and the count of runs of an entry.

    An entry of django-celery-beat also has a model of its database row. The model is set, too.
    """
    for each in (entry, getattr(entry, "model", None)):
        if each is not None:
            each.last_run_at = last_run_at
            each.total_run_count = total_run_count
