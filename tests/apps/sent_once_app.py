"""The app of the drill on ``enqueue_once``: tasks whose messages end in many ways."""

from __future__ import annotations

import time
from typing import Any

from celery_singleton_state import SingletonTask, singleton_task
from tests.apps.tasks import app, note, wait_for


class BeforeStart(SingletonTask[Any, Any, Any]):
    """A base class whose ``before_start`` can end the delivery before the body begins."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        if args[0] == "raises":
            raise ValueError("before the start")
        if args[0] == "hangs":
            time.sleep(600)


@app.task(bind=True, base=BeforeStart, enqueue_once=True, time_limit=1, name="ends_early")
def ends_early(self: Any, how: str) -> str:
    """Return the argument. Only if it is "runs" does a delivery reach this body."""
    return how


@singleton_task(app, enqueue_once=True, on_conflict="wait", conflict_timeout=60, name="versioned")
def versioned(self: SingletonTask, version: int, until: str = "") -> int:
    """Note the version that runs, and wait for a file if one is named."""
    note("version", version=version)
    if until:
        wait_for(until)
    return version
