"""``contention``: 64 processes compete for 1, 64 or 10,000 singletons on PostgreSQL.

For some seconds each process tries to acquire singletons at random. A process that gets a lease
releases it with a state, as a delivery does. The benchmark measures the rates of acquired leases
and of conflicts, the time of an acquisition, and the dead rows that remain some time later.
PostgreSQL's autovacuum has its default settings, except that it checks the tables every second
instead of every minute.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import Ended, NewValue, Write

from .servers import Servers

PROCESSES = 64
SINGLETONS = (1, 64, 10_000)
TTL = 60.0
#: How many seconds to wait for autovacuum at most.
PATIENCE = 30.0
PAST = '["0123456789abcdef",0,"h:1:a",1,null,"succeeded",null,1.0,2.0]'
HISTORY = f"[{','.join([PAST] * 16)}]"


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print the table."""
    seconds = 3.0 if quick else 15.0
    table = Table(title=f"contention: {PROCESSES} processes, PostgreSQL", title_justify="left")
    for heading in (
        *("singletons", "acquired/s", "refused/s", "acquire ms (p50)", "ms (p99)"),
        *("rows", "dead rows", "size MB"),
    ):
        table.add_column(heading, justify="right")
    with psycopg.connect(servers.postgres, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET autovacuum_naptime = '1s'")
        connection.execute("SELECT pg_reload_conf()")
        for count in SINGLETONS:
            with console.status(f"contention: {count}"):
                table.add_row(f"{count:,}", *_measure(servers, connection, count, seconds))
    console.print(table)


def _measure(
    servers: Servers, connection: psycopg.Connection, count: int, seconds: float
) -> list[str]:
    name = f"contended_{count}"
    open_store(servers.postgres, name, 10.0, auto_migrate=True).close()
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Event(), spawn.Queue()
    workers = [
        spawn.Process(target=_work, args=(servers.postgres, name, count, seconds, start, results))
        for _ in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        # Each process reports that it has connected.
        results.get()
    start.set()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    taken = sorted(each for acquired, _ in found for each in acquired)
    refused = sum(away for _, away in found)
    return [
        f"{len(taken) / seconds:.0f}",
        f"{refused / seconds:.0f}",
        f"{taken[len(taken) // 2] * 1e3:.2f}",
        f"{taken[int(len(taken) * 0.99)] * 1e3:.1f}",
        *_rows(connection, name),
    ]


def _work(url: str, table: str, count: int, seconds: float, start: Any, results: Any) -> None:
    store = open_store(url, table, 10.0, pool_size=1)
    store.peek("connects")
    chance = random.Random(os.getpid())
    results.put("connected")
    start.wait()
    acquired, away = [], 0
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        number += 1
        asked = time.perf_counter()
        found = store.acquire(
            f"k{chance.randrange(count)}", f"h:{os.getpid()}:a.{number:x}", TTL, None
        )
        if found is None:
            away += 1
            continue
        acquired.append(time.perf_counter() - asked)
        write = Write(1, found.write, NewValue('{"count":1}', 1))
        store.release(found.lease, Ended("succeeded", HISTORY), write)
    store.close()
    results.put((acquired, away))


def _rows(connection: psycopg.Connection, table: str) -> tuple[str, str, str]:
    """Wait for autovacuum; return the numbers of rows and dead rows, and the size in megabytes."""
    query = (
        "SELECT n_live_tup, n_dead_tup, pg_total_relation_size(relid) FROM pg_stat_user_tables"
        " WHERE relname = %s"
    )
    end = time.monotonic() + PATIENCE
    while True:
        connection.execute("SELECT pg_stat_clear_snapshot()")
        row = connection.execute(query, [table]).fetchone()
        assert row is not None
        live, dead, size = row
        # Autovacuum leaves a table alone until its dead rows exceed 50 plus a fifth of its rows.
        if dead <= 50 + 0.2 * live or time.monotonic() > end:
            return f"{live:,}", f"{dead:,}", f"{size / 1e6:.1f}"
        time.sleep(0.5)
