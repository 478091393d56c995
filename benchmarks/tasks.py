"""The app of the ``worker`` part: one task for each variant, all with the same no-op body.

Each message has a unique number, and one of :data:`SLOTS` slots. A slot is one singleton, or one
lock, with a counter as its state. Neighbouring messages in the queue have different slots, so no
run ever meets a conflict. Because of the unique number, packages that drop duplicates when a
message is sent find none.

The app reads from the environment: ``BENCHMARK_BROKER`` and ``BENCHMARK_DATABASE``, the servers;
and ``BENCHMARK_MARKS``, the directory to which the times of the bodies are written.
"""

from __future__ import annotations

import os
import time
from array import array
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery_once import QueueOnce
from celery_singleton import Singleton

from celery_singleton_state import SingletonTask, singleton_task

from .by_hand import BareStatements, LockAndTable

SLOTS = 64

BROKER = os.environ.get("BENCHMARK_BROKER", "redis://localhost/0")
DATABASE = os.environ.get("BENCHMARK_DATABASE", "sqlite:///benchmark.db")

app = Celery("benchmarks", broker=BROKER)
app.conf.task_ignore_result = True
app.conf.ONCE = {"backend": "celery_once.backends.Redis", "settings": {"url": BROKER}}
app.conf.singleton_store_url = DATABASE

#: The times at which the bodies of this process ran.
marks = array("d")


def body() -> None:
    """Note the time, on a clock that all processes share, and do nothing else."""
    marks.append(time.monotonic())


@signals.worker_process_shutdown.connect
@signals.worker_shutdown.connect
def _write_marks(**_: Any) -> None:
    if marks:
        path = Path(os.environ["BENCHMARK_MARKS"], str(os.getpid()))
        path.write_bytes(marks.tobytes())


def read_marks(folder: Path) -> list[float]:
    """Return the times of all bodies that ran, in order."""
    found = array("d")
    for path in folder.iterdir():
        found.frombytes(path.read_bytes())
    return sorted(found)


@dataclass
class Counter:
    """The state of a slot."""

    count: int = 0


# These are made at the first use, in the process that runs the bodies, because connections do not
# survive a fork.
_lock_and_table = cache(lambda: LockAndTable(DATABASE, BROKER))
_bare = cache(lambda: BareStatements(DATABASE, BROKER))


@app.task
def plain(slot: int, number: int) -> None:
    """Run without a lock and without a state."""
    body()


@app.task(base=Singleton)
def with_celery_singleton(slot: int, number: int) -> None:
    """Run with a lock that is held from sending to success, and without a state."""
    body()


@app.task(base=QueueOnce)
def with_celery_once(slot: int, number: int) -> None:
    """Run with a lock that is held from sending to the body's return, and without a state."""
    body()


@app.task
def with_lock_and_table(slot: int, number: int) -> None:
    """Run with a hand-written lock around the run, and a hand-written state."""
    _lock_and_table().run(slot, body)


@app.task
def with_bare_statements(slot: int, number: int) -> None:
    """Run with a lock and a state that take the fewest possible statements."""
    _bare().run(slot, body)


@singleton_task(app, state_schema=Counter, unique_on=["slot"])
def stateful(self: SingletonTask[Counter], slot: int, number: int) -> None:
    """Run as a stateful singleton of this package."""
    body()
    self.state.count += 1


@singleton_task(app, unique_on=["slot"])
def stateless(self: SingletonTask, slot: int, number: int) -> None:
    """Run as a singleton of this package without a state."""
    body()
