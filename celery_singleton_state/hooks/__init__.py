"""Observe singletons: hooks, Celery signals, Celery events and log lines.

Whatever happens to a singleton is one frozen :class:`Details` object, and one :class:`Dispatcher`
of each app delivers it. The dispatcher writes log lines at once. It calls the hooks of
``app.conf.singleton_hooks``, sends Celery's signals and sends Celery's events in a thread of its
own. So a slow or failing hook neither delays nor fails a run.
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
