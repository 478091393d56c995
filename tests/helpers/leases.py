"""A store that answers renewals as the test wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from celery_singleton_state.store.base import Lease


class Answers:
    """A store that can only renew leases. It records the keys that it was asked to renew."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.answer: Callable[[Sequence[Lease]], set[str]] = lambda leases: {
            lease.key for lease in leases
        }
        #: Maps a lease's key to the message that requests a handoff.
        self.handoffs: dict[str, str] = {}

    def renew(self, leases: Sequence[Lease]) -> dict[str, str | None]:
        self.asked.append(sorted(lease.key for lease in leases))
        return {key: self.handoffs.get(key) for key in self.answer(leases)}
