"""Run the same storm for each contestant, which is this package, another one or none.

Call: ``python -m tests.storm [--seed N] [--seconds N] [contestant ...]``. The servers are Valkey
and PostgreSQL, because the other packages keep their locks in Redis.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.helpers.servers import Postgres, Valkey
from tests.storm.checker import Findings, check
from tests.storm.drill import Drill, Storm

OURS = "celery-singleton-state"
CONTESTANTS = (OURS, "celery-singleton", "celery-once", "by hand", "nothing")
COLUMNS = {
    "runs": "runs",
    "overlaps": "overlaps",
    "lost updates": "lost_updates",
    "doubled effects": "doubled_effects",
    "lost messages": "lost_messages",
    "jobs failed": "failures",
    "standing still": "standing_still",
    "lost by broker": "lost_by_broker",
}


def work_through(contestant: str, seed: int, seconds: float) -> Findings:
    """Run a storm for one contestant, on servers of its own; return what the checker found."""
    storm = Storm(seed, seconds)
    if contestant != OURS:
        peer = {"STORM_PEER": contestant}
        storm = Storm(seed, seconds, app="tests.storm.peers", environment=peer)
    store, broker = Postgres(), Valkey(durable=True)
    try:
        with tempfile.TemporaryDirectory(prefix="test-storm-") as directory:
            database = store.create_database("storm")
            return check(Drill(storm, Path(directory), store, database, broker, broker.url).run())
    finally:
        store.close()
        broker.close()


def _count(found: int | list[str]) -> str:
    return str(found if isinstance(found, int) else len(found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    parser.add_argument("contestants", nargs="*", metavar="contestant")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    console = Console(width=130)
    table = Table(title=f"storm {arguments.seed}, {arguments.seconds:g} s", title_justify="left")
    for heading in ("contestant", *COLUMNS):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    for contestant in arguments.contestants or CONTESTANTS:
        found = vars(work_through(contestant, arguments.seed, arguments.seconds))
        table.add_row(contestant, *(_count(found[name]) for name in COLUMNS.values()))
        console.print(contestant, found, style="dim", highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
