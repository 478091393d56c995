"""Waiting for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Generous, as it is only ever reached by a test that fails.
DEADLINE = 30.0


def wait_until(condition: Callable[[], T], what: str, deadline: float = DEADLINE) -> T:
    """The condition's first true answer."""
    end = time.monotonic() + deadline
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline:g} s: {what}")
        time.sleep(0.02)
