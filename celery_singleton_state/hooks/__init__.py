"""Looking on: everything that can be observed passes one door, as a frozen details object.

Log lines are written in place. Celery's signals, Celery's events and the hooks of
``app.conf.singleton_hooks`` are handed it in a thread of their own, so that a slow or failing one
neither stalls nor fails a run.
"""

from .details import (
    Acquired,
    Changed,
    Conflicted,
    Details,
    Failed,
    Lost,
    Released,
    Skipped,
    StateLoaded,
    StateSaved,
    TookOver,
    WriteRefused,
)
from .dispatcher import Dispatcher, Hook

__all__ = [
    "Acquired",
    "Changed",
    "Conflicted",
    "Details",
    "Dispatcher",
    "Failed",
    "Hook",
    "Lost",
    "Released",
    "Skipped",
    "StateLoaded",
    "StateSaved",
    "TookOver",
    "WriteRefused",
]
