"""What is done to a fleet, and when: all of it follows from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

#: What is done to one worker, and what to a server that all of them use.
TO_A_WORKER = (
    "kill child",
    "kill worker",
    "stop worker",
    "stop worker",
    "warm shutdown",
    "cold shutdown",
    "store mute",
    "store cut",
    "store answers lost",
    "broker cut",
)
TO_A_SERVER = ("restart store", "restart broker", "stop backends", "read-only store")


@dataclass(frozen=True, slots=True)
class Blow:
    """One thing that goes wrong.

    :param at: seconds from the start of the storm.
    :param target: the number of a worker; ignored where a server is meant.
    :param lasts: seconds until it is made good again, where that is not at once.
    """

    at: float
    kind: str
    target: int
    lasts: float


def forecast(
    seed: int,
    seconds: float,
    workers: int,
    lease_ttl: float,
    kinds: Sequence[str] = (*TO_A_WORKER, *TO_A_SERVER),
) -> list[Blow]:
    """The blows of a storm, in order: about one a second, each kind as often as the others.

    They last from a part of a lease's life to more than two of them, and so overlap.
    """
    chance = random.Random(seed)
    blows: list[Blow] = []
    at = 1.0
    while kinds and at < seconds:
        if len(blows) % len(kinds) == 0:
            order = chance.sample(list(kinds), len(kinds))
        kind = order[len(blows) % len(kinds)]
        lasts = lease_ttl * chance.choice((0.2, 0.6, 1.0, 1.5, 2.5))
        blows.append(Blow(at, kind, chance.randrange(workers), lasts))
        at += chance.uniform(0.4, 1.6)
    return blows
