"""Beats that run in the test's own process."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from celery import Celery

from celery_singleton_state.beat import SingletonScheduler
from celery_singleton_state.beat.entry_state import EntryState
from celery_singleton_state.runtime import close_runtime
from celery_singleton_state.store.base import Row

SECOND = timedelta(seconds=1)
EVERY_MINUTE = {"task": "t", "schedule": 60.0}


class Beats:
    """Make beats, each with an app and a runtime of its own, as if each ran in its own process."""

    def __init__(self, store_url: str) -> None:
        self._store_url = store_url
        self._apps: list[Celery] = []
        self._made: list[SingletonScheduler] = []

    def make(
        self, schedule: dict[str, Any], scheduler: Any = SingletonScheduler, **settings: Any
    ) -> SingletonScheduler:
        app = Celery("shop", broker="memory://", set_as_current=False)
        self._apps.append(app)
        app.conf.update(
            {
                "singleton_store_url": self._store_url,
                "singleton_auto_migrate": True,
                "result_expires": None,
                "beat_schedule": schedule,
            }
            | settings
        )
        self._made.append(scheduler(app))
        return self._made[-1]

    def close(self) -> None:
        for beat in self._made:
            beat.close()
        # Also close the apps whose scheduler could not be made.
        for app in self._apps:
            close_runtime(app)
            app.close()


def due_now(beat: SingletonScheduler, name: str = "e", ago: timedelta = SECOND) -> datetime:
    """Make an entry of a leading beat due a little while ago, also in the store; return the due
    time.
    """
    moment = beat._leader.now() - ago
    heap: list[Any] = beat._heap
    for index, (_, number, entry) in enumerate(heap):
        if entry.name == name:
            entry.next_tick = moment
            heap[index] = (moment, number, entry)
            beat._unrecorded[name] = entry.state()
    heap.sort(key=lambda event: event[:2])
    beat._record()
    return moment


def row(beat: SingletonScheduler) -> Row:
    """Return the row of the leader's lease."""
    found = beat._leader.runtime.store.peek("singleton-beat:shop")
    assert found is not None
    return found


def stored(beat: SingletonScheduler) -> dict[str, EntryState]:
    return beat._load()


def take_over(beat: SingletonScheduler) -> None:
    """Give the leader's lease to another holder, as if the leader's lease had expired."""
    store: Any = beat._leader.runtime.store
    with store.engine.connect() as connection:
        connection.exec_driver_sql(
            "UPDATE kv_store SET fence = fence + 1, holder = 'another'"
            f" WHERE {store._sql.key} = 'singleton-beat:shop'"
        )
        connection.commit()
