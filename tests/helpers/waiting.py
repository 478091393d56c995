"""Wait for conditions, never for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: The default time limit in seconds. It is long, because only a failing test reaches it.
DEADLINE = 30.0


def wait_until(condition: Callable[[], T], what: str, deadline: float = DEADLINE) -> T:
    """Wait until a condition is true; return its value.

    :param what: what is waited for, in the words of the error.
    :param deadline: after how many seconds to raise an ``AssertionError``.
    """
    end = time.monotonic() + deadline
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline:g} s: {what}")
        time.sleep(0.02)
