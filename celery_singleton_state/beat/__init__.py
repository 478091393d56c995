"""Schedulers for Celery beat of which any number can run: one leads and sends, the others stand by.

Run ``celery beat -S singleton``, or combine :class:`LeaderMixin` with another scheduler class.
"""

from .entry import SingletonEntry
from .mixin import LeaderMixin
from .scheduler import SingletonScheduler

__all__ = ["LeaderMixin", "SingletonEntry", "SingletonScheduler"]
