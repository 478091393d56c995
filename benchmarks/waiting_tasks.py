"""The app of the ``waiting`` part: a singleton that many messages wait for, and a plain task.

It reads from the environment: ``BENCHMARK_BROKER`` and ``BENCHMARK_DATABASE``, the servers;
``BENCHMARK_NOTES``, the file that the bodies write to; and ``BENCHMARK_TIMEOUT``, the seconds for
which a message waits.
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
    """Append a line about a body, with the time on a clock that all processes share.

    The line is appended by one write, so that the lines of several processes do not mix.
    """
    with open(os.environ["BENCHMARK_NOTES"], "a") as notes:
        notes.write(f"{what} {number} {time.monotonic()}\n")


@singleton_task(
    app,
    name="waits",
    on_conflict="wait",
    conflict_timeout=float(os.environ.get("BENCHMARK_TIMEOUT", "600")),
)
def waits(self: SingletonTask, number: int, until: str = "") -> None:
    """Hold the lease until the file ``until`` exists. If no file is named, only note the run."""
    note("served" if not until else "holds", number)
    while until and not Path(until).exists():
        time.sleep(0.01)


@app.task(name="plain")
def plain(number: int) -> None:
    """Note when the task ran."""
    note("plain", number)
