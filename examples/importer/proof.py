"""The proof, from the database alone: every line of the data set, exactly once."""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from orders import OrderLine

SHOWN = 5


@dataclass(frozen=True)
class Proof:
    """What is in the table against what should be there.

    :param missing: lines of the data set that the table has not, or not often enough.
    :param surplus: rows of the table that the data set has not, or not so often.
    """

    lines: int
    rows: int
    distinct: int
    digests: tuple[str, str]
    missing: list[OrderLine]
    surplus: list[OrderLine]

    @property
    def holds(self) -> bool:
        counts_agree = self.lines == self.rows == self.distinct
        return counts_agree and self.digests[0] == self.digests[1] and not self.differences

    @property
    def differences(self) -> list[str]:
        return [f"missing: {line}" for line in self.missing] + [
            f"too many: {line}" for line in self.surplus
        ]

    def report(self) -> Iterator[str]:
        """What was compared and found, for people."""
        yield f"data set   {self.lines:,} lines, sha256 {self.digests[0]:.16}…"
        yield f"database   {self.rows:,} rows, {self.distinct:,} distinct, " + (
            f"sha256 {self.digests[1]:.16}…"
        )
        yield from self.differences[:SHOWN]
        if len(self.differences) > SHOWN:
            yield f"… and {len(self.differences) - SHOWN:,} more"


def prove(database: Path, expected: Iterable[OrderLine]) -> Proof:
    """Compare the table ``order_lines`` with the data set, line by line."""
    with closing(sqlite3.connect(database)) as connection:
        rows = [OrderLine(*row) for row in connection.execute("SELECT * FROM order_lines")]
        (distinct,) = connection.execute(
            "SELECT count(*) FROM (SELECT DISTINCT order_id, line_no FROM order_lines)"
        ).fetchone()
    wanted, found = Counter(expected), Counter(rows)
    return Proof(
        lines=wanted.total(),
        rows=len(rows),
        distinct=distinct,
        digests=(digest(wanted), digest(found)),
        missing=sorted((wanted - found).elements()),
        surplus=sorted((found - wanted).elements()),
    )


def digest(lines: Counter[OrderLine]) -> str:
    """A checksum over all lines, whatever their order."""
    return hashlib.sha256(repr(sorted(lines.elements())).encode()).hexdigest()
