"""The plan of a storm: which faults happen to a fleet, and when. All follows from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

#: The kinds of faults that happen to one worker, and the kinds that happen to a server of all
#: workers.
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
class Fault:
    """One fault.

    :param at: seconds from the start of the storm.
    :param target: the number of the worker that has the fault; ignored if a server has it.
    :param lasts: seconds until the fault ends; ignored if it ends at once.
    """

    at: float
    kind: str
    target: int
    lasts: float


def plan(
    seed: int,
    seconds: float,
    workers: int,
    lease_ttl: float,
    kinds: Sequence[str] = (*TO_A_WORKER, *TO_A_SERVER),
) -> list[Fault]:
    """Return the faults of a storm, in order: about one a second, all kinds equally often.

    A fault lasts from a fraction of a lease's life to more than two lives, so that faults overlap.
    """
    chance = random.Random(seed)
    faults: list[Fault] = []
    at = 1.0
    while kinds and at < seconds:
        if len(faults) % len(kinds) == 0:
            order = chance.sample(list(kinds), len(kinds))
        kind = order[len(faults) % len(kinds)]
        lasts = lease_ttl * chance.choice((0.2, 0.6, 1.0, 1.5, 2.5))
        faults.append(Fault(at, kind, chance.randrange(workers), lasts))
        at += chance.uniform(0.4, 1.6)
    return faults
