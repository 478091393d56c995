"""``heartbeat``: measure one renewal of all leases that a process holds, which is one statement."""

from __future__ import annotations

import statistics
import time

from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import Lease
from celery_singleton_state.store.sql.store import SqlStore

from .servers import Servers

COUNTS = (1, 100, 10_000)
#: The content of the history does not matter for a renewal. It makes the rows as large as in real
#: use.
HISTORY = "x" * 2000


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print one table."""
    table = Table(title="heartbeat: milliseconds of one renewal", title_justify="left")
    for heading in ("store", *(f"{count:,} leases" for count in COUNTS), "target"):
        table.add_column(heading, justify="left" if heading == "store" else "right")
    for name, url in {"PostgreSQL": servers.postgres, "SQLite": servers.sqlite("beat")}.items():
        store = open_store(url, "heartbeats", 10.0, auto_migrate=True)
        leases = _hold(store, max(COUNTS))
        figures = [_median(store, leases[:count], 3 if quick else 15) for count in COUNTS]
        table.add_row(name, *(f"{figure * 1e3:.1f}" for figure in figures), "<= 250")
        store.close()
    console.print(table)


def _hold(store: SqlStore, count: int) -> list[Lease]:
    """Insert rows with held leases, all at once, and return the leases."""
    leases = [Lease(f"key-{n}", f"host:1:abc.{n:x}", 1, 3600.0) for n in range(count)]
    insert = (
        "INSERT INTO heartbeats (key, value, updated_at, fence, holder, history)"
        " VALUES (:key, 'null', :now, 1, :holder, :history)"
    )
    rows = [{"key": lease.key, "holder": lease.holder, "history": HISTORY} for lease in leases]
    with store.engine.connect() as connection:
        now = connection.scalar(text("SELECT CURRENT_TIMESTAMP"))
        connection.execute(text(insert), [row | {"now": now} for row in rows])
    return leases


def _median(store: SqlStore, leases: list[Lease], times: int) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        renewed = store.renew(leases)
        taken.append(time.perf_counter() - started)
        assert len(renewed) == len(leases)
    return statistics.median(taken)
