"""What a run and a client send to a store, as they number it."""

from __future__ import annotations

from celery_singleton_state.store.base import TAKEN_OVER, NewValue, RowRequests, Write


def write(new: NewValue, number: int = 1, seen: int | None = None) -> Write:
    """A write of a run, all of whose earlier writes were answered if nothing else is said."""
    if seen is None:
        seen = number - 1 if number > 1 else TAKEN_OVER
    return Write(number, seen, new)


def enqueue(requests: RowRequests, key: str, task_id: str, life: float) -> str:
    """Look who is queued and claim the queue if nobody is, as a client does.

    :returns: the id of the message that is queued or running.
    """
    for _ in range(1000):
        seen = requests.queued(key)
        if seen.task_id is not None:
            return seen.task_id
        if requests.claim(key, task_id, life, seen.number):
            return task_id
    raise AssertionError(f"{key} changed at each look")
