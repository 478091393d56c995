"""The app of the tests' worker processes. All settings come from the environment."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery
from celery.exceptions import Ignore, Reject
from pydantic import BaseModel

from celery_singleton_state import (
    KeyValueStore,
    LeaderHandoffFailed,
    RetryPolicy,
    SingletonError,
    SingletonTask,
    singleton_task,
)
from tests.helpers.queues import use_queues

logger = logging.getLogger(__name__)

SOON = RetryPolicy(max_retries=100, backoff=0.2, backoff_max=0.2, jitter=False)
PATIENT = {"StateLoadFailed": SOON, "StatePersistFailed": SOON}


def transport_options() -> dict[str, Any]:
    """Return the transport options that tests need with the broker that the environment names."""
    broker = os.environ.get("CELERY_BROKER_URL", "")
    if broker.startswith("amqp"):
        return {"confirm_publish": True}
    if broker.startswith("filesystem"):
        folder = Path(os.environ["TEST_BROKER_FOLDER"], "broker")
        for name in ("queue", "control"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        return {
            "data_folder_in": str(folder / "queue"),
            "data_folder_out": str(folder / "queue"),
            "control_folder": str(folder / "control"),
        }
    return {"visibility_timeout": float(os.environ.get("TEST_VISIBILITY_TIMEOUT", "3600"))}


app = Celery("shop")
app.conf.update(
    worker_cancel_long_running_tasks_on_connection_loss="TEST_CANCEL" in os.environ,
    worker_prefetch_multiplier=int(os.environ.get("TEST_PREFETCH", "1")),
    broker_heartbeat=int(os.environ.get("TEST_BROKER_HEARTBEAT", "120")),
    worker_pool_restarts=True,
    worker_soft_shutdown_timeout=float(os.environ.get("TEST_SOFT_SHUTDOWN", "0")),
    worker_lost_wait=float(os.environ.get("TEST_WORKER_LOST_WAIT", "10")),
    broker_transport_options=transport_options(),
    broker_connection_retry_on_startup=True,
    result_extended=True,
    task_serializer=os.environ.get("TEST_SERIALIZER", "json"),
    result_serializer=os.environ.get("TEST_SERIALIZER", "json"),
    accept_content=["json", os.environ.get("TEST_SERIALIZER", "json")],
)
use_queues(app, os.environ.get("TEST_QUEUE", "celery"))


@dataclass
class Counter:
    n: int = 0


def note(event: str, **facts: Any) -> None:
    """Append a line to the test's notes in one write, so that no two lines mix."""
    line = json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic()} | facts)
    with open(os.environ["TEST_LOG"], "a") as log:
        log.write(line + "\n")


@contextmanager
def inside(name: str, **facts: Any) -> Iterator[None]:
    note("enter", task=name, **facts)
    try:
        yield
    finally:
        note("leave", task=name, **facts)


def wait_for(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.01)


@singleton_task(app, state_schema=Counter, retry_policy=PATIENT, name="increment")
def increment(self: SingletonTask[Counter], until: str = "") -> int:
    with inside("increment", fence=self.fence, n=self.state.n):
        if until:
            wait_for(until)
        self.state.n += 1
    return self.state.n


@dataclass
class Text:
    text: str = ""


@singleton_task(app, state_schema=Text, retry_policy=PATIENT, name="remember")
def remember(self: SingletonTask[Text], text: str) -> None:
    with inside("remember"):
        self.state.text = text


@singleton_task(app, state_schema=Counter, name="increment_or_raise", on_conflict="raise")
def increment_or_raise(self: SingletonTask[Counter]) -> int:
    self.state.n += 1
    return self.state.n


@singleton_task(app, state_schema=Counter, name="fail_after_checkpoint")
def fail_after_checkpoint(self: SingletonTask[Counter]) -> None:
    self.state.n = 1
    self.checkpoint()
    self.state.n = 2
    raise LookupError("as told")


@singleton_task(app, state_schema=Counter, name="retry_twice", max_retries=5)
def retry_twice(self: SingletonTask[Counter]) -> int:
    note("attempt", retries=self.request.retries)
    self.state.n += 1
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return self.state.n


