"""Check fences: how many there are, and that they grow."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise


def are_growing(fences: Iterable[int], count: int) -> bool:
    """Return whether there are exactly ``count`` fences, each larger than the previous one."""
    found = list(fences)
    return len(found) == count and all(before < after for before, after in pairwise(found))
