"""The app of the drill with many waiting messages: a singleton and a plain task."""

from __future__ import annotations

import os
import time

from celery_singleton_state import SingletonTask, singleton_task
from tests.apps.tasks import app, note, wait_for


@singleton_task(
    app,
    name="patient",
    on_conflict="wait",
    conflict_timeout=float(os.environ.get("TEST_CONFLICT_TIMEOUT", "600")),
)
def patient(self: SingletonTask, number: int, until: str = "") -> int:
    """Hold the lease until the file ``until`` exists. If none is named, only note that the message
    ran.
    """
    note("served" if not until else "holds", number=number)
    if until:
        wait_for(until)
    return number


@app.task(name="plain")
def plain(number: int, sent: float) -> None:
    """Note how many seconds passed between the sending of the message and its run."""
    note("plain", number=number, took=time.monotonic() - sent)
