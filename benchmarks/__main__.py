"""``python -m benchmarks [--quick] [--against CHECKOUT] [PART ...]``: run the benchmarks."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import celery
import psycopg
import redis
from rich.console import Console

from . import (
    against,
    beat,
    contention,
    events,
    handoff,
    heartbeat,
    layers,
    renewals,
    rows,
    scrape,
    statements,
    stores,
    takeover,
    upgrade,
    waiting,
    worker,
)
from .servers import Servers, started_servers

Part = Callable[[Servers, bool, Console], None]

PARTS: dict[str, Part] = {
    "worker": worker.run,
    "statements": statements.run,
    "rows": rows.run,
    "handoff": handoff.run,
    "heartbeat": heartbeat.run,
    "renewals": renewals.run,
    "stores": stores.run,
    "layers": layers.run,
    "contention": contention.run,
    "events": events.run,
    "scrape": scrape.run,
    "beat": beat.run,
    "takeover": takeover.run,
    "upgrade": upgrade.run,
    "waiting": waiting.run,
}


def main() -> int:
    """Run the parts that were asked for. The status is 0 even if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run the benchmarks of the package, and print their tables.",
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"one of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help=f"compare the package with another checkout's; parts: {', '.join(against.PARTS)}",
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller tables")
    arguments = parser.parse_args()
    checkout: Path | None = arguments.against
    parts = PARTS if checkout is None else _parts_against(checkout)
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(parts)}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)
    # If the output is not a terminal, a fixed width keeps the columns of wide tables.
    console = Console(width=None if sys.stdout.isatty() else 110)
    with started_servers() as servers:
        for name in arguments.parts or parts:
            parts[name](servers, arguments.quick, console)
        console.print(facts(servers), style="dim", highlight=False, soft_wrap=True)
    return 0


def _parts_against(checkout: Path) -> dict[str, Part]:
    def part(compare: against.Comparison) -> Part:
        return lambda servers, quick, console: compare(servers, checkout, quick, console)

    return {name: part(compare) for name, compare in against.PARTS.items()}


def facts(servers: Servers) -> str:
    """Return one line about the machine and the versions of the software that was measured."""
    with psycopg.connect(servers.postgres) as connection:
        postgres = connection.info.server_version // 10000
        commit = connection.execute("SHOW synchronous_commit").fetchone()
    with redis.Redis.from_url(servers.broker) as client:
        broker = client.info("server")
    kind = broker.get("server_name", "redis")
    version = broker.get(f"{kind}_version", broker["redis_version"])
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    return (
        f"{os.cpu_count()} cores (load {load}), {platform.system()}, "
        f"Python {platform.python_version()}, Celery {celery.__version__}, "
        f"PostgreSQL {postgres} (synchronous_commit {commit[0] if commit else '?'}), "
        f"SQLite {sqlite3.sqlite_version}, {kind} {version}"
    )


def _exit(number: int, _frame: FrameType | None) -> None:
    """Exit by an exception on a signal, so that the servers are stopped as on any other error."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
