"""The proof that the database has every line of the data set exactly once."""

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
    """The comparison of the table with the data set.

    :param lines: how many lines the data set has.
    :param rows: how many rows the table has.
    :param distinct: how many different pairs of order and line number the table has.
    :param digests: the checksums of the data set and of the table.
    :param missing: lines of the data set that the table lacks.
    :param surplus: rows of the table that the data set lacks, such as a second copy of a line.
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
        """Yield lines of text that say what was compared and what was found."""
        yield f"data set   {self.lines:,} lines, sha256 {self.digests[0]:.16}…"
        yield f"database   {self.rows:,} rows, {self.distinct:,} distinct, " + (
            f"sha256 {self.digests[1]:.16}…"
        )
        yield from self.differences[:SHOWN]
        if len(self.differences) > SHOWN:
            yield f"… and {len(self.differences) - SHOWN:,} more"


def prove(database: Path, expected: Iterable[OrderLine]) -> Proof:
    """Compare the table ``order_lines`` of a database with the expected lines."""
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
    """Return a checksum of all lines that does not depend on their order."""
    return hashlib.sha256(repr(sorted(lines.elements())).encode()).hexdigest()
