"""The app of the drill on tracing tools: ``TEST_SDK`` says which tool is switched on.

Each tool is switched on as its documentation says: ddtrace and newrelic by their ``sitecustomize``,
which the drill puts on the path. Tools that send data send it to ``TEST_COLLECTOR``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.beat import PersistentScheduler
from celery.schedules import crontab

from celery_singleton_state import LeaderHandoffFailed, SingletonTask, singleton_task
from celery_singleton_state.beat import LeaderMixin
from celery_singleton_state.headers import DUE, header
from tests.apps.tasks import note, transport_options

#: The log format of the workers: each line begins with the logger's name.
FORMAT = "[%(asctime)s: %(levelname)s/%(processName)s] %(name)s: %(message)s"
#: The name of the beat in this process; empty in a worker.
BEAT = os.environ.get("TEST_BEAT", "")


def sentry() -> Callable[[], object]:
    import sentry_sdk
    from sentry_sdk.integrations.celery import CeleryIntegration

    sentry_sdk.init(
        dsn=os.environ["TEST_COLLECTOR"].replace("//", "//public@") + "/1",
        traces_sample_rate=1.0,
        integrations=[CeleryIntegration(monitor_beat_tasks=True)],
    )
    return sentry_sdk.get_current_span


def datadog() -> Callable[[], object]:
    from ddtrace import tracer

    return tracer.current_span


def new_relic() -> Callable[[], object]:
    from newrelic.api.transaction import current_transaction

    return current_transaction


def elastic() -> Callable[[], object]:
    import elasticapm
    from elasticapm.contrib.celery import register_exception_tracking, register_instrumentation

    client = elasticapm.Client(
        service_name="shop", server_url=os.environ["TEST_COLLECTOR"], cloud_provider="none"
    )
    elasticapm.instrument()
    register_exception_tracking(client)
    register_instrumentation(client)
    return elasticapm.get_transaction_id


def opentelemetry() -> Callable[[], object]:
    from opentelemetry import trace
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider

    trace.set_tracer_provider(TracerProvider())
    CeleryInstrumentor().instrument()
    return lambda: trace.get_current_span().get_span_context().is_valid


#: Maps each tool to a function that switches it on. This function returns another one, which tells
#: whether the calling body is traced.
SDKS = {
    "sentry-sdk": sentry,
    "ddtrace": datadog,
    "newrelic": new_relic,
    "elastic-apm": elastic,
    "opentelemetry-instrumentation-celery": opentelemetry,
}

is_traced = SDKS[os.environ["TEST_SDK"]]()


class LeadingScheduler(LeaderMixin, PersistentScheduler):
    """Celery's own scheduler with ``LeaderMixin``: one of several beats leads."""


app = Celery("shop")
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options=transport_options(),
    result_expires=None,
    worker_prefetch_multiplier=1,
    worker_log_format=FORMAT,
    worker_task_log_format=FORMAT,
    beat_schedule={
        name: {"task": name.partition("-")[0], "args": [BEAT, name], "schedule": schedule}
        for name, schedule in {
            "ticked": 1.0,
            "plain": 1.0,
            "retried": 2.0,
            "once": 1.0,
            "ticked-minutely": crontab(),
        }.items()
    },
)


@dataclass
class Counter:
    n: int = 0


def note_tick(task: Any, beat: str, entry: str) -> None:
    note(
        "tick",
        beat=beat,
        entry=entry,
        due=header(task.request, DUE),
        id=task.request.id,
        traced=bool(is_traced()),
    )


@singleton_task(
    app,
    name="ticked",
    unique_on=["beat", "entry"],
    state_schema=Counter,
    on_conflict="wait",
    conflict_timeout=60,
)
def ticked(self: SingletonTask[Counter], beat: str, entry: str) -> None:
    """The body of a singleton with a state: note the tick and the state."""
    self.state.n += 1
    assert self.tick is not None
    note_tick(self, beat, entry)
    note("state", key=f"{beat} {entry}", n=self.state.n)


@singleton_task(
    app, name="retried", unique_on=["beat", "entry"], on_conflict="wait", conflict_timeout=60
)
def retried(self: SingletonTask, beat: str, entry: str) -> None:
    """The body of a singleton that retries each tick once: note the tick in the retry."""
    if not self.request.retries:
        raise self.retry(countdown=0.1)
    assert self.tick is not None
    note_tick(self, beat, entry)


@singleton_task(app, name="once", unique_on=["beat", "entry"], enqueue_once=True)
def once(self: SingletonTask, beat: str, entry: str) -> None:
    """The body of a singleton of which at most one tick is queued: note the tick."""
    note_tick(self, beat, entry)


@app.task(name="plain", bind=True)
def plain(self: Any, beat: str, entry: str) -> None:
    """The body of a task that is no singleton: note the tick."""
    note_tick(self, beat, entry)


@app.task(name="sends_twice")
def sends_twice() -> None:
    """Send the task ``once`` twice, and note the ids; only the first message may be queued."""
    ids = {once.apply_async(("", "sent"), countdown=3).id for _ in range(2)}
    note("queued", ids=sorted(ids))


@singleton_task(app, name="meets", on_conflict="wait", conflict_timeout=60)
def meets(self: SingletonTask) -> None:
    """Sleep for a second, so that other messages find the lease taken."""
    note("enter", id=self.request.id)
    time.sleep(1.0)
    note("leave", id=self.request.id)


@singleton_task(
    app,
    name="waits_in_vain",
    unique_on="*",
    on_conflict="wait",
    conflict_timeout=2,
    throws=(LeaderHandoffFailed,),
)
def waits_in_vain(self: SingletonTask, key: str, seconds: float) -> str:
    """Sleep for so long that a second message's wait for the lease ends without success."""
    time.sleep(seconds)
    return key
