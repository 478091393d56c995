"""Writing to the row in the name of a lease, and knowing whether it happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from . import history
from .errors import HeartbeatFailed, StatePersistFailed
from .in_place import in_place
from .lease import HeldLease
from .store.base import Store, StoreError, StoreUnavailable

TRIES = 3

T = TypeVar("T")


class FencedWriter:
    """Sends a run's writes, each with its fence and holder.

    :param name: the singleton's name, for its errors.
    :param on_refused: told the operation that the store refused.
    """

    def __init__(
        self, name: str, store: Store, held: HeldLease, on_refused: Callable[[str], None]
    ) -> None:
        self._name = name
        self._store = store
        self._held = held
        self._on_refused = on_refused

    def write(
        self,
        operation: str,
        request: Callable[[], T | None],
        recognised: Callable[[], bool] = lambda: False,
    ) -> T | None:
        """Send a write, with tries in place and never past the lease's life.

        :param operation: what it is, for those who look on.
        :param request: sends it; false when it was refused.
        :param recognised: asked when a repeated write is refused: whether that is because an
            earlier one, whose answer was lost, took effect.
        :returns: the store's answer; ``None`` where it was lost.
        :raises HeartbeatFailed: the lease was lost, before or by this refusal.
        :raises StatePersistFailed: the store is out of reach; whether an earlier try took
            effect is not known.
        """
        self.refuse_if_lost()
        uncertain = False

        def attempt() -> T | None:
            nonlocal uncertain
            try:
                answer = request()
                if not answer and not (uncertain and recognised()):
                    raise self.refused(operation)
                return answer
            except StoreUnavailable:
                uncertain = True
                raise

        try:
            return in_place(attempt, TRIES, self._held.trusted_until)
        except StoreError as error:
            raise StatePersistFailed(self._name, str(error)) from error

    def has_ended(self) -> bool:
        """Whether the row's history holds the end of this lease's run."""
        lease = self._held.lease
        row = self._store.peek(lease.key)
        entries = history.decode(row.history if row else None, self._name)
        return history.written_by(entries, lease.fence, lease.holder)

    def was_committed(self, saved_at: float) -> bool:
        """Whether the row is the one that a transaction saved at this moment of the store's."""
        lease = self._held.lease
        try:
            row = in_place(lambda: self._store.peek(lease.key), TRIES, self._held.trusted_until)
        except StoreError:
            return False
        return row is not None and row.fence == lease.fence and row.updated_at == saved_at

    def refuse_if_lost(self) -> None:
        """:raises HeartbeatFailed: the lease is known to be lost; the store is not asked."""
        if self._held.lost:
            raise self.failure()

    def refused(self, operation: str) -> HeartbeatFailed:
        """The error of a write that the store refused; the lease is lost from here on."""
        self._held.lost = self._held.lost or "the write was refused"
        self._on_refused(operation)
        return self.failure()

    def failure(self) -> HeartbeatFailed:
        """The error of a run whose lease is lost."""
        return HeartbeatFailed(
            self._name,
            f"the lease with fence {self._held.lease.fence} is lost: {self._held.lost}",
        )