@singleton_task(
    app,
    state_schema=Counter,
    name="autoretried",
    autoretry_for=(LookupError,),
    retry_backoff=False,
    default_retry_delay=0,
)
def autoretried(self: SingletonTask[Counter]) -> int:
    note("attempt", retries=self.request.retries)
    self.state.n += 1
    if self.request.retries < 1:
        raise LookupError("once")
    return self.state.n


@singleton_task(app, state_schema=Counter, name="asks_for_another_and_succeeds")
def asks_for_another_and_succeeds(self: SingletonTask[Counter]) -> int:
    self.state.n += 1
    if self.request.retries < 1:
        self.retry(countdown=0, throw=False)
    return self.state.n


@singleton_task(app, state_schema=Counter, name="ignored")
def ignored(self: SingletonTask[Counter]) -> None:
    self.state.n += 1
    note("attempt")
    raise Ignore


@singleton_task(app, state_schema=Counter, name="rejected")
def rejected(self: SingletonTask[Counter]) -> None:
    self.state.n += 1
    note("attempt")
    raise Reject("as told", requeue=False)


@singleton_task(app, name="raises", unique_on=["reason"], retry_reasons=[])
def raises(self: SingletonTask, reason: str) -> None:
    raise SingletonError.from_reason(reason, "elsewhere", "as told")


@singleton_task(app, name="held", on_conflict="raise")
def held(self: SingletonTask, until: str) -> str:
    with inside("held"):
        wait_for(until)
    return "held"


@singleton_task(app, name="held_and_skipped", ignore_result=False)
def held_and_skipped(self: SingletonTask, until: str = "") -> str:
    with inside("held_and_skipped"):
        if until:
            wait_for(until)
    return "ran"


@app.task(name="plain_add")
def plain_add(*numbers: Any) -> int:
    return sum(number or 0 for number in _flat(numbers))


@app.task(name="on_failure")
def on_failure(request: Any, exc: Any, traceback: Any) -> None:
    note("errback", error=type(exc).__name__, is_ours=isinstance(exc, LeaderHandoffFailed))


@singleton_task(app, state_schema=Counter, name="keyed", unique_on=["number"])
def keyed(self: SingletonTask[Counter], number: int) -> int:
    self.state.n += 1
    return number + self.state.n


class Order(BaseModel):
    number: int


@singleton_task(app, state_schema=Counter, name="modelled", unique_on=["order"], pydantic=True)
def modelled(self: SingletonTask[Counter], order: Order) -> Order:
    self.state.n += 1
    return Order(number=order.number + self.state.n)


class CountingBase(SingletonTask[Counter]):
    """A user's own base class that overrides Celery's hooks."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        note("before_start")

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note("on_success")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        note("call")
        return super().__call__(*args, **kwargs)

    def on_become_leader(self) -> None:
        note("become_leader", n=self.state.n)

    def on_lose_leadership(self) -> None:
        note("lose_leadership")


@app.task(bind=True, base=CountingBase, state_schema=Counter, name="of_own_base")
def of_own_base(self: Any) -> int:
    self.state.n += 1
    return int(self.state.n)


class ClassBased(SingletonTask):
    name = "class_based"
    state_schema = Counter

    def run(self, by: int = 1) -> int:
        self.state.n += by
        return int(self.state.n)


class_based = app.register_task(ClassBased())


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


@singleton_task(app, state_schema=Counter, name="dies_twice", max_retries=1, default_retry_delay=0)
def dies_twice(self: SingletonTask[Counter]) -> None:
    note("enter", task="dies_twice", fence=self.fence)
    os._exit(7)


class Leading(SingletonTask[Any]):
    """A base class that notes when its runs gain and lose leadership."""

    abstract = True

    def on_become_leader(self) -> None:
        note("leads", task=self.name, fence=self.fence)

    def on_lose_leadership(self) -> None:
        note("leads no longer", task=self.name, fence=self.fence)


def wait_in(how: str) -> None:
    """Wait for longer than any test does: ``how`` chooses one of several ways."""
    if how == "sleep":
        time.sleep(300)
    elif how == "socket":
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            listening.accept()
    else:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            time.sleep(0.01)


@singleton_task(app, state_schema=Counter, base=Leading, name="waits")
def waits(self: SingletonTask[Counter], how: str = "sleep") -> None:
    self.state.n += 1
    self.checkpoint()
    # Make the checkpoint before the note: after the note, a test takes the lease away, and a
    # checkpoint would fail.
    with inside("waits", fence=self.fence):
        self.state.n += 100
        wait_in(how)


class Destroyed:
    """A class that works in its destructor, where Python ignores exceptions."""

    def __del__(self) -> None:
        sum(range(20_000))


def log_in_a_loop() -> None:
    while True:
        logger.info("working")
        time.sleep(0)


def catch_in_a_loop() -> None:
    while True:
        with contextlib.suppress(Exception):
            sum(range(1000))
        time.sleep(0)


def destroy_in_a_loop() -> None:
    while True:
        Destroyed()
        time.sleep(0)


def call_back_in_a_loop() -> None:
    """Work in a callback of SQLite, which turns each exception into an error of its own."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.create_function("work", 0, lambda: sum(range(20_000)))
        while True:
            with contextlib.suppress(sqlite3.OperationalError):
                connection.execute("SELECT work()")
            time.sleep(0)


