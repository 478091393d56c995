"""Postpone entries that could not be sent although their broker and their message are in order.

For example, a tracing tool that wraps Celery's methods can raise an error. Such an error must
neither end the beat nor lose a tick. So the entry is tried again after a pause.
"""

from __future__ import annotations

import traceback

from celery_singleton_state.compat import LAZY_ARGUMENTS
from celery_singleton_state.lease.lease import clock
from celery_singleton_state.message.resend import UNSENDABLE

#: The pause, in seconds, before a postponed entry is tried for the second time. Each further pause
#: is twice the one before.
FIRST_PAUSE = 1.0
#: The longest pause, in seconds, before a postponed entry is tried again.
LONGEST_PAUSE = 30.0
#: The name under which the scheduler as a whole is postponed, instead of one entry.
ALL = None


class Postponed:
    """The entries that could not be sent, with the times at which they are tried again."""

    def __init__(self) -> None:
        self._tries: dict[str | None, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._tries)

    def add(self, name: str | None) -> float:
        """Postpone an entry that was not sent; return the seconds until it is tried again."""
        _, pause = self._tries.get(name, (0.0, FIRST_PAUSE / 2))
        pause = min(2 * pause, LONGEST_PAUSE)
        self._tries[name] = clock() + pause, pause
        return pause

    def remove(self, name: str | None) -> None:
        """Remove an entry that was sent, so that its next pause is the shortest one again."""
        self._tries.pop(name, None)

    def wait(self, name: str | None) -> float:
        """Return the seconds until an entry may be tried again; 0 if it may be tried now."""
        until, _ = self._tries.get(name, (0.0, 0.0))
        return max(0.0, until - clock()) if until else 0.0


def is_its_own(error: Exception) -> bool:
    """Whether an error comes from the entry's own message, so that another try would not help."""
    if isinstance(error, UNSENDABLE):
        return True
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code in LAZY_ARGUMENTS for frame, _ in frames)
