"""Entries that could not be sent, for a reason other than their broker and their own message.

Tools that trace what a project does wrap methods of Celery's, and what they raise must neither end
a beat nor lose a tick.
"""

from __future__ import annotations

import traceback

from celery_singleton_state.compat import LAZY_ARGUMENTS
from celery_singleton_state.lease.lease import clock
from celery_singleton_state.message.resend import UNSENDABLE

#: Seconds before the second try; doubled for each further one.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
#: Stands for all entries of a scheduler.
ALL = None


class Postponed:
    """When entries are tried again, by their names."""

    def __init__(self) -> None:
        self._tries: dict[str | None, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._tries)

    def add(self, name: str | None) -> float:
        """An entry was not sent; returns the seconds until it is tried again."""
        _, pause = self._tries.get(name, (0.0, FIRST_PAUSE / 2))
        pause = min(2 * pause, LONGEST_PAUSE)
        self._tries[name] = clock() + pause, pause
        return pause

    def remove(self, name: str | None) -> None:
        """An entry was sent."""
        self._tries.pop(name, None)

    def wait(self, name: str | None) -> float:
        """Seconds until an entry may be tried again; 0 if it may be now."""
        until, _ = self._tries.get(name, (0.0, 0.0))
        return max(0.0, until - clock()) if until else 0.0


def is_its_own(error: Exception) -> bool:
    """Whether an error is of an entry's own message, so that another try would not help."""
    if isinstance(error, UNSENDABLE):
        return True
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code in LAZY_ARGUMENTS for frame, _ in frames)