def wait_for_timers() -> None:
    """Work in timers of an event loop, which logs and drops the exceptions of their callbacks."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        waited_for = loop.create_future()

        def tick(left: int) -> None:
            sum(range(20_000))
            if left:
                loop.call_later(0.0001, tick, left - 1)
            else:
                waited_for.set_result(None)

        tick(1_000_000)
        await waited_for

    asyncio.run(main())


WAYS = {
    "logging": log_in_a_loop,
    "except Exception": catch_in_a_loop,
    "destructor": destroy_in_a_loop,
    "callback": call_back_in_a_loop,
    "asyncio": wait_for_timers,
}


@singleton_task(
    app,
    state_schema=Counter,
    base=Leading,
    name="swallows",
    unique_on=["way", "number"],
    autoretry_for=(Exception,),
    default_retry_delay=0,
)
def swallows(self: SingletonTask[Counter], way: str, number: int = 0) -> None:
    """Work in code in which an exception can be swallowed; ``way`` chooses the code."""
    with inside("swallows", way=way, retries=self.request.retries):
        WAYS[way]()


@singleton_task(app, state_schema=Counter, base=Leading, name="tidies_up")
def tidies_up(self: SingletonTask[Counter]) -> None:
    with inside("tidies_up", fence=self.fence):
        try:
            wait_in("work")
        except Exception:
            note("caught")
        finally:
            for _ in range(30):
                time.sleep(0.01)
            note("tidied up")


@singleton_task(app, state_schema=Counter, base=Leading, name="finishes", on_lease_lost="finish")
def finishes(self: SingletonTask[Counter], until: str) -> None:
    with inside("finishes", fence=self.fence):
        self.state.n += 1
        wait_for(until)


@singleton_task(app, state_schema=Counter, name="dies", max_retries=0)
def dies(self: SingletonTask[Counter], how: str) -> None:
    self.state.n += 1
    note("enter", task="dies", fence=self.fence)
    if how == "os._exit":
        os._exit(7)
    if how == "MemoryError":
        raise MemoryError
    if how == "SystemExit":
        raise SystemExit(3)
    time.sleep(300)


@app.task(name="joined")
def joined(*parts: str) -> str:
    return "".join(parts)


def run_until(self: SingletonTask[Counter], what: str, until: str) -> str:
    with inside(self.name, what=what, n=self.state.n, retries=self.request.retries):
        self.state.n += 1
        self.checkpoint()
        if until == "for ever":
            wait_in("sleep")
        elif until:
            wait_for(until)
    return what


def run_until_stateless(self: SingletonTask, what: str, until: str) -> str:
    with inside(self.name, what=what, retries=self.request.retries):
        if until:
            wait_for(until)
    return what


for policy, name in {
    "wait": "waits_its_turn",
    "replace": "replaces",
    "coalesce": "coalesces",
}.items():
    singleton_task(app, state_schema=Counter, on_conflict=policy, conflict_timeout=30, name=name)(
        run_until
    )

singleton_task(app, state_schema=Counter, on_conflict="wait", conflict_timeout=1, name="impatient")(
    run_until
)

singleton_task(
    app,
    state_schema=Counter,
    on_conflict="replace",
    conflict_timeout=1,
    on_lease_lost="finish",
    name="stubborn",
)(run_until)

singleton_task(
    app,
    state_schema=Counter,
    on_conflict="replace",
    autoretry_for=(BaseException,),
    retry_backoff=False,
    default_retry_delay=0,
    retry_reasons=["HeartbeatFailed"],
    name="replaces_and_retries",
)(run_until)


class OfTenant(SingletonTask[Any]):
    """A base class that takes the tenant's argument away before the body sees the arguments."""

    abstract = True

    def __call__(self, tenant: str, *args: Any, **kwargs: Any) -> Any:
        note("tenant", tenant=tenant)
        return super().__call__(*args, **kwargs)


