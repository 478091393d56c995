"""The data set: order lines in files that arrive one by one. The data are the same in each demo."""

import csv
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

#: How many lines each file has. Importing a large file takes longer than the time between ticks.
FILE_SIZES = (800, 800, 4800, 800, 800) * 3
SECONDS_BETWEEN_FILES = 1.0


class OrderLine(NamedTuple):
    """One line of an order. Its fields are the columns of the files and of the table."""

    order_id: str
    line_no: int
    customer: str
    sku: str
    quantity: int
    unit_price_cents: int
    ordered_at: str


def data_set() -> dict[str, list[OrderLine]]:
    """Return a dict from file names to the files' lines, in the order in which the files arrive."""
    lines = _lines(random.Random(2024))
    return {
        f"orders-{number:03}.csv": list(islice(lines, size))
        for number, size in enumerate(FILE_SIZES, start=1)
    }


def _lines(dice: random.Random) -> Iterator[OrderLine]:
    number, ordered_at = 100_000, datetime(2024, 3, 1, 8)
    while True:
        number += 1
        ordered_at += timedelta(seconds=dice.randint(1, 90))
        customer = f"C-{dice.randint(1, 3000):05}"
        for line_no in range(1, dice.randint(1, 6) + 1):
            yield OrderLine(
                order_id=f"O-{number}",
                line_no=line_no,
                customer=customer,
                sku=f"SKU-{dice.randint(1, 500):04}",
                quantity=dice.randint(1, 12),
                unit_price_cents=dice.randint(99, 49_999),
                ordered_at=ordered_at.isoformat(),
            )


class Arrivals(Thread):
    """A thread that puts one file after the other into a folder while the importer runs."""

    def __init__(self, inbox: Path, say: Callable[[str], None]) -> None:
        super().__init__(name="arrivals")
        self._inbox = inbox
        self._say = say
        self._over = Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        for name, lines in data_set().items():
            write_file(self._inbox / name, lines)
            self._say(f"{name} has arrived, {len(lines):,} lines")
            if self._over.wait(SECONDS_BETWEEN_FILES):
                return


def write_file(path: Path, lines: Sequence[OrderLine]) -> None:
    """Write a file under another name and then rename it, so that no reader sees half a file."""
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(OrderLine._fields)
        writer.writerows(lines)
    unfinished.rename(path)
