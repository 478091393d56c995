"""The jobs of a storm for the other contestants: other packages, or no package.

``STORM_PEER`` names the contestant. Each contestant keeps the state in a table, and reads and
writes it where our tasks do. Each has the options with which Celery repeats a task whose process
died, and a Redis lock that outlives every body.
"""

from __future__ import annotations

import os
import uuid
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import msgspec
import redis
import sqlalchemy as sa
from celery import Celery
from celery_once import QueueOnce
from celery_singleton import Singleton
from sqlalchemy.dialects.postgresql import insert

from tests.storm.bodies import checks_of
from tests.storm.jobs import Line, Trail, effects
from tests.storm.notes import note
from tests.storm.signals import observe

#: Seconds until a contestant's lock expires: longer than the longest body, which takes 5.5 s.
EXPIRY = 8

BROKER = os.environ.get("CELERY_BROKER_URL", "")

app = Celery("storm")
app.conf.update(
    worker_prefetch_multiplier=1,
    broker_connection_max_retries=None,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"visibility_timeout": 5.0, "unacked_mutex_expire": 2},
    task_ignore_result=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    singleton_backend_url=BROKER,
    ONCE={"backend": "celery_once.backends.Redis", "settings": {"url": BROKER}},
)

states = sa.Table(
    "kv_store",
    sa.MetaData(),
    sa.Column("key", sa.Text),
    sa.Column("value", sa.Text),
    sa.Column("updated_at", sa.DateTime(timezone=True)),
)


@cache
def engine(_pid: int) -> sa.Engine:
    return sa.create_engine(os.environ["CELERY_SINGLETON_STORE_URL"], pool_pre_ping=True)


def load(name: str) -> Trail:
    with engine(os.getpid()).connect() as connection:
        value = connection.scalar(sa.select(states.c.value).where(states.c.key == name))
    return msgspec.json.decode(value, type=Trail) if value else Trail(name)


def save(connection: sa.Connection, trail: Trail) -> None:
    value = {"value": msgspec.json.encode(trail).decode()}
    row = insert(states).values(key=trail.name, updated_at=sa.func.now(), **value)
    connection.execute(row.on_conflict_do_update(index_elements=["key"], set_=value))


def work(run: str, name: str, job: str, seconds: float) -> None:
    """Note again and again that the body runs. It has no lease, so it cannot check whether it may
    go on.
    """
    for _ in checks_of(job, 0, seconds):
        note("trusts", run=run, singleton=name)


def body(name: str, job: str, seconds: float) -> None:
    """Do the same as ``tests.storm.tasks.step``, without a lease."""
    run = uuid.uuid4().hex[:8]
    trail = load(name)
    note("enter", singleton=name, run=run, job=job, fence=0, lines=len(trail.lines))
    work(run, name, job, seconds / 2)
    with engine(os.getpid()).begin() as connection:
        trail.position += 1
        event = {"singleton": name, "event": trail.position, "job": job, "fence": 0}
        connection.execute(effects.insert(), event)
        save(connection, trail)
    work(run, name, job, seconds / 2)
    trail.lines.append(Line(job, 0, trail.position))
    with engine(os.getpid()).begin() as connection:
        save(connection, trail)


def locked(self: Any, name: str, job: str, seconds: float) -> None:
    """Run the body under a hand-made Redis lock. If the lock is taken, retry the task."""
    lock = redis.Redis.from_url(BROKER).lock(f"lock-{name}", timeout=EXPIRY)
    if not lock.acquire(blocking=False):
        raise self.retry(countdown=0.5)
    try:
        body(name, job, seconds)
    finally:
        lock.release()


PEERS: dict[str, Any] = {
    "nothing": partial(app.task, body),
    "by hand": partial(app.task, locked, bind=True),
    "celery-singleton": partial(
        app.task, body, base=Singleton, unique_on=["name"], lock_expiry=EXPIRY
    ),
    "celery-once": partial(
        app.task, body, base=QueueOnce, once={"keys": ["name"], "timeout": EXPIRY, "graceful": True}
    ),
}

make = PEERS[os.environ["STORM_PEER"]]
make(
    name="step",
    max_retries=None,
    autoretry_for=(sa.exc.DBAPIError, redis.RedisError),
    retry_kwargs=MappingProxyType({"countdown": 0.5}),
)
SINGLETONS = {f"a{n}": "step" for n in range(10)}

observe()
