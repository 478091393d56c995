"""Entries of a row's history."""

from __future__ import annotations

from celery_singleton_state.history import Entry


def entry(
    fence: int,
    task_id: str = "t",
    generation: int = 0,
    outcome: str = "succeeded",
    final: bool = False,
) -> Entry:
    holder = f"node:1:{fence}"
    return Entry(task_id, generation, holder, fence, None, outcome, None, 1.5, 2.5, final)
