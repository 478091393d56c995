"""The app of the parts ``beat`` and ``takeover``, whose beats note each message that they send.

It reads from the environment: ``BENCHMARK_ENTRIES``, the number of entries; ``BENCHMARK_STRETCH``,
a factor for the intervals: entry i is due every (1 + i % 60) times this factor seconds; and
``BENCHMARK_NOTES``, the file for the notes.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.beat import Scheduler

from celery_singleton_state.headers import DUE
from celery_singleton_state.store.sql.connections import Connections

from .beat_notes import Note, Notebook

LONGEST = 60


def seconds_between(number: int, stretch: int = 1) -> float:
    """Return the interval of an entry, in whole seconds."""
    return float((1 + number % LONGEST) * stretch)


def entry_name(number: int) -> str:
    """Return the name of an entry."""
    return f"entry-{number}"


def _entry(number: int, now: datetime, stretch: int) -> dict[str, Any]:
    """Return an entry whose last run was a part of its interval ago, another part for each entry.

    Without a last run, Celery and RedBeat would find all entries of one interval due at the same
    time, and all entries due together each minute. This package spreads entries itself, and ignores
    this last run.
    """
    every = seconds_between(number, stretch)
    passed = number * 0.6180339887 % 1 * every
    return {"task": "noop", "schedule": every, "last_run_at": now - timedelta(seconds=passed)}


def _schedule(count: int, stretch: int) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {entry_name(number): _entry(number, now, stretch) for number in range(count)}


app = Celery("beats", broker=os.environ.get("BENCHMARK_BROKER", "redis://localhost/0"))
app.conf.update(
    task_ignore_result=True,
    # Without this, Celery would add its own schedule entry, which removes old results.
    result_expires=None,
    singleton_store_url=os.environ.get("BENCHMARK_DATABASE", "memory://"),
    redbeat_redis_url=os.environ.get("BENCHMARK_REDBEAT", "redis://localhost/1"),
    redbeat_redis_options={},
    beat_schedule=_schedule(
        int(os.environ.get("BENCHMARK_ENTRIES", "0")), int(os.environ.get("BENCHMARK_STRETCH", "1"))
    ),
)


@app.task(name="noop")
def noop() -> None:
    """Do nothing. No worker runs this task."""


def _due(entry: Any) -> float:
    """Return when an entry that is about to be sent is due, in seconds since the epoch."""
    header = (entry.options.get("headers") or {}).get(DUE)
    if header is not None:
        return datetime.fromisoformat(header).timestamp()
    if entry.last_run_at is None:
        return time.time()
    due: datetime = entry.last_run_at + entry.schedule.run_every
    return due.timestamp()


def _take_notes(notebook: Notebook) -> None:
    """Make the scheduler of this process note each message that it sends."""
    connections: Any = Connections
    apply_async, execute = Scheduler.apply_async, connections.execute
    statements = ticks = 0

    def noting(self: Scheduler, entry: Any, *args: Any, **kwargs: Any) -> Any:
        due = _due(entry)
        result = apply_async(self, entry, *args, **kwargs)
        notebook.add(Note(due, time.time(), time.process_time(), statements, ticks))
        return result

    def counting(self: Connections, *args: Any) -> Any:
        nonlocal statements
        statements += 1
        return execute(self, *args)

    def count_ticks(sender: Any, **_: Any) -> None:
        tick = sender.scheduler.tick

        def counted() -> float:
            nonlocal ticks
            pause: float = tick()
            ticks += 1
            return pause

        sender.scheduler.tick = counted

    Scheduler.apply_async = noting  # type: ignore[method-assign]
    connections.execute = counting
    signals.beat_init.connect(count_ticks, weak=False)


if "BENCHMARK_NOTES" in os.environ:
    _take_notes(Notebook(Path(os.environ["BENCHMARK_NOTES"])))