@singleton_task(app, base=OfTenant, on_conflict="coalesce", name="coalesces_typed")
def coalesces_typed(self: SingletonTask, until: str, *values: Any) -> list[str]:
    with inside("coalesces_typed", values=[repr(value) for value in values]):
        if until:
            wait_for(until)
    return [type(value).__name__ for value in values]


singleton_task(app, state_schema=Counter, hold_at_least=2, name="skips_with_hold")(run_until)
singleton_task(
    app, state_schema=Counter, hold_at_least=2, on_conflict="coalesce", name="coalesces_with_hold"
)(run_until)


@singleton_task(app, state_schema=Counter, name="retries_later", unique_on=["number"])
def retries_later(self: SingletonTask[Counter], number: int, seconds: float, times: int = 1) -> int:
    """Retry ``times`` times, each time after ``seconds``."""
    with inside("retries_later", number=number, retries=self.request.retries):
        self.state.n += 1
        if self.request.retries < times:
            raise self.retry(countdown=seconds, max_retries=100)
    return self.request.retries


for policy in ("skip", "wait", "replace", "coalesce"):
    for deduplicate in (True, False):
        singleton_task(
            app,
            on_conflict=policy,
            conflict_timeout=30,
            deduplicate=deduplicate,
            name=f"broadcast_{policy}_{deduplicate}",
        )(run_until_stateless)

singleton_task(
    app,
    state_schema=Counter,
    hold_at_least=12,
    on_conflict="coalesce",
    name="coalesces_with_long_hold",
)(run_until)


app.conf.beat_schedule = json.loads(os.environ.get("TEST_SCHEDULE", "{}"))


@singleton_task(app, name="sent_once", enqueue_once=True, unique_on=["number"])
def sent_once(self: SingletonTask, number: int, until: str = "") -> int:
    with inside("sent_once", number=number):
        if until:
            wait_for(until)
    return number


@singleton_task(app, name="kept", hold_at_least=3600)
def kept(self: SingletonTask) -> None:
    note("enter", task="kept")


@singleton_task(app, state_schema=Counter, name="deaf")
def deaf(self: SingletonTask[Counter], how: str = "") -> str:
    """A body that ignores SIGTERM, like a library call that never returns; only SIGKILL ends it."""
    note("enter", task="deaf")
    if how == "for ever":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_in("sleep")
    return "ran"


@singleton_task(
    app,
    name="raises_and_is_retried",
    unique_on=["reason"],
    autoretry_for=(Exception,),
    retry_backoff=False,
    default_retry_delay=0,
    max_retries=1,
)
def raises_and_is_retried(self: SingletonTask, reason: str) -> None:
    note("attempt", retries=self.request.retries)
    raise SingletonError.from_reason(reason, "elsewhere", "as told")


def send_next(self: SingletonTask[Counter], left: int, until: str = "") -> int:
    with inside(self.name, left=left):
        if left:
            self.apply_async((left - 1,))
        if until:
            wait_for(until)
    return left


singleton_task(
    app, state_schema=Counter, on_conflict="wait", conflict_timeout=60, name="sends_next_and_waits"
)(send_next)
singleton_task(app, state_schema=Counter, on_conflict="raise", name="sends_next_or_raises")(
    send_next
)


@singleton_task(
    app, state_schema=Counter, on_conflict="wait", conflict_timeout=60, name="keeps_the_gil"
)
def keeps_the_gil(self: SingletonTask[Counter], how: str, seconds: float) -> int:
    """Keep the GIL, without a break, for at least ``seconds``."""
    with inside("keeps_the_gil", n=self.state.n):
        kept, length = 0.0, 20
        while kept < seconds:
            start = time.monotonic()
            if how == "C call":
                ctypes.PyDLL(None).usleep(int(seconds * 1e6))
            else:
                re.match(r"(a+)+$", "a" * length + "b")  # one letter more doubles the time
            kept = time.monotonic() - start
            length += 1
            note("kept", seconds=kept)
        self.state.n += 1
    return self.state.n


