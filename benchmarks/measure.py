"""Let cases take turns, and compute ratios between them.

On a machine that does other work as well, two figures are comparable only if they were measured
close to each other. So the cases take turns (A B C A B C ...). Each figure is divided by the base
case's figure of the same turn, and the median of these ratios is the result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

#: Maps each case to its figures, one for each turn.
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """The ratios of a case to the base case of the same turn, over all turns."""

    median: float
    least: float
    most: float
    quartiles: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"

    @property
    def with_quartiles(self) -> str:
        """The median with the quartiles, which ignore the few of many turns that the machine
        disturbs.
        """
        first, third = self.quartiles
        return f"{self.median:.2f} ({first:.2f}-{third:.2f})"


def take_turns(cases: Mapping[str, Callable[[], float]], turns: int) -> Samples:
    """Measure each case once in each turn."""
    samples: Samples = {name: [] for name in cases}
    for _ in range(turns):
        for name, measure in cases.items():
            samples[name].append(measure())
    return samples


def relate(samples: Samples, name: str, base: str) -> Ratio:
    """Return the ratios of one case to another, turn by turn."""
    ratios = [own / other for own, other in zip(samples[name], samples[base], strict=True)]
    first, _, third = statistics.quantiles(ratios) if len(ratios) > 1 else ratios * 3
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), (first, third))


def median_time(call: Callable[[], object], times: int) -> float:
    """Call a function some times; return the median of the seconds that a call takes."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def microseconds(samples: list[float]) -> str:
    """Format the median of some seconds in microseconds, for a table."""
    return f"{statistics.median(samples) * 1e6:.0f}"
