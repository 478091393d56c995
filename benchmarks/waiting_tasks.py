"""The app of the ``waiting`` part: a singleton that many messages wait for, and a plain task.

The servers come from the environment: ``BENCHMARK_BROKER``, ``BENCHMARK_DATABASE``; and
``BENCHMARK_NOTES``, the file that the bodies write to, ``BENCHMARK_TIMEOUT``, how long a message
waits.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

from celery_singleton_state import SingletonTask, singleton_task

app = Celery("waiting", broker=os.environ.get("BENCHMARK_BROKER", "redis://localhost/0"))
app.conf.task_ignore_result = True
app.conf.singleton_store_url = os.environ.get("BENCHMARK_DATABASE", "sqlite:///benchmark.db")


def note(what: str, number: float) -> None:
    """Append a line at once, so that no two are mixed up; all processes share this clock."""
    with open(os.environ["BENCHMARK_NOTES"], "a") as notes:
        notes.write(f"{what} {number} {time.monotonic()}\n")


@singleton_task(
    app,
    name="waits",
    on_conflict="wait",
    conflict_timeout=float(os.environ.get("BENCHMARK_TIMEOUT", "600")),
)
def waits(self: SingletonTask, number: int, until: str = "") -> None:
    """Hold the lease until a file is there, or be served."""
    note("served" if not until else "holds", number)
    while until and not Path(until).exists():
        time.sleep(0.01)


@app.task(name="plain")
def plain(number: int) -> None:
    """Note when it ran."""
    note("plain", number)