@singleton_task(app, state_schema=Counter, name="long_body", unique_on=["number"])
def long_body(self: SingletonTask[Counter], number: int, until: str) -> int:
    with inside("long_body", number=number):
        wait_for(until)
        self.state.n += 1
    return self.state.n


class Gated(SingletonTask[Any]):
    """A base class whose deliveries wait for a file before they acquire the lease."""

    abstract = True

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        note("starts")
        wait_for(args[0])


@singleton_task(app, state_schema=Counter, base=Gated, on_conflict="wait", name="waits_at_gate")
def waits_at_gate(self: SingletonTask[Counter], gate: str, until: str) -> int:
    with inside("waits_at_gate"):
        wait_for(until)
        self.state.n += 1
    return self.state.n


@singleton_task(app, state_schema=Counter, name="retries_once", default_retry_delay=0)
def retries_once(self: SingletonTask[Counter], until: str) -> int:
    with inside("retries_once", retries=self.request.retries):
        wait_for(until)
        self.state.n += 1
        if not self.request.retries:
            raise self.retry()
    return self.state.n


@singleton_task(
    app,
    state_schema=Counter,
    enqueue_once=True,
    name="sent_once_and_retried",
    default_retry_delay=0,
)
def sent_once_and_retried(self: SingletonTask[Counter]) -> None:
    note("attempt", retries=self.request.retries)
    if not self.request.retries:
        raise self.retry()


@singleton_task(app, state_schema=Counter, name="uses_the_store", unique_on=["number"])
def uses_the_store(self: SingletonTask[Counter], number: int, until: str, beside: bool) -> int:
    """Use the store in a transaction, while the heartbeat uses it too. With ``beside``, also use
    the store outside the transaction at the same time.
    """
    kv = KeyValueStore.from_app(app).prefix("beside:")
    with inside("uses_the_store", number=number), self.transaction() as connection:
        while not Path(until).exists():
            connection.exec_driver_sql("SELECT 1")
            if beside:
                kv.modify(str(number), lambda n: n + 1, default=0)
            time.sleep(0.01)
        self.state.n += 1
    return self.state.n


@singleton_task(app, state_schema=Counter, name="forks", max_retries=0)
def forks(self: SingletonTask[Counter], until: str, childs_end: str) -> int:
    """Fork a child that reads the state and outlives the body. The body goes on and saves."""
    with self.transaction() as connection:
        connection.exec_driver_sql("SELECT 1")
        child = os.fork()
        if not child:
            wait_for(childs_end)
            note("child ends", n=self.state.n)
            os._exit(0)
        self.state.n += 1
    note("forked", child=child)
    while not Path(until).exists():
        self.state.n += 1
        self.checkpoint()
        time.sleep(0.01)
    return self.state.n


class Recorded(SingletonTask[Counter]):
    """A base class that kills its process, or waits, after the run's save and before Celery records
    the result.
    """

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        what, path = args[:2]
        if what == "die" and not Path(path).exists():
            Path(path).touch()
            note("saved")
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "wait" and not Path(f"{path}.saved").exists():
            Path(f"{path}.saved").touch()
            note("saved")
            wait_for(path)
        return result


@app.task(
    bind=True,
    base=Recorded,
    state_schema=Counter,
    name="imports",
    default_retry_delay=0,
)
def imports(self: Any, what: str, path: str, size: int = 0) -> str:
    note("imports")
    self.state.n += 1
    return f"imported {self.state.n}{'.' * size}"


@app.task(name="reports")
def reports(result: Any) -> Any:
    note("reports", result=result)
    return result


@singleton_task(app, state_schema=Counter, name="dies_until", max_retries=2, default_retry_delay=0)
def dies_until(self: SingletonTask[Counter], deaths: int) -> int:
    """Kill the process in each of the first ``deaths`` runs."""
    note("enter", task="dies_until", fence=self.fence)
    self.state.n += 1
    self.checkpoint()
    if self.state.n <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return self.state.n
