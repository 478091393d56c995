"""The part of this demo to copy: an importer that goes on where it stopped, even if killed."""

import csv
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from celery import Celery
from celery.utils.log import get_task_logger
from sqlalchemy import text

from celery_singleton_state import SingletonTask, singleton_task

INBOX = Path(os.environ["IMPORTER_FOLDER"], "inbox")
BATCH = 200
#: Seconds that the importer sleeps before each batch, in place of a real importer's other work.
SECONDS_PER_BATCH = 0.08
INSERT = text("""
    INSERT INTO order_lines
    VALUES (:order_id, :line_no, :customer, :sku, :quantity, :unit_price_cents, :ordered_at)
""")

app = Celery("importer", config_source="celeryconfig")
logger = get_task_logger(__name__)


@dataclass
class Cursor:
    """The state of the importer: the last imported line, and how many lines are imported."""

    file: str = ""
    line: int = 0
    imported: int = 0

    def advance(self, file: str, lines: int) -> None:
        self.line = lines + (self.line if file == self.file else 0)
        self.file = file
        self.imported += lines


@singleton_task(app, state_schema=Cursor)
def import_orders(self: SingletonTask[Cursor]) -> None:
    """Import all lines that have arrived and are not imported yet."""
    logger.info("fence %d starts at %s:%d", self.fence, self.state.file, self.state.line)
    for file, batch in unread(self.state.file, self.state.line):
        time.sleep(SECONDS_PER_BATCH)
        with self.transaction() as connection:
            connection.execute(INSERT, batch)
            self.state.advance(file, len(batch))


def unread(first: str, line: int) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the lines that are not imported yet, in batches, each with the name of its file.

    :param first: the file of the last imported line.
    :param line: how many lines of that file are imported.
    """
    for path in sorted(path for path in INBOX.glob("*.csv") if path.name >= first):
        with path.open(newline="") as file:
            lines = islice(csv.DictReader(file), line if path.name == first else 0, None)
            while batch := list(islice(lines, BATCH)):
                yield path.name, batch
