"""``worker``: measure how many no-op tasks a worker runs per second, with and without a state.

First a queue is filled, then a worker is started, and the bodies note the time. The rate is
measured from the first body (after some that warm up) to the last. It contains everything that a
worker does for a message between two bodies: fetching, decoding, tracing, acknowledging, and the
work of the variant.

Not measured: sending (in which celery-singleton and celery-once do most of their work), starting
the worker, and conflicts: each body runs, or is counted as skipped. This is the worst case: a body
that does work makes all variants more alike. The singletons of the stateful variants have run
often, so that their histories are full.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from functools import partial

from rich.console import Console
from rich.table import Table

from . import by_hand
from .drain import Drain, Pool, Variant, drain
from .measure import Samples, relate, take_turns
from .servers import Servers

POOLS = (Pool("solo", 1), Pool("prefork", 2))
#: Enough messages to fill the history of each slot.
FIRST_COUNT = 64 * 20
BASE = "plain Celery task"
TARGETS = {
    ("solo", "this package, PostgreSQL"): ">= 0.50",
    ("prefork", "this package, PostgreSQL"): ">= 0.75",
    ("solo", "this package, SQLite"): ">= 0.80",
    ("solo", "this package, no state, Redis"): ">= 0.75",
}


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print one table for each pool."""
    variants = _variants(servers)
    for pool in POOLS:
        with console.status(f"worker: {pool}"):
            samples, skipped = _measure(servers, pool, variants, quick)
        console.print(_table(pool, samples, skipped))


def _variants(servers: Servers) -> dict[str, Variant]:
    postgres, own_file, other_file = servers.postgres, servers.sqlite("own"), servers.sqlite("hand")
    for url in (postgres, other_file):
        by_hand.prepare(url)
    return {
        BASE: Variant("plain", postgres),
        "celery-singleton (no state)": Variant("with_celery_singleton", postgres),
        "celery-once (no state)": Variant("with_celery_once", postgres),
        "lock and table by hand, PostgreSQL": Variant("with_lock_and_table", postgres),
        "lock and table by hand, SQLite": Variant("with_lock_and_table", other_file),
        "two bare statements, two scripts": Variant("with_bare_statements", postgres),
        "this package, PostgreSQL": Variant("stateful", postgres),
        "this package, SQLite": Variant("stateful", own_file),
        "this package, no state, Redis": Variant("stateless", postgres, leases=True),
    }


def _measure(
    servers: Servers, pool: Pool, variants: dict[str, Variant], quick: bool
) -> tuple[Samples, dict[str, int]]:
    """Return the rates of each variant, and how many bodies were skipped in all."""
    seconds, turns = (1.0, 3) if quick else (2.5, 7)
    skipped: dict[str, int] = defaultdict(int)

    def measure(name: str, count: int) -> float:
        result: Drain = drain(servers, variants[name], pool, count)
        skipped[name] += result.skipped
        return result.rate

    # The first drain is not counted. It shows how many messages a variant needs.
    first = {name: measure(name, FIRST_COUNT) for name in variants}
    cases = {
        name: partial(measure, name, max(int(rate * seconds), 300)) for name, rate in first.items()
    }
    return take_turns(cases, turns), skipped


def _table(pool: Pool, samples: Samples, skipped: dict[str, int]) -> Table:
    table = Table(title=f"worker: tasks per second, {pool}", title_justify="left")
    table.add_column("variant")
    for heading in ("tasks/s", "ratio to plain (least-most)", "target", "skipped bodies"):
        table.add_column(heading, justify="right")
    for name, rates in samples.items():
        table.add_row(
            name,
            f"{statistics.median(rates):.0f}",
            str(relate(samples, name, BASE)),
            TARGETS.get((pool.name, name), ""),
            str(skipped[name]),
        )
    return table
