"""``python -m benchmarks.trip``: measure how long the path through the code is for a reader.

It traces one run with a state that does nothing, on the store in memory, from the call of the task
to the release of its lease. It counts the calls of this package's functions, their files, and how
often a call is in another file than the call before. It also traces how a lost lease is reported,
from the heartbeat to the interruption of the body. Finally it counts the modules at the package's
root, and the files that name the option ``hold_at_least``.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from celery import Celery

import celery_singleton_state
from celery_singleton_state import HeartbeatFailed, singleton_task
from celery_singleton_state.runtime import close_runtime, runtime_of
from celery_singleton_state.store.base import Ended, Lease

PACKAGE = Path(celery_singleton_state.__file__).parent

#: The largest value that each number may have.
LIMITS = {
    "calls of a run that does nothing": 80,
    "files of these calls": 16,
    "changes of file between them": 45,
    "files that the report of a lost lease passes": 6,
    "files that name hold_at_least": 9,
    "modules at the root": 16,
}


@dataclass
class Count:
    """The state of the traced singleton."""

    n: int = 0


def measured() -> dict[str, int]:
    """Return a dict that maps the name of each number to the measured number."""
    files = calls_of_a_run()
    return dict(
        zip(
            LIMITS,
            (
                len(files),
                len(set(files)),
                sum(one != other for one, other in pairwise(files)),
                len(files_of_a_loss()),
                sum("hold_at_least" in path.read_text() for path in PACKAGE.rglob("*.py")),
                len(list(PACKAGE.glob("*.py"))),
            ),
            strict=True,
        )
    )


def calls_of_a_run() -> list[str]:
    """Return the file of each call of a run that does nothing."""
    app, task = _made(lambda self: None)
    for _ in range(3):
        # The first runs make the objects that are made only once.
        task()
    seen: list[str] = []
    sys.setprofile(lambda frame, event, _: _note(frame, event, seen.append))
    try:
        task()
    finally:
        sys.setprofile(None)
    close_runtime(app)
    return seen


def files_of_a_loss() -> list[str]:
    """Return the files that a lost lease's report passes, from the heartbeat to the body."""
    seen: dict[str, None] = {}
    tracing = threading.Event()

    def note(file: str) -> None:
        if tracing.is_set():
            seen[file] = None

    def body(self: Any) -> None:
        run = self._run_for("lease")
        lost = run.lost

        def lost_traced(why: str) -> None:
            frame = sys._getframe().f_back
            while frame is not None:
                _note(frame, "call", lambda file: seen.setdefault(file))
                frame = frame.f_back
            tracing.set()
            lost(why)

        run.lost = lost_traced
        store, lease = runtime_of(self.app).store, run.held.lease
        store.release(Lease(lease.key, lease.holder, lease.fence, 1.0), Ended("succeeded", "[]"))
        try:
            time.sleep(60)
        finally:
            tracing.clear()

    app, task = _made(body, singleton_heartbeat_interval=0.1)
    threading.setprofile(lambda frame, event, _: _note(frame, event, note))
    sys.setprofile(lambda frame, event, _: _note(frame, event, note))
    try:
        task()
    except HeartbeatFailed:
        pass
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    close_runtime(app)
    return list(seen)


def _made(body: Callable[[Any], None], **settings: Any) -> tuple[Celery, Any]:
    app = Celery("trip", broker="memory://", set_as_current=False)
    app.conf.update(singleton_store_url="memory://", **settings)

    def count(self: Any) -> None:
        body(self)

    return app, singleton_task(app, state_schema=Count)(count)


def _note(frame: FrameType, event: str, note: Callable[[str], object]) -> None:
    file = Path(frame.f_code.co_filename)
    if event == "call" and file.is_relative_to(PACKAGE):
        note(str(file.relative_to(PACKAGE)))


def main() -> int:
    """Print each number with its limit; return 1 if a number is above its limit."""
    numbers = measured()
    for name, number in numbers.items():
        print(f"{name}: {number} (at most {LIMITS[name]})")
    return int(any(number > LIMITS[name] for name, number in numbers.items()))


if __name__ == "__main__":
    sys.exit(main())
