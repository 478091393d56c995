"""Wait for conditions, and never for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: How long a test waits for a condition by default, in seconds. It is long, because only a failing
#: test waits so long.
DEADLINE = 30.0


def wait_until(condition: Callable[[], T], what: str, deadline: float = DEADLINE) -> T:
    """Wait until a condition is true; return its value.

    :param what: the condition in words, for the text of the error.
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
