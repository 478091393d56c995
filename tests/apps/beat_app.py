"""The app of the tests' beats and of their workers. All settings come from the environment.

``TEST_SCHEDULE`` is the schedule, as JSON. It has the entries of ``beat_schedule``. The
``schedule`` of each entry is an interval in seconds, or a list of a crontab's fields.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.schedules import crontab
from django_celery_beat.clockedschedule import clocked

from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.beat.leader import Leader
from celery_singleton_state.headers import ENTRY, header
from celery_singleton_state.ticks import due_of
from tests.apps.tasks import SOON, note, transport_options
from tests.helpers.own_schedules import Answers, EveryFromTable, SaysDue

PATIENT = {"StateLoadFailed": SOON, "StatePersistFailed": SOON}


def schedule(spelled: Any) -> Any:
    return crontab(*spelled) if isinstance(spelled, list) else spelled


app = Celery("shop")
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options=transport_options(),
    result_expires=None,
    beat_remote_control_max_tick_age=float(os.environ.get("TEST_MAX_TICK_AGE", "60")),
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

if "TEST_OWN_SCHEDULES" in os.environ:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    own: dict[str, Any] = {
        "once": clocked(soon),
        "zero": Answers(timedelta(0)),
        "negative": Answers(-timedelta(hours=1)),
        "at once": SaysDue(False, 0),
        "table": EveryFromTable(),
    }
    app.conf.beat_schedule |= {
        name: {"task": "plain", "args": [name], "schedule": each} for name, each in own.items()
    }


@signals.before_task_publish.connect
def hang(**_: Any) -> None:
    """Hang before each message is published, while the file ``TEST_HANG`` exists."""
    path = Path(os.environ.get("TEST_HANG", "/nowhere"))
    while path.exists():
        time.sleep(0.05)


if "TEST_GARBAGE" in os.environ:

    @signals.worker_init.connect
    def leave_files_in_garbage(**_: Any) -> None:
        gc.disable()
        for _number in range(40):
            cycle: list[Any] = [select.epoll()]
            cycle.append(cycle)

    @signals.before_task_publish.connect
    def collect(**_: Any) -> None:
        gc.collect()


if "TEST_CRASH" in os.environ:
    record = Leader.record

    def crash(self: Leader, entries: Any) -> None:
        """Kill the process before the entry ``TEST_CRASH`` is recorded as sent."""
        if '"last_tick"' in entries.get(os.environ["TEST_CRASH"], ""):
            os.kill(os.getpid(), signal.SIGKILL)
        record(self, entries)

    Leader.record = crash  # type: ignore[method-assign]


def _note(task: Any, entry: str) -> None:
    due = due_of(task.request)
    late = due and (datetime.now(UTC) - due).total_seconds()
    note("tick", entry=entry, due=due and due.isoformat(), id=task.request.id, late=late)


@singleton_task(
    app,
    name="ticked",
    unique_on=["entry"],
    on_conflict="wait",
    conflict_timeout=60,
    retry_policy=PATIENT,
)
def ticked(self: SingletonTask, entry: str) -> None:
    """The body of a task with one singleton for each entry: note the tick."""
    _note(self, entry)


def _close(self: SingletonTask) -> None:
    _note(self, str(header(self.request, ENTRY)).partition(":")[2])


#: Tasks with one singleton for all entries, so that ticks of different entries conflict: one task
#: as in the docs, and one that waits.
singleton_task(app, name="close_day")(_close)
singleton_task(app, name="close_day_waiting", on_conflict="wait")(_close)


@app.task(name="plain", bind=True)
def plain(self: Any, entry: str) -> None:
    """The body of a task that is no singleton: note the tick."""
    _note(self, entry)
