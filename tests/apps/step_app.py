"""The app of the drills on late requests: a message says step by step what its body does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery

from celery_singleton_state import SingletonTask, singleton_task
from tests.apps.copied import copied
from tests.apps.tasks import note, transport_options, wait_for

app = Celery("shop")
app.conf.update(
    worker_prefetch_multiplier=1,
    broker_transport_options=transport_options(),
    broker_connection_retry_on_startup=True,
)


@dataclass
class Progress:
    """The state: how many numbers the bodies have copied, and a mark by which a proxy recognises a
    save.
    """

    n: int = 0
    mark: str = ""


class Stepping(SingletonTask[Any]):
    abstract = True

    def reach(self, place: str, gate: str) -> None:
        """Note that the body has reached a place, and wait until the test opens the gate."""
        note("reached", place=place, fence=self.fence)
        wait_for(gate)

    def note_fence(self) -> None:
        note("fence", fence=self.fence)

    def mark(self, text: str) -> None:
        self.state.mark = text

    def copy(self) -> None:
        """Copy the next number into the table, and count it in the state, in one commit."""
        with self.transaction() as connection:
            self.state.n += 1
            connection.execute(copied.insert(), {"n": self.state.n})

    def stay(self, tidies: float) -> None:
        """Stay until the run is interrupted, and then tidy up for ``tidies`` seconds."""
        note("on", fence=self.fence)
        try:
            while True:
                time.sleep(0.01)
        finally:
            end = time.monotonic() + tidies
            while time.monotonic() < end:
                time.sleep(0.001)
            note("off", fence=self.fence)

    def fail(self, text: str) -> None:
        raise ValueError(text)


def take_steps(self: Stepping, *steps: Sequence[Any]) -> int:
    for name, *arguments in steps:
        getattr(self, name)(*arguments)
    return int(self.state.n) if self.state_schema else 0


COMMON = {"state_schema": Progress, "on_conflict": "wait", "conflict_timeout": 20}
#: Maps each task to its options besides ``COMMON``.
TASKS: dict[str, dict[str, Any]] = {
    "steps": {},
    "persistent steps": {"persist_on_error": True},
    "stateless steps": {"state_schema": None},
    "coalesced steps": {"on_conflict": "coalesce", "retry_reasons": []},
    "long steps": {"lease_ttl": 600},
    "long steps, not retried": {"lease_ttl": 600, "retry_reasons": []},
}

for name, options in TASKS.items():
    singleton_task(app, base=Stepping, name=name, **(COMMON | options))(take_steps)


@singleton_task(app, name="sent once", enqueue_once=True)
def sent_once(self: SingletonTask) -> str:
    return "ran"
