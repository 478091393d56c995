"""``events``: measure what a worker's events (``-E``) cost: Celery's own, and this package's.

The drains are those of ``worker``, in a solo pool. This is the worst case, because there the thread
that forwards the events shares its process with the bodies. No program receives the events.
"""

from __future__ import annotations

import statistics
from functools import partial

from rich.console import Console
from rich.table import Table

from .drain import Pool, Variant, drain
from .measure import relate, take_turns
from .servers import Servers

OFF, ON = Pool("solo", 1), Pool("solo", 1, ("-E",))
TARGETS = {"this package, PostgreSQL": ">= 0.85", "this package, SQLite": ">= 0.85"}


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print the table."""
    variants = {
        "plain Celery task": Variant("plain", servers.postgres),
        "this package, PostgreSQL": Variant("stateful", servers.postgres),
        "this package, SQLite": Variant("stateful", servers.sqlite("events")),
    }
    count, turns = (800, 2) if quick else (2500, 7)
    cases = {
        f"{name}, {word}": partial(_rate, servers, variant, pool, count)
        for name, variant in variants.items()
        for word, pool in (("off", OFF), ("on", ON))
    }
    samples = take_turns(cases, turns)
    table = Table(title="events: tasks per second, solo", title_justify="left")
    table.add_column("variant")
    for heading in ("events off", "events on", "ratio on/off (least-most)", "target"):
        table.add_column(heading, justify="right")
    for name in variants:
        off, on = f"{name}, off", f"{name}, on"
        table.add_row(
            name,
            f"{statistics.median(samples[off]):.0f}",
            f"{statistics.median(samples[on]):.0f}",
            str(relate(samples, on, off)),
            TARGETS.get(name, ""),
        )
    console.print(table)


def _rate(servers: Servers, variant: Variant, pool: Pool, count: int) -> float:
    return drain(servers, variant, pool, count).rate
