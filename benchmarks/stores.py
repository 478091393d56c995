"""``stores``: measure each operation of each store, and the bare driver with the same statement.

A store's operation (a *verb*, such as ``acquire``) is measured in two ways: as a call of the store,
and as the same statement with the same parameters, sent over a connection of the driver itself,
with its answer fetched. The two ways take turns, in blocks. Server and client share a machine. A
network would add one round trip, because each operation here is one round trip.

MariaDB is measured if it is installed.
"""

from __future__ import annotations

import re
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha1
from typing import Any

import msgspec
import psycopg
import pymysql
import redis
from pymysql.constants import CLIENT
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import Acquired, Ended, Lease, Leases, NewValue, Write
from celery_singleton_state.store.redis import scripts
from celery_singleton_state.store.redis.store import INDEX, RedisStore
from celery_singleton_state.store.sql.store import SqlStore

from .measure import Samples, relate
from .servers import Servers

TTL = 60.0
MANY = 100
PAST = '["0123456789abcdef",0,"h:1:a",1,null,"succeeded",null,1.0,2.0]'
HISTORY = f"[{','.join([PAST] * 16)}]"
ENDED = Ended("succeeded", HISTORY)
#: The write of each call. It is the first write of its lease, or a repetition of that write.
WRITE = Write(1, 0, NewValue('{"count":1}', 1))

#: A function that sends a text with named parameters, or a script with keys and arguments.
Send = Callable[..., Any]


