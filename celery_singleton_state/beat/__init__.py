"""Schedulers for any number of Celery beats: one beat leads and sends, the others stand by.

Run ``celery beat -S singleton``, or combine :class:`LeaderMixin` with another scheduler class.
"""

from .entry import SingletonEntry
from .mixin import LeaderMixin
from .scheduler import SingletonScheduler

__all__ = ["LeaderMixin", "SingletonEntry", "SingletonScheduler"]
