"""A store's leases that answer as a test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from celery_singleton_state.store.base import Lease


class Answers:
    """A store that only renews, and writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.answer: Callable[[Sequence[Lease]], set[str]] = lambda leases: {
            lease.key for lease in leases
        }
        #: Who asks the holders of which keys to hand over.
        self.handoffs: dict[str, str] = {}

    def renew(self, leases: Sequence[Lease]) -> dict[str, str | None]:
        self.asked.append(sorted(lease.key for lease in leases))
        return {key: self.handoffs.get(key) for key in self.answer(leases)}
