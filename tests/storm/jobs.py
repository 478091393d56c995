"""What a job does, whoever runs it: one event copied, one line in the state."""

from __future__ import annotations

from dataclasses import dataclass, field

import sqlalchemy as sa

#: Seconds between two notes of a run that still trusts its lease.
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
