"""``layers``: measure what the package's own connection layers save against the client libraries'.

A store reaches its server by a layer of the package: ``store/sql/connections.py`` instead of
SQLAlchemy's pool, ``store/redis/calls.py`` instead of redis-py's client. They are measured in a
real worker with one process that runs no-op singletons. The layers take turns within that process,
some runs each, and each layer is compared with the library's own layer in the same turn.

- a run: the time from one body to the next, with all that a worker does between them;
- the store: the time of a run's two calls to the server, network and server included;
- CPU: the processor time of the process, which does not depend on its server and other programs.

PostgreSQL is measured twice, once without waiting for the disk (``synchronous_commit = off``),
because the layers matter most if the server is quick.

The library's own layers are configured as a careful user would do it: autocommit, no ping, no
reset, prepared statements; for Redis scripts by their digest, the same timeouts, no retries.

Not measured: many threads that call at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from .drain import Pool, Variant, drained
from .measure import Samples, relate
from .servers import Servers

POOLS = (Pool("prefork", 1), Pool("solo", 1))
#: Maps each figure of a block to its heading in the table.
FIGURES = {"run": "run", "store": "store", "cpu": "CPU"}
#: Makes PostgreSQL answer before a commit is on the disk, because the disk's time varies most.
NO_WAIT = "?options=-csynchronous_commit%3Doff"


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print one table for each store and pool."""
    app = "layers_tasks"
    variants = {
        "PostgreSQL": Variant("stateful", servers.postgres, app=app),
        "PostgreSQL, no wait": Variant("stateful", servers.postgres + NO_WAIT, app=app),
        "SQLite": Variant("stateful", servers.sqlite("layers"), app=app),
        "Redis": Variant("stateless", servers.postgres, leases=True, app=app),
    }
    for name, variant in variants.items():
        for pool in POOLS:
            with console.status(f"layers: {name}, {pool}"):
                turns = list(_measure(servers, variant, pool, turns=10 if quick else 60))
            console.print(_table(f"layers: {name}, {pool}", turns))


def _measure(
    servers: Servers, variant: Variant, pool: Pool, turns: int
) -> Iterator[dict[str, dict[str, float]]]:
    """Yield for each turn a dict that maps layer and figure to the microseconds of a run."""
    # Import the app only now, so that importing this module needs no servers.
    from .layers_tasks import BLOCK, WARM_UP, WAYS, read_blocks

    count = WARM_UP + turns * WAYS * BLOCK + 1
    with drained(servers, variant, pool, count) as marks:
        blocks = list(read_blocks(marks))
    for first in range(0, turns * WAYS, WAYS):
        yield {
            block.way: {name: getattr(block, name) / BLOCK * 1e6 for name in FIGURES}
            for block in blocks[first : first + WAYS]
        }


def _table(title: str, turns: list[dict[str, dict[str, float]]]) -> Table:
    table = Table(
        title=f"{title} (ratio to the library's own layer; quartiles of {len(turns)} turns)",
        title_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    for heading in FIGURES.values():
        table.add_column(f"{heading} us", justify="right")
        table.add_column("ratio", justify="right", no_wrap=True)
    base = next(iter(turns[0]))
    for name in turns[0]:
        cells = []
        for figure in FIGURES:
            samples: Samples = {way: [turn[way][figure] for turn in turns] for way in turns[0]}
            ratio = relate(samples, name, base)
            cells += [f"{statistics.median(samples[name]):.0f}", ratio.with_quartiles]
        table.add_row(name, *cells)
    return table
