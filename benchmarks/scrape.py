"""``scrape``: measure how long the exporter takes to answer ``/metrics``, by number of singletons.

The singletons are keys of one task. A tenth of them are held. Each has a history of failed runs,
which makes the longest rows that a scrape reads. A real exporter process is asked over HTTP. For
comparison, the one statement that it sends is measured through the bare driver.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import partial

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table

from celery_singleton_state import history
from celery_singleton_state.migrations.open_store import open_store

from .measure import Samples, median_time, relate, take_turns
from .servers import Servers, stop_process

SIZES = (10, 10_000)
#: How many runs each history has.
RUNS = 16
TASK = "benchmarks.tasks.stateful"
TARGET = "<= 1 s"

_FILL = """
INSERT INTO {table} (key, task, value, updated_at, fence, run_count, last_outcome, last_finished_at,
  history, holder, task_id, acquired_at, expires_at)
SELECT 'singleton-state:{task}{{"slot":' || n || '}}', '{task}', '{{"count": 1}}', now(), 1,
  1, 'failed', now(), {history}, holder, holder, CASE WHEN holder IS NOT NULL THEN now() END,
  CASE WHEN holder IS NOT NULL THEN now() + interval '1 hour' END
FROM (
  SELECT n, CASE WHEN n % 10 = 0 THEN 'worker@host:1:' || n END AS holder
  FROM generate_series(1, {size}) AS n
) AS made
"""

_READ = """
SELECT key, fence, holder, task_id, run_count, last_outcome, history,
  extract(epoch FROM updated_at), extract(epoch FROM acquired_at), extract(epoch FROM expires_at),
  extract(epoch FROM last_finished_at), extract(epoch FROM clock_timestamp())
FROM {table}
"""


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print the table."""
    times, turns = (3, 3) if quick else (5, 9)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(servers.postgres, autocommit=True))
        cases = {}
        for size in SIZES:
            _fill(servers, connection, size)
            read = sql.SQL(_READ).format(table=sql.Identifier(f"scrape_{size}"))
            cases[f"{size:,}: the statement alone"] = partial(_statement, connection, read, times)
            for name, options in (("a scrape", ()), ("a scrape, --per-key", ("--per-key",))):
                url = stack.enter_context(_exporter(servers, size, options))
                cases[f"{size:,}: {name}"] = partial(_scrape, url, times)
        with console.status("scrape: measuring"):
            take_turns(cases, 1)
            samples = take_turns(cases, turns)
    console.print(_table(samples))


def _fill(servers: Servers, connection: psycopg.Connection, size: int) -> None:
    name = f"scrape_{size}"
    open_store(servers.postgres, name, 10.0, auto_migrate=True).close()
    failed = history.Entry(
        *("7d9a5d0e-9f0b-4f5e-8f0f-1d2f2b1b7a11", 0, "worker@host:1:1", 1, None),
        *(history.Outcome.FAILED, "ValueError: as it was told", 1.5, 2.5, True),
    )
    connection.execute(
        sql.SQL(_FILL).format(
            table=sql.Identifier(name),
            task=sql.SQL(TASK),
            size=size,
            history=history.append((failed,) * RUNS, failed, RUNS),
        )
    )
    connection.execute(sql.SQL("VACUUM ANALYZE {}").format(sql.Identifier(name)))


@contextlib.contextmanager
def _exporter(servers: Servers, size: int, options: tuple[str, ...]) -> Iterator[str]:
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.tasks", "singleton", "exporter"]
    environment = os.environ | {
        "BENCHMARK_BROKER": servers.broker,
        "BENCHMARK_DATABASE": servers.postgres,
        "CELERY_SINGLETON_TABLE": f"scrape_{size}",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [*command, "--port", "0", *options],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1] + "metrics"
    finally:
        stop_process(process)  # type: ignore[arg-type]


def _statement(connection: psycopg.Connection, read: sql.Composed, times: int) -> float:
    return median_time(lambda: connection.execute(read).fetchall(), times)


def _scrape(url: str, times: int) -> float:
    def ask() -> None:
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert b"singleton_store_up 1.0" in answer.read()

    return median_time(ask, times)


def _table(samples: Samples) -> Table:
    table = Table(title="scrape: milliseconds, PostgreSQL", title_justify="left")
    for heading in (
        "singletons",
        "ms (p50)",
        "ratio to the statement alone (least-most)",
        "target",
    ):
        table.add_column(heading, justify="right")
    for name, seconds in samples.items():
        base = f"{name.partition(':')[0]}: the statement alone"
        table.add_row(
            name,
            f"{statistics.median(seconds) * 1e3:.1f}",
            "" if name == base else str(relate(samples, name, base)),
            TARGET if name.startswith("10,000: a scrape") else "",
        )
    return table
