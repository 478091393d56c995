"""Send events as the Celery signals of :mod:`celery_singleton_state.signals`."""

from __future__ import annotations

from collections.abc import Mapping

from celery.utils.dispatch import Signal

from celery_singleton_state import signals

from .details import Acquired, Details, Lost, Released, Skipped, StateLoaded, StateSaved, TookOver

#: Maps each kind of event to its Celery signal. Kinds that are not listed have no signal.
SIGNALS: Mapping[type[Details], Signal] = {
    Acquired: signals.acquired,
    Released: signals.released,
    Lost: signals.lost,
    Skipped: signals.skipped,
    TookOver: signals.took_over,
    StateLoaded: signals.state_loaded,
    StateSaved: signals.state_saved,
}


class SignalsHook:
    """A hook that sends the Celery signal of an event, if its kind has one.

    Celery logs an error that a receiver of the signal raises.
    """

    def __call__(self, details: Details) -> None:
        signal = SIGNALS.get(type(details))
        if signal is not None:
            signal.send(sender=details.singleton, details=details)
