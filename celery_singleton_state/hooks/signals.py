"""The hook that sends Celery's signals."""

from __future__ import annotations

from collections.abc import Mapping

from celery.utils.dispatch import Signal

from celery_singleton_state import signals

from .details import Acquired, Details, Lost, Released, Skipped, StateLoaded, StateSaved, TookOver

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
    """Sends the signal of each thing that has one. Celery logs what a receiver raises."""

    def __call__(self, details: Details) -> None:
        signal = SIGNALS.get(type(details))
        if signal is not None:
            signal.send(sender=details.singleton, details=details)
