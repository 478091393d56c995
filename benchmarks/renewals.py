"""``renewals``: measure what the free space that ``migrate`` leaves in the table's pages saves.

The benchmark uses two tables of one PostgreSQL database, the second without ``fillfactor``. For
each table it measures the bytes of write-ahead log for one renewed lease, the size with the indexes
at the end, and the median time to renew all leases once. All rows are held, either by one process,
whose one statement renews them all, or by 50 processes in turns.

The server logs a whole page when the page is changed for the first time after a checkpoint. The
benchmark makes one checkpoint before the first renewal; later ones are up to the server.
"""

from __future__ import annotations

import random
import statistics
import string
import time

import psycopg
from rich.console import Console
from rich.table import Table

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.store.base import Lease

from .measure import relate, take_turns
from .servers import Servers

LEASES = 1_000
PROCESSES = (1, 50)
#: The sizes of the histories that are measured, in bytes: of one or two runs, and of sixteen. Their
#: content cannot be compressed.
HISTORIES = (200, 1500)
OURS, FULL = "renewals_ours", "renewals_full"
HEADINGS = ("processes", "history", "fillfactor", "log, bytes", "ratio to ours")
HEADINGS_OF_ALL = ("size, MB", "all, ms", "ratio to ours")

_INSERT = """
INSERT INTO {table} (key, value, updated_at, schema_version, fence, write, holder, task_id,
  acquired_at, expires_at, run_count, last_outcome, last_finished_at, history)
VALUES (%s, '{{"n": 1}}', now(), 1, 1, 1, %s, gen_random_uuid(),
  now(), now() + interval '1 hour', 16, 'succeeded', now(), %s)
"""
_FILL_FACTOR = """
SELECT coalesce(substring(array_to_string(reloptions, ','), 'fillfactor=([0-9]+)')::integer, 100)
FROM pg_class WHERE relname = '{table}'
"""


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print one table."""
    table = Table(
        title="renewals: write-ahead log per renewed lease (of 1,000), PostgreSQL",
        title_justify="left",
    )
    for heading in (*HEADINGS, *HEADINGS_OF_ALL):
        table.add_column(heading, justify="right")
    for processes in PROCESSES:
        for history in HISTORIES:
            with console.status(f"renewals: {processes} processes"):
                _measure(servers.postgres, (processes, history), quick, table)
    console.print(table)


def _measure(url: str, case: tuple[int, int], quick: bool, table: Table) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        renewals = {name: _Renewals(url, connection, name, *case) for name in (OURS, FULL)}
        connection.execute("CHECKPOINT")
        steps = {name: each.renew_all for name, each in renewals.items()}
        taken = take_turns(steps, 30 if quick else 75)
        of_ours = statistics.mean(renewals[OURS].log)
        for name, each in renewals.items():
            log = statistics.mean(each.log)
            table.add_row(
                *(f"{number:,}" for number in (*case, each.fill_factor())),
                *(f"{log:,.0f}", f"{log / of_ours:.1f}", f"{each.size() / 1e6:.1f}"),
                *(f"{statistics.median(taken[name]) * 1e3:.0f}", str(relate(taken, name, OURS))),
            )
            each.close()


class _Renewals:
    """One table, whose leases are all held.

    :param log: the bytes of log per lease, one figure for each renewal of all leases.
    """

    def __init__(
        self,
        url: str,
        connection: psycopg.Connection,
        name: str,
        processes: int,
        history: int,
    ) -> None:
        self._connection, self._name, self._processes = connection, name, processes
        self.log: list[float] = []
        migrate_url(url, name)
        if name == FULL:
            connection.execute(f"ALTER TABLE {name} RESET (fillfactor)".encode())
        self._store = open_store(url, name, 10.0)
        self._leases = [Lease(f"key-{n}", f"host:1:abc.{n:x}", 1, 3600.0) for n in range(LEASES)]
        rows = [(lease.key, lease.holder, _any_text(history)) for lease in self._leases]
        with connection.cursor() as cursor:
            cursor.executemany(_INSERT.format(table=name).encode(), rows)
        connection.execute(f"VACUUM ANALYZE {name}".encode())
        random.shuffle(self._leases)

    def renew_all(self) -> float:
        """Let each process renew its leases; return the seconds that this takes."""
        before, started = self._position(), time.perf_counter()
        for process in range(self._processes):
            held = self._leases[process :: self._processes]
            assert len(self._store.renew(held)) == len(held)
        taken = time.perf_counter() - started
        self.log.append((self._position() - before) / len(self._leases))
        return taken

    def fill_factor(self) -> int:
        return self._number(_FILL_FACTOR.format(table=self._name))

    def size(self) -> int:
        return self._number(f"SELECT pg_total_relation_size('{self._name}')")

    def close(self) -> None:
        self._store.close()
        self._connection.execute(f"DROP TABLE {self._name}, {self._name}_version".encode())

    def _position(self) -> int:
        return self._number("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint")

    def _number(self, query: str) -> int:
        row = self._connection.execute(query.encode()).fetchone()
        assert row is not None
        return int(row[0])


def _any_text(length: int) -> str:
    return "".join(random.choices(string.ascii_letters + string.digits, k=length))
