"""Fences as tests see them: how many there are, and that they grow."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise


def are_growing(fences: Iterable[int], count: int) -> bool:
    """Whether there are so many fences, each larger than the one before."""
    found = list(fences)
    return len(found) == count and all(before < after for before, after in pairwise(found))
