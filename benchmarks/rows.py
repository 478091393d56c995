"""``rows``: measure whether acquiring a lease and loading its state gets slower as the table grows.

The benchmark measures the median time of ``store.acquire`` on singletons chosen at random. It does
so in three tables of one PostgreSQL database that differ only in their number of rows. Each lease
is released before the next is acquired, outside the measured time.

Not measured: a table whose pages are not in memory.
"""

from __future__ import annotations

import random
import statistics
import time
from functools import partial

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table

from celery_singleton_state.history import Outcome
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import Ended, NewValue, Write
from celery_singleton_state.store.sql.store import SqlStore

from .measure import Samples, microseconds, relate, take_turns
from .servers import Servers

SIZES = (1_000, 100_000, 1_000_000)
TTL = 8.0
IO_TIMEOUT = 10.0
TARGET = "<= 1.20"

_FILL = """
INSERT INTO {table} (key, value, updated_at, schema_version, fence, run_count, last_outcome,
  last_finished_at, history)
SELECT 'row-' || n, '{{"count": 1}}', now() - n * interval '1 second', 1, 1, 1, 'succeeded',
  now(), '[]'
FROM generate_series(1, {size}) AS n
"""


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print one table."""
    sizes = SIZES[:2] if quick else SIZES
    with console.status("rows: filling"):
        stores = {size: _filled(servers.postgres, size) for size in sizes}
    times, turns = (100, 9) if quick else (300, 25)
    cases = {f"{size:,}": partial(_median, stores[size], size, times) for size in sizes}
    with console.status("rows: measuring"):
        take_turns(cases, 3)
        samples = take_turns(cases, turns)
    for store in stores.values():
        store.close()
    console.print(_table(samples, base=f"{sizes[0]:,}"))


def _filled(url: str, size: int) -> SqlStore:
    name = f"rows_{size}"
    store = open_store(url, name, IO_TIMEOUT, auto_migrate=True)
    with psycopg.connect(url, autocommit=True) as connection:
        table = sql.Identifier(name)
        connection.execute(sql.SQL(_FILL).format(table=table, size=size))
        connection.execute(sql.SQL("VACUUM ANALYZE {}").format(table))
        connection.execute("CHECKPOINT")
    return store


def _median(store: SqlStore, size: int, times: int) -> float:
    taken = []
    for key in [f"row-{random.randint(1, size)}" for _ in range(times)]:
        started = time.perf_counter()
        acquired = store.acquire(key, "rows:1:1", TTL, None)
        taken.append(time.perf_counter() - started)
        assert acquired is not None
        ended = Ended(Outcome.SUCCEEDED, "[]")
        store.release(acquired.lease, ended, Write(1, acquired.write, NewValue('{"count":2}', 1)))
    return statistics.median(taken)


def _table(samples: Samples, base: str) -> Table:
    table = Table(title="rows: acquire and load, PostgreSQL", title_justify="left")
    for heading in ("rows", "us (p50)", f"ratio to {base} rows (least-most)", "target"):
        table.add_column(heading, justify="right")
    for name, seconds in samples.items():
        target = "" if name == base else TARGET
        table.add_row(name, microseconds(seconds), str(relate(samples, name, base)), target)
    return table