@dataclass(frozen=True)
class Verb:
    """One operation of a store, and the same statement without the store.

    :param call: calls the store's operation.
    :param bare: sends the same statement without the store.
    :param before: makes the next call possible; its time is not measured.
    """

    name: str
    call: Callable[[], Any]
    bare: Callable[[], Any]
    before: Callable[[], Any] = lambda: None


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print one table for each store."""
    blocks = 5 if quick else 25
    urls = {"PostgreSQL": servers.postgres, "SQLite": servers.sqlite("stores")}
    if servers.mariadb:
        urls["MariaDB"] = servers.mariadb
    for name, url in urls.items():
        store = open_store(url, "stores", 10.0, auto_migrate=True)
        with console.status(f"stores: {name}"), _bare_sql(url) as send:
            console.print(_table(name, [_measure(verb, blocks) for verb in _sql(store, send)]))
        store.close()
    leases = RedisStore(servers.broker.replace("/0", "/7"), 10.0)
    client = redis.Redis.from_url(servers.broker.replace("/0", "/7"), decode_responses=True)
    with console.status("stores: Redis"), client:
        verbs = _redis(leases, client)
        console.print(_table("Redis leases", [_measure(verb, blocks) for verb in verbs]))
    leases.close()


def _acquired(store: Leases, key: str = "k") -> Acquired:
    acquired = store.acquire(key, "h:1:a", TTL, "task")
    assert acquired is not None
    return acquired


def _sql(store: SqlStore, send: Send) -> Iterator[Verb]:
    sql = store._sql
    release = sql.save_and_release

    def named(lease: Lease, **more: Any) -> dict[str, Any]:
        return {"key": lease.key, "fence": lease.fence, "holder": lease.holder, **more}

    def free() -> None:
        store.release(_acquired(store).lease, ENDED, WRITE)

    asked = {"key": "k", "holder": "h:1:a", "ttl": TTL, "task_id": "task"}
    asked |= {"rank": 0, "sent": None, "of_clock": None, "task": "t"}
    yield Verb("acquire", lambda: _acquired(store), lambda: send(sql.acquire, asked), free)
    lease = _acquired(store).lease
    new = {"value": WRITE.new.value, "schema_version": 1, "number": 1, "seen": 0}
    yield Verb(
        "save",
        lambda: store.save(lease, WRITE),
        lambda: send(sql.save, named(lease, ttl=TTL, **new)),
    )
    ended = {"outcome": "succeeded", "history": HISTORY, "hold": 0.0, "ticks_done": None}
    # Each release needs the fence of the acquisition just before it.
    held: list[Lease] = [lease]
    yield Verb(
        "release, with a state",
        lambda: store.release(held[-1], ENDED, WRITE),
        lambda: send(release, named(held[-1], **ended, **new)),
        lambda: held.append(_acquired(store).lease),
    )
    lease = _acquired(store).lease
    many = [_acquired(store, f"many-{n}").lease for n in range(MANY)]
    for name, leases, text in (
        ("renew 1", [lease], sql.renew),
        (f"renew {MANY}", many, sql.renew_unlocked),
    ):
        document = {"leases": msgspec.json.encode(leases).decode()}
        yield Verb(
            name,
            partial(store.renew, leases),
            partial(send, text, document),
        )
    yield Verb("peek", lambda: store.peek("k"), lambda: send(sql.peek, {"key": "k"}))


def _redis(store: RedisStore, client: Any) -> Iterator[Verb]:
    def send(script: str, keys: list[str], *arguments: Any) -> Any:
        return client.evalsha(sha1(script.encode()).hexdigest(), len(keys), *keys, *arguments)

    def free() -> None:
        store.release(_acquired(store).lease, ENDED)

    free()
    acquire = ("h:1:a", TTL, "task", 0, "")
    yield Verb(
        "acquire",
        lambda: _acquired(store),
        lambda: send(scripts.ACQUIRE, ["k", INDEX], *acquire),
        free,
    )
    held: list[Lease] = [_acquired(store).lease]
    yield Verb(
        "release",
        lambda: store.release(held[-1], ENDED),
        lambda: send(
            scripts.RELEASE, ["k"], "h:1:a", held[-1].fence, "succeeded", HISTORY, 0.0, ""
        ),
        lambda: held.append(_acquired(store).lease),
    )
    many = [_acquired(store, f"many-{n}").lease for n in range(MANY)]
    for name, leases in (("renew 1", [_acquired(store).lease]), (f"renew {MANY}", many)):
        keys = [lease.key for lease in leases]
        words = [part for lease in leases for part in (lease.holder, lease.fence, lease.ttl)]
        yield Verb(
            name,
            partial(store.renew, leases),
            partial(send, scripts.RENEW, keys, *words),
        )
    yield Verb("peek", lambda: store.peek("k"), lambda: send(scripts.PEEK, ["k"]))


@contextmanager
def _bare_sql(url: str) -> Iterator[Send]:
    """Yield a function that sends over the driver's connection, in autocommit mode."""
    parts = make_url(url)
    connection: Any
    if parts.get_backend_name() == "sqlite":
        connection = sqlite3.connect(parts.database or "", isolation_level=None)
        connection.execute("PRAGMA synchronous = NORMAL")
    elif parts.get_backend_name() == "mysql":
        connection = pymysql.connect(
            host=parts.host,
            port=parts.port or 3306,
            user=parts.username,
            database=parts.database,
            autocommit=True,
            client_flag=CLIENT.MULTI_STATEMENTS | CLIENT.FOUND_ROWS,
            init_command="SET time_zone = '+00:00'",
        )
    else:
        dsn = re.sub(r"\+psycopg", "", url)
        connection = psycopg.connect(dsn, autocommit=True, prepare_threshold=0)

    def send(text: str, named: dict[str, Any]) -> Any:
        cursor = connection.cursor()
        cursor.execute(text, named)
        found = cursor.fetchall() if cursor.description else []
        cursor.close()
        return found

    yield send
    connection.close()


@dataclass(frozen=True)
class Figures:
    """The times of one verb in seconds: each call of the store, and the medians of the blocks."""

    name: str
    own: list[float]
    samples: Samples


def _measure(verb: Verb, blocks: int, times: int = 40) -> Figures:
    own: list[float] = []
    samples: Samples = {"store": [], "bare": []}
    for _ in range(blocks):
        taken = [_time(verb.before, verb.call) for _ in range(times)]
        samples["store"].append(statistics.median(taken))
        samples["bare"].append(
            statistics.median(_time(verb.before, verb.bare) for _ in range(times))
        )
        own += taken
    return Figures(verb.name, own, samples)


def _time(before: Callable[[], Any], call: Callable[[], Any]) -> float:
    before()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _table(name: str, found: list[Figures]) -> Table:
    table = Table(title=f"stores: {name}", title_justify="left")
    table.add_column("verb")
    for heading in ("us (p50)", "us (p99)", "ratio to the bare driver (least-most)"):
        table.add_column(heading, justify="right")
    for each in found:
        ordered = sorted(each.own)
        table.add_row(
            each.name,
            f"{statistics.median(ordered) * 1e6:.0f}",
            f"{ordered[int(len(ordered) * 0.99)] * 1e6:.0f}",
            str(relate(each.samples, "store", "bare")),
        )
    return table
