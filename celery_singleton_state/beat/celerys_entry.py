"""Store and restore the schedule entries of Celery's own scheduler classes and their subclasses."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery.utils.time import maybe_make_aware

from celery_singleton_state.schedules.due import next_due, spelled

from .entry_state import EntryState

#: How often ``is_due`` is called at most to find the next tick of a schedule whose class overrides
#: ``is_due``.
QUESTIONS = 500


def state_of(entry: Any, due: datetime | None, after: Any) -> EntryState:
    """Return the state of an entry as the store keeps it.

    :param entry: the entry.
    :param due: the tick for which the entry was sent; ``None`` if it was not sent.
    :param after: the new entry object that Celery has made by sending the entry; ``entry`` itself
        if the entry was not sent.
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
    except Exception:  # not logged here: the scheduler class asks the schedule, too, and logs it
        return None


def count_from(entry: Any, last_run_at: datetime, total_run_count: int) -> None:
    """Set the last run time and the count of runs of an entry.

    An entry of django-celery-beat also has a model of its database row. The model gets both values,
    too.
    """
    for each in (entry, getattr(entry, "model", None)):
        if each is not None:
            each.last_run_at = last_run_at
            each.total_run_count = total_run_count
