"""What a run tells of itself, at the door where all look on."""

from __future__ import annotations

import threading

from celery_singleton_state.history import DIED, Entry, Outcome
from celery_singleton_state.hooks import (
    Acquired,
    Lost,
    Released,
    StateLoaded,
    StateSaved,
    TookOver,
    WriteRefused,
)
from celery_singleton_state.lease.lease import HeldLease, clock
from celery_singleton_state.message.delivery import Delivery
from celery_singleton_state.store.base import NewValue


class Report:
    """A run's own account: begun once, and ended once, as released or as lost.

    :param asked_at: :func:`~celery_singleton_state.lease.lease.clock` before the lease was asked
        for.
    """

    def __init__(self, delivery: Delivery, held: HeldLease, asked_at: float) -> None:
        self._tell = delivery.tell
        self._held = held
        self._asked_at = asked_at
        #: Taken by whoever tells the end.
        self._ending = threading.Lock()

    def begin(self, past: tuple[Entry, ...], took_over: bool) -> None:
        """The run begins, after those of its history.

        :param took_over: whether the lease of another holder had run out.
        """
        lease = self._held.lease
        how = "expired" if took_over else _ended_by_others(past)
        if how:
            self._tell(TookOver, holder=lease.holder, fence=lease.fence, how=how)
        self._tell(Acquired, holder=lease.holder, fence=lease.fence)

    def loaded(self, value: str, schema_version: int | None) -> None:
        """The state was loaded, from this JSON."""
        self._tell(StateLoaded, size=len(value), schema_version=schema_version)

    def saved(self, operation: str, new: NewValue | None) -> None:
        """The state was written, if it was."""
        if new is not None:
            self._tell(StateSaved, operation=operation, size=len(new.value))

    def refused(self, operation: str) -> None:
        """The store refused a write."""
        self._tell(WriteRefused, operation=operation)

    def lost(self) -> None:
        """The run has lost its lease."""
        lease, why = self._held.lease, self._held.lost or ""
        if self._ending.acquire(blocking=False):
            self._tell(
                Lost, holder=lease.holder, fence=lease.fence, why=why, seconds=self._seconds()
            )

    def ended(self, outcome: Outcome, error: str | None, given_back: bool) -> None:
        """The run is over, and was not lost before."""
        lease = self._held.lease
        if self._ending.acquire(blocking=False):
            self._tell(
                Released,
                holder=lease.holder,
                fence=lease.fence,
                outcome=outcome,
                seconds=self._seconds(),
                error=error,
                given_back=given_back,
            )

    def _seconds(self) -> float:
        return clock() - self._asked_at


def _ended_by_others(past: tuple[Entry, ...]) -> str | None:
    """How the last run lost its lease; ``None`` if it gave the lease back by itself."""
    last = past[-1] if past else None
    if last is None or last.outcome != Outcome.LOST:
        return None
    return "died" if last.error == DIED else "handed over"
