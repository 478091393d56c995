"""Beats: any number of them may run, one leads and sends.

``celery beat -S singleton``, or ``LeaderMixin`` over another scheduler class.
"""

from .entry import SingletonEntry
from .mixin import LeaderMixin
from .scheduler import SingletonScheduler

__all__ = ["LeaderMixin", "SingletonEntry", "SingletonScheduler"]
