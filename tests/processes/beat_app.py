"""The app that the tests' beats and their workers run. All settings come from the environment.

The schedule is ``TEST_SCHEDULE``, as JSON: by name what ``beat_schedule`` has, an interval in
seconds or a crontab as a list of its fields.
"""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery
from celery.schedules import crontab

from celery_singleton_state import SingletonTask, singleton_task
from tests.processes.tasks import SOON, note, transport_options

PATIENT = {"StateLoadFailed": SOON, "StatePersistFailed": SOON}


def schedule(spelled: Any) -> Any:
    return crontab(*spelled) if isinstance(spelled, list) else spelled


app = Celery("shop")
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options=transport_options(),
    result_expires=None,
    beat_schedule={
        name: {"args": [name], **fields}
        | (
            {"schedule": crontab(*fields["schedule"])}
            if isinstance(fields["schedule"], list)
            else {}
        )
        for name, fields in json.loads(os.environ.get("TEST_SCHEDULE", "{}")).items()
    },
)


def _note(task: Any, entry: str) -> None:
    headers = task.request.headers or {}
    note("tick", entry=entry, due=headers.get("singleton_due"), id=task.request.id)


@singleton_task(
    app,
    name="ticked",
    unique_on=["entry"],
    on_conflict="wait",
    conflict_timeout=60,
    retry_policy=PATIENT,
)
def ticked(self: SingletonTask, entry: str) -> None:
    """A singleton for each entry."""
    _note(self, entry)


@app.task(name="plain", bind=True)
def plain(self: Any, entry: str) -> None:
    """No singleton."""
    _note(self, entry)
