"""The app of workers whose events, metrics and pages are tested. All settings come from the
environment.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from celery import Celery

from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.hooks import Details
from tests.apps.tasks import note, transport_options

app = Celery("shop")
app.conf.update(
    worker_prefetch_multiplier=1,
    broker_transport_options=transport_options(),
    broker_connection_retry_on_startup=True,
    task_send_sent_event=True,
)
if "TEST_HOOK" in os.environ:
    app.conf.singleton_hooks = ["tests.apps.seen_app:write_down"]


@dataclass
class Counter:
    n: int = 0


def write_down(details: Details) -> None:
    """A user's own hook: note each event that the package emits."""
    note("told", kind=type(details).__name__, singleton=details.singleton)


@singleton_task(app, name="hourly", expected_interval=3600)
def hourly(self: SingletonTask[Any]) -> None:
    pass


@singleton_task(app, name="counted", state_schema=Counter, unique_on=["key"], max_retries=0)
def counted(self: SingletonTask[Counter], key: str, does: str = "save") -> int:
    """Do with the state what ``does`` says, so that tests know the expected metrics."""
    note("runs", key=key, does=does)
    if does == "idle":
        return self.state.n
    self.state.n += 1
    if does == "checkpoint":
        self.checkpoint()
        self.state.n += 1
    elif does == "transaction":
        with self.transaction():
            self.state.n += 1
    elif does == "fail":
        raise ValueError("as it was told")
    elif does == "misfit":
        self.state.n = "no number"  # type: ignore[assignment]
    elif does == "sleep":
        time.sleep(0.3)
    return self.state.n
