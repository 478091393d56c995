"""``statements``: measure what a run costs beyond the two SQL statements that it needs.

The benchmark measures the same two statements (acquire and load, save and release) with the same
values, in one process and one thread:

- on a bare driver connection: prepared, in autocommit mode, without a pool;
- as the store's ``acquire`` and ``release``;
- as a direct call of a stateful task, which adds keys, history, state and heartbeat, and Celery's
  own work for a call.

Not measured: a worker, a broker, waiting for a row that another transaction has locked.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import psycopg
from celery import Celery
from rich.console import Console
from rich.table import Table

from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.history import Entry, Outcome
from celery_singleton_state.runtime import close_runtime, runtime_of
from celery_singleton_state.store.base import Ended, NewValue, Write
from celery_singleton_state.store.sql.dialects import statements_for
from celery_singleton_state.store.sql.store import SqlStore

from .measure import Samples, median_time, microseconds, relate, take_turns
from .servers import Servers
from .tasks import Counter

TTL = 8.0
TARGET = "<= 1.4"
BARE, STORE, CALL = "two bare statements", "store.acquire, store.release", "a task's direct call"

_counter = itertools.count(1)


def _histories() -> Iterator[str]:
    """Return an endless cycle of histories, as a singleton's runs would write them."""
    entries = [
        Entry(None, 0, f"host:12345:0123abcd{n:x}", n, None, "succeeded", None, 1e9 + n / 7, 1e9)
        for n in range(1000, 1064)
    ]
    windows = [entries[n : n + 16] for n in range(len(entries) - 16)]
    return itertools.cycle([msgspec.json.encode(window).decode() for window in windows])


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print one table for each database."""
    for title, url in (("PostgreSQL", servers.postgres), ("SQLite", servers.sqlite("statements"))):
        app = make_app(url)
        with console.status(f"statements: {title}"):
            samples = _measure(app, url, quick)
        close_runtime(app)
        console.print(_table(title, samples))


def make_app(url: str) -> Celery:
    """Return an app without a broker, with one stateful singleton, ``count``."""
    app = Celery("statements", broker="memory://", set_as_current=False)
    app.conf.update(singleton_store_url=url, singleton_auto_migrate=True)
    app.conf.update(singleton_table="statements")

    @singleton_task(app, name="count", shared=False, state_schema=Counter)
    def count(self: SingletonTask[Counter]) -> None:
        self.state.count += 1

    return app


def _measure(app: Celery, url: str, quick: bool) -> Samples:
    store = runtime_of(app).sql
    calls: dict[str, Callable[[], object]] = {
        BARE: _bare_round(store, url),
        STORE: _store_round(store),
        CALL: app.tasks["count"],
    }
    for call in calls.values():
        median_time(call, 50)
    times = 100 if quick else 300
    cases = {name: partial(median_time, call, times) for name, call in calls.items()}
    return take_turns(cases, turns=9 if quick else 25)


def _bare_round(store: SqlStore, url: str) -> Callable[[], None]:
    sql = statements_for(store.table, store.engine.dialect)
    execute = _bare_sqlite(url) if url.startswith("sqlite") else _bare_postgres(url)
    lease = {"key": "bare", "holder": "bare:1:1", "ttl": TTL, "task_id": None}
    lease |= {"rank": 0, "sent": None, "of_clock": None, "task": "bare"}
    histories = _histories()

    def round_trips() -> None:
        fence, *_, seen, _ = execute(sql.acquire, lease).fetchone()
        execute(
            sql.save_and_release,
            {
                "key": "bare",
                "holder": "bare:1:1",
                "fence": fence,
                "value": _new_value(),
                "schema_version": 1,
                "number": 1,
                "seen": seen,
                "outcome": "succeeded",
                "history": next(histories),
                "ticks_done": None,
                "hold": 0.0,
            },
        )

    return round_trips


def _bare_postgres(url: str) -> Callable[[str, dict[str, Any]], Any]:
    return psycopg.connect(url, autocommit=True, prepare_threshold=0).cursor().execute


def _bare_sqlite(url: str) -> Callable[[str, dict[str, Any]], Any]:
    connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection.execute


def _store_round(store: SqlStore) -> Callable[[], None]:
    histories = _histories()

    def round_trips() -> None:
        acquired = store.acquire("store", "store:1:1", TTL, None)
        assert acquired is not None
        ended = Ended(Outcome.SUCCEEDED, next(histories))
        store.release(acquired.lease, ended, Write(1, acquired.write, NewValue(_new_value(), 1)))

    return round_trips


def _new_value() -> str:
    """Return a new value each time, because a run does not save an unchanged value."""
    return f'{{"count":{next(_counter)}}}'


def _table(title: str, samples: Samples) -> Table:
    table = Table(title=f"statements: a whole run, {title}", title_justify="left")
    table.add_column("measured")
    for heading in ("us", "ratio to bare (least-most)", "target"):
        table.add_column(heading, justify="right")
    for name, seconds in samples.items():
        target = TARGET if title == "PostgreSQL" and name != BARE else ""
        table.add_row(name, microseconds(seconds), str(relate(samples, name, BARE)), target)
    return table
