"""Signals about singletons; receivers connect to them as to Celery's own signals.

::

    from celery_singleton_state import signals

    @signals.lost.connect
    def page_the_operator(sender, details, **_):
        ...

A receiver gets the task's name as ``sender`` and a frozen object of
:mod:`celery_singleton_state.hooks` as ``details``. Signals are sent in the process of the run,
shortly after the event, and in a separate thread.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal


def _signal(name: str) -> Signal:
    return Signal(name=f"singleton_{name}", providing_args=["details"])


#: A run has acquired the lease and begins. Details: ``Acquired``.
acquired = _signal("acquired")
#: A run has ended without losing its lease. Details: ``Released``.
released = _signal("released")
#: A run has lost its lease. Details: ``Lost``.
lost = _signal("lost")
#: A delivery has ended without a run. Details: ``Skipped``.
skipped = _signal("skipped")
#: A run begins, and the previous run did not release the lease itself: its process died, its lease
#: expired, or the lease was taken from it. Details: ``TookOver``.
took_over = _signal("took_over")
#: A run has loaded its state. Details: ``StateLoaded``.
state_loaded = _signal("state_loaded")
#: A run has written its state. Details: ``StateSaved``.
state_saved = _signal("state_saved")
