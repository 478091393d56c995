"""The app of a storm's workers. Each message is a job, which adds a line to its singleton's state.

A run does what a careful user's run would do. It makes a checkpoint. In one ``transaction()`` it
copies the next event into a table, and advances the position that its state holds. It adds its job
to the state, which is saved at the end. So the database shows what happened: each event has one
row, and each job one line.
"""

from __future__ import annotations

import os
import time
import uuid
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from celery import Celery

from celery_singleton_state import RetryPolicy, SingletonTask, singleton_task
from tests.helpers.queues import use_queues
from tests.storm import planted_faults
from tests.storm.bodies import checks_of
from tests.storm.jobs import Line, Trail, effects
from tests.storm.notes import note
from tests.storm.signals import observe

#: A retry policy whose retries go on for longer than any storm.
PATIENT = RetryPolicy(max_retries=10_000, backoff=0.3, backoff_max=2.0)
RETRIED = ("StateLoadFailed", "StatePersistFailed", "HeartbeatFailed", "LeaderHandoffFailed")

app = Celery("storm")
app.conf.update(
    worker_prefetch_multiplier=1,
    worker_lost_wait=0.5,
    # When this reduction of the prefetch count was on, a worker with threads hung in one of ten
    # storms: it had lost RabbitMQ, and set its prefetch count back as soon as it was connected
    # again.
    worker_enable_prefetch_count_reduction=False,
    broker_connection_max_retries=None,
    broker_connection_retry_on_startup=True,
    broker_transport_options=(
        {"confirm_publish": True}
        if os.environ.get("CELERY_BROKER_URL", "").startswith("amqp")
        # Let kombu's mutex expire soon: a worker that dies while it restores messages does not
        # release it.
        else {"visibility_timeout": 5.0, "unacked_mutex_expire": 2}
    ),
    task_ignore_result=True,
)
use_queues(app, "celery")

#: Maps the name of each singleton to its task.
SINGLETONS = {f"a{n}": "step" for n in range(5)} | {f"b{n}": "step_to_the_end" for n in range(5)}


def step(self: SingletonTask[Trail], name: str, job: str, seconds: float) -> None:
    run = f"{self.fence}/{uuid.uuid4().hex[:8]}"
    note("enter", singleton=name, run=run, job=job, fence=self.fence, lines=len(self.state.lines))
    self.state.name = name
    self.checkpoint()
    self.work(run, name, job, seconds / 2)
    with self.transaction() as connection:
        self.state.position += 1
        connection.execute(
            effects.insert(),
            {
                "singleton": name,
                "event": self.state.position,
                "job": job,
                "fence": self.fence,
            },
        )
    self.work(run, name, job, seconds / 2)
    self.state.lines.append(Line(job, self.fence, self.state.position))


class Working(SingletonTask[Any]):
    abstract = True
    autoretry_for = (sa.exc.DBAPIError,)
    retry_kwargs = MappingProxyType({"max_retries": None, "countdown": 0.5})

    def work(self, run: str, name: str, job: str, seconds: float) -> None:
        """Work for ``seconds``, and note again and again that the run trusts its lease.

        Each note is written after a check of the lease, with the time from before this check.
        """
        for _ in checks_of(job, self.request.retries, seconds):
            at = time.monotonic()
            if self.lease_remaining > 0:
                note("trusts", at, run=run, singleton=name)


for task, on_lease_lost in {"step": "interrupt", "step_to_the_end": "finish"}.items():
    singleton_task(
        app,
        base=Working,
        name=task,
        state_schema=Trail,
        unique_on=["name"],
        on_conflict="wait",
        conflict_timeout=600,
        on_lease_lost=on_lease_lost,
        max_retries=10_000,
        # Seconds for which Celery waits before it repeats a task whose process has died.
        default_retry_delay=0.5,
        retry_reasons=RETRIED,
        retry_policy=dict.fromkeys(RETRIED, PATIENT),
    )(step)

observe()
planted_faults.plant(os.environ.get("STORM_FAULT", ""))
