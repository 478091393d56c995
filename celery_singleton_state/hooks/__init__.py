"""Observe singletons: hooks, Celery signals, Celery events and log lines.

Each event of a singleton is one frozen :class:`Details` object, which the app's
:class:`Dispatcher` delivers. The dispatcher writes log lines at once. In a thread of its own, it
calls the hooks of ``app.conf.singleton_hooks`` and sends Celery's signals and Celery's events. So a
slow or failing hook neither delays nor fails a run.
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
