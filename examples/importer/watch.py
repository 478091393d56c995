"""Reads the importer's database from outside, in plain SQL."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

#: The table of imported lines. It has no unique constraint, because a constraint would hide that a
#: line was imported twice.
CREATE_TABLE = """
CREATE TABLE order_lines (
    order_id TEXT, line_no INTEGER, customer TEXT, sku TEXT,
    quantity INTEGER, unit_price_cents INTEGER, ordered_at TEXT
)
"""
SELECT_ROW = """
SELECT fence, holder, (julianday(expires_at) - julianday('now')) * 86400,
    coalesce(json_extract(value, '$.file'), ''), coalesce(json_extract(value, '$.line'), 0),
    coalesce(json_extract(value, '$.imported'), 0), coalesce(run_count, 0)
FROM kv_store WHERE key = 'singleton-state:tasks.import_orders'
"""


class Row(NamedTuple):
    """The importer's row in the store: its lease and its state."""

    fence: int = 0
    holder: str | None = None
    expires_in: float | None = None
    file: str = ""
    line: int = 0
    imported: int = 0
    runs: int = 0

    @property
    def lease(self) -> str:
        """A text about the lease: its holder, the seconds until it expires, and its fence."""
        if not self.fence:
            return "no run yet"
        if self.holder is None or self.expires_in is None:
            return f"no run holds the lease, last fence {self.fence}"
        if self.expires_in <= 0:
            return f"the lease of {self.holder} has expired, fence {self.fence}"
        return f"{self.holder} holds the lease for {self.expires_in:.1f} s, fence {self.fence}"


def make_table(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(CREATE_TABLE)


class Watch:
    """Reads the importer's database while the importer uses it."""

    def __init__(self, database: Path) -> None:
        self._reader = sqlite3.connect(database)
        self._prober = sqlite3.connect(database, timeout=0, isolation_level=None)

    def close(self) -> None:
        self._reader.close()
        self._prober.close()

    def row(self) -> Row:
        found = self._reader.execute(SELECT_ROW).fetchone()
        return Row(*found) if found else Row()

    def sees_open_transaction(self) -> bool:
        """Return whether another connection holds the database's only write lock."""
        try:
            self._prober.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                return True
            raise
        self._prober.execute("ROLLBACK")
        return False
