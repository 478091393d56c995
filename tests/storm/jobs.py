"""The data of a storm's jobs: each job copies one event and adds one line to a state."""

from __future__ import annotations

from dataclasses import dataclass, field

import sqlalchemy as sa

#: Seconds between two notes in which a run says that it trusts its lease.
TICK = 0.01

effects = sa.Table(
    "effects",
    sa.MetaData(),
    sa.Column("singleton", sa.Text),
    sa.Column("event", sa.Integer),
    sa.Column("job", sa.Text),
    sa.Column("fence", sa.BigInteger),
)


@dataclass
class Line:
    job: str
    fence: int
    position: int


@dataclass
class Trail:
    name: str = ""
    position: int = 0
    lines: list[Line] = field(default_factory=list)
