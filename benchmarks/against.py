"""``--against CHECKOUT``: compare this package's speed with that of another checkout's package.

The two packages take turns. Each runs in processes of its own, with databases of its own. The
benchmark measures the rates of no-op tasks in a worker, as ``worker`` does, and direct calls of a
task, as ``statements`` does. Both packages run the tasks of this checkout's benchmarks, so these
tasks use only public names. For example::

    git worktree add --detach ../before <commit>
    python -m benchmarks --against ../before worker statements
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psycopg
from rich.console import Console
from rich.table import Table

import celery_singleton_state

from .drain import ROOT, Pool, Variant, drain
from .measure import Samples, relate, take_turns
from .servers import Servers
from .worker import FIRST_COUNT

PACKAGE = celery_singleton_state.__name__
POOLS = (Pool("solo", 1), Pool("prefork", 2))
Comparison = Callable[[Servers, Path, bool, Console], None]

OWN, OTHER = "this package", "the other"
VARIANTS: dict[str, Callable[[Servers, str], Variant]] = {
    "PostgreSQL": lambda servers, _: Variant("stateful", servers.postgres),
    "SQLite": lambda servers, name: Variant("stateful", servers.sqlite(name)),
    "no state, Redis": lambda servers, _: Variant("stateless", servers.postgres, leases=True),
}


@dataclass(frozen=True)
class Side:
    """One of the two packages, and the databases that it uses alone."""

    servers: Servers
    variant: Variant

    def rate(self, pool: Pool, count: int) -> float:
        """Return how many tasks a worker runs in a second."""
        return drain(self.servers, self.variant, pool, count).rate

    @contextlib.contextmanager
    def caller(self) -> Iterator[Callable[[], float]]:
        """Yield a function that measures direct calls in another process, which ends with the
        block.
        """
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.against_calls", self.variant.task],
            cwd=self.variant.root,
            env=self.variant.environment(self.servers),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            # At the end of the block ``Popen`` closes the process's input, which ends the process.
            yield partial(_ask, process)


def worker(servers: Servers, checkout: Path, quick: bool, console: Console) -> None:
    """Print one table for each pool: tasks per second."""
    seconds, turns = (1.0, 3) if quick else (1.5, 9)
    for pool in POOLS:
        table = _table(f"worker, {pool}: tasks per second", turns)
        for name, sides in _sides(servers, checkout).items():
            with console.status(f"against: {pool}, {name}"):
                # The first drain is not counted. It shows how many messages are needed.
                first = min(side.rate(pool, FIRST_COUNT) for side in sides.values())
                count = max(int(first * seconds), 300)
                cases = {name: partial(side.rate, pool, count) for name, side in sides.items()}
                samples = take_turns(cases, turns)
            _add(table, name, samples)
        console.print(table)


def calls(servers: Servers, checkout: Path, quick: bool, console: Console) -> None:
    """Print one table: microseconds of a direct call."""
    turns = 20 if quick else 100
    table = _table("statements, a task's direct call: us", turns)
    for name, sides in _sides(servers, checkout).items():
        with console.status(f"against: calls, {name}"), contextlib.ExitStack() as stack:
            cases = {name: stack.enter_context(side.caller()) for name, side in sides.items()}
            samples = take_turns(cases, turns)
        _add(table, name, {side: [each * 1e6 for each in samples[side]] for side in samples})
    console.print(table)


PARTS: dict[str, Comparison] = {"worker": worker, "statements": calls}


def _sides(servers: Servers, checkout: Path) -> dict[str, dict[str, Side]]:
    """Return both packages for each kind of store."""
    own = replace(servers, postgres=_database(servers, "own"))
    other = replace(
        servers,
        postgres=_database(servers, "other"),
        broker=servers.broker.removesuffix("/0") + "/1",
    )
    root = _with_package_of(servers, checkout)
    return {
        name: {
            OWN: Side(own, variant(own, "own")),
            OTHER: Side(other, replace(variant(other, "other"), root=root)),
        }
        for name, variant in VARIANTS.items()
    }


def _database(servers: Servers, name: str) -> str:
    """Make a new database, because the two packages' tables may differ; return its URL."""
    with psycopg.connect(servers.postgres, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}"')
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{servers.postgres.rpartition('/')[0]}/{name}"


def _with_package_of(servers: Servers, checkout: Path) -> Path:
    """Make and return a folder that has these benchmarks and a checkout's package."""
    if not (package := checkout.resolve() / PACKAGE).is_dir():
        raise SystemExit(f"{checkout} has no {PACKAGE}")
    folder = servers.scratch / "against"
    if not folder.exists():
        folder.mkdir()
        (folder / PACKAGE).symlink_to(package)
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    return folder


def _ask(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _table(title: str, turns: int) -> Table:
    table = Table(title=f"{title} (quartiles of {turns} turns)", title_justify="left")
    table.add_column("store")
    for heading in (OWN, OTHER, "ratio"):
        table.add_column(heading, justify="right")
    return table


def _add(table: Table, name: str, samples: Samples) -> None:
    medians = (f"{statistics.median(samples[side]):.0f}" for side in (OWN, OTHER))
    table.add_row(name, *medians, relate(samples, OWN, OTHER).with_quartiles)
