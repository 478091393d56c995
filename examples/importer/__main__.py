"""An importer is killed in the middle of its work, and no order line is lost or doubled."""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from drama import DemoFailed, Drama, Ending
from rich.console import Console
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python examples/importer", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep files, database and logs")
    keep = parser.parse_args().keep
    folder = Path(tempfile.mkdtemp(prefix="importer-"))
    try:
        return perform(Drama(folder, narrator()))
    finally:
        if keep:
            console.print(f"kept: {folder}", markup=False)
        else:
            shutil.rmtree(folder)


def narrator() -> Callable[[str], None]:
    """Return a function that prints a line, preceded by the seconds since the demo's start."""
    began = time.monotonic()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - began:5.1f} s  {line}", markup=False)

    return say


def perform(drama: Drama) -> int:
    """Play the demo, print the report, and return the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, drama.interrupt)
    try:
        ending = drama.play()
    except DemoFailed as error:
        console.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    report(ending)
    return 0 if ending.proof.holds else 1


def report(ending: Ending) -> None:
    table = Table("", "", show_header=False)
    for title, value in (
        ("runs", f"{ending.runs}"),
        ("skipped deliveries", f"{ending.skipped}"),
        ("killed", f"1, with fence {ending.killed_fence}"),
        ("resumed at", f"{ending.resumed_at}, with fence {ending.resumed_fence}"),
        ("lines", f"{ending.proof.rows:,}"),
        ("seconds", f"{ending.seconds:.1f}"),
    ):
        table.add_row(title, value)
    console.print(table)
    console.print("\n".join(ending.proof.report()), markup=False)
    if ending.proof.holds:
        console.print("every line is there exactly once", style="bold green")
    else:
        console.print("the proof fails", style="bold red")


if __name__ == "__main__":
    sys.exit(main())
