"""Taking turns, and what is concluded from it.

On a machine that does other things as well, two figures can be compared only when they were
taken close to each other. So the cases take turns (A B C A B C ...), each is related to the
base case of its own turn, and the median of these ratios is what counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

#: The figures of each case, one a turn.
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """A case against the base case of the same turn, over all turns."""

    median: float
    least: float
    most: float
    quartiles: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"

    @property
    def with_quartiles(self) -> str:
        """For many turns, of which the machine spoils some."""
        first, third = self.quartiles
        return f"{self.median:.2f} ({first:.2f}-{third:.2f})"


def take_turns(cases: Mapping[str, Callable[[], float]], turns: int) -> Samples:
    """Measure each case once a turn."""
    samples: Samples = {name: [] for name in cases}
    for _ in range(turns):
        for name, measure in cases.items():
            samples[name].append(measure())
    return samples


def relate(samples: Samples, name: str, base: str) -> Ratio:
    """One case against another, turn by turn."""
    ratios = [own / other for own, other in zip(samples[name], samples[base], strict=True)]
    first, _, third = statistics.quantiles(ratios) if len(ratios) > 1 else ratios * 3
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), (first, third))


def median_time(call: Callable[[], object], times: int) -> float:
    """The median of the seconds that a call takes."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def microseconds(samples: list[float]) -> str:
    """The median of some seconds, for a table."""
    return f"{statistics.median(samples) * 1e6:.0f}"
