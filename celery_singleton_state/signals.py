"""Celery signals of the singletons: connect as to Celery's own.

::

    from celery_singleton_state import signals

    @signals.lost.connect
    def page_somebody(sender, details, **_):
        ...

Each is sent with the task's name as ``sender`` and a frozen details object of
:mod:`celery_singleton_state.hooks`, in the process of the run, soon after the fact and in a thread
of its own.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal


def _signal(name: str) -> Signal:
    return Signal(name=f"singleton_{name}", providing_args=["details"])


#: A run begins.
acquired = _signal("acquired")
#: A run is over.
released = _signal("released")
#: A run has lost its lease.
lost = _signal("lost")
#: A delivery ended without a run.
skipped = _signal("skipped")
#: A run begins after one that did not end by itself.
took_over = _signal("took_over")
#: A state was loaded.
state_loaded = _signal("state_loaded")
#: A state was written.
state_saved = _signal("state_saved")
