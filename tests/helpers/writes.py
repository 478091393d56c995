"""Numbered writes and claims, as runs and clients send them to a store."""

from __future__ import annotations

from celery_singleton_state.store.base import TAKEN_OVER, NewValue, RowRequests, Write


def write(new: NewValue, number: int = 1, seen: int | None = None) -> Write:
    """Return a run's write.

    :param seen: the number of the newest earlier write that was answered. None: the write before
        this one.
    """
    if seen is None:
        seen = number - 1 if number > 1 else TAKEN_OVER
    return Write(number, seen, new)


def enqueue(requests: RowRequests, key: str, task_id: str, life: float) -> str:
    """Read which message is queued, and claim the queue for this message if none is, as a client
    does.

    :returns: the id of the message that is queued or running.
    """
    for _ in range(1000):
        seen = requests.queued(key)
        if seen.task_id is not None:
            return seen.task_id
        if requests.claim(key, task_id, life, seen.number):
            return task_id
    raise AssertionError(f"{key} changed at each poll")
