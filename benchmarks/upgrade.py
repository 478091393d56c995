"""``upgrade``: measure how long clients wait while a table of three columns is upgraded.

One connection sends reads and writes without a pause, while ``migrate`` runs in another process on
a PostgreSQL table of three columns. The benchmark measures the longest of these reads and writes.
If the table has its index already, only columns are added; otherwise the index is built as well.
For comparison the median read, and the longest read or write, are measured while no upgrade runs.

Not measured: how long the upgrade waits for other clients' transactions, because they decide it.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import psycopg
from psycopg import sql
from rich.console import Console
from rich.table import Table

from celery_singleton_state.migrations.upgrade import migrate_url

from .measure import Samples, median_time, relate, take_turns
from .servers import Servers

SIZES = (1_000, 1_000_000)
#: How many seconds to read and write while no upgrade runs.
ALONE = 1.0

_MAKE = """
CREATE TABLE {table} (
  key varchar(255) PRIMARY KEY, value text NOT NULL, updated_at timestamptz NOT NULL
)
"""
_FILL = """
INSERT INTO {table} SELECT 'row-' || n, '{{"count": 1}}', now() - n * interval '1 second'
FROM generate_series(1, {size}) AS n
"""
_COLUMNS = """
SELECT column_name FROM information_schema.columns
WHERE table_name = %s AND column_name NOT IN ('key', 'value', 'updated_at')
"""
_READ = "SELECT value, updated_at FROM {table} WHERE key = %s"
_WRITE = "UPDATE {table} SET value = %s, updated_at = clock_timestamp() WHERE key = %s"

MEDIAN, ALONE_LONGEST, COLUMNS, INDEX = "median", "longest", "columns", "index"
HEADINGS = (
    "rows",
    "read (p50)",
    "longest",
    "columns",
    "ratio to a read",
    "and index",
    "ratio to a read",
)


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print one table."""
    turns = 3 if quick else 9
    table = Table(title="upgrade: the longest wait, PostgreSQL, ms", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for size in SIZES:
        with console.status(f"upgrade: {size:,} rows"):
            samples = _measure(servers.postgres, size, turns)
        table.add_row(f"{size:,}", *_cells(samples))
    console.print(table)


def _measure(url: str, size: int, turns: int) -> Samples:
    with psycopg.connect(url, autocommit=True) as connection:
        used = _Used(url, connection, size)
        return take_turns(
            {
                MEDIAN: used.read,
                ALONE_LONGEST: lambda: max(used.alone()),
                COLUMNS: lambda: max(used.while_upgraded(with_index=True)),
                INDEX: lambda: max(used.while_upgraded(with_index=False)),
            },
            turns,
        )


def _cells(samples: Samples) -> list[str]:
    medians = {name: f"{statistics.median(taken) * 1e3:.2f}" for name, taken in samples.items()}
    ratios = {name: str(relate(samples, name, MEDIAN)) for name in (COLUMNS, INDEX)}
    return [
        medians[MEDIAN],
        medians[ALONE_LONGEST],
        *(text for name in (COLUMNS, INDEX) for text in (medians[name], ratios[name])),
    ]


class _Used:
    """A table that one connection uses without a pause."""

    def __init__(self, url: str, connection: psycopg.Connection, size: int) -> None:
        self._url, self._connection, self._size = url, connection, size
        self._name = f"upgrade_{size}"
        self._table = sql.Identifier(self._name)
        self._do(_MAKE)
        self._do(_FILL, size=sql.Literal(size))
        self._do("VACUUM ANALYZE {table}")
        self._connection.execute("CHECKPOINT")

    def read(self) -> float:
        read = sql.SQL(_READ).format(table=self._table)
        return median_time(lambda: self._connection.execute(read, (self._any_key(),)), 1000)

    def alone(self) -> list[float]:
        until = time.monotonic() + ALONE
        return self._use(lambda: time.monotonic() < until)

    def while_upgraded(self, with_index: bool) -> list[float]:
        self._strip()
        if with_index:
            self._do("CREATE INDEX {index} ON {table} (updated_at)")
        spawn = multiprocessing.get_context("spawn")
        upgrade = spawn.Process(target=migrate_url, args=(self._url, self._name))
        upgrade.start()
        taken = self._use(upgrade.is_alive)
        assert upgrade.exitcode == 0
        return taken

    def _use(self, continues: Callable[[], bool]) -> list[float]:
        read, write = (sql.SQL(text).format(table=self._table) for text in (_READ, _WRITE))
        taken = []
        while continues():
            key = self._any_key()
            for act in (
                partial(self._connection.execute, read, (key,)),
                partial(self._connection.execute, write, ('{"count": 2}', key)),
            ):
                started = time.perf_counter()
                act()
                taken.append(time.perf_counter() - started)
        return taken

    def _any_key(self) -> str:
        return f"row-{random.randint(1, self._size)}"

    def _strip(self) -> None:
        """Leave three columns and no index, as before the first upgrade."""
        for (column,) in self._connection.execute(_COLUMNS, (self._name,)).fetchall():
            self._do("ALTER TABLE {table} DROP COLUMN {column}", column=sql.Identifier(column))
        self._do("DROP TABLE IF EXISTS {versions}")
        self._do("DROP INDEX IF EXISTS {index}")

    def _do(self, statement: str, **more: sql.Composable) -> None:
        names = {
            "table": self._table,
            "index": sql.Identifier(f"idx_{self._name}_updated_at"),
            "versions": sql.Identifier(f"{self._name}_version"),
        }
        self._connection.execute(sql.SQL(statement).format(**names, **more))
