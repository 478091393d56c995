"""Owners of leases, for tests of which events an owner is notified of."""

from __future__ import annotations

from collections.abc import Callable


class Told:
    """An owner that passes on what happens to its lease.

    :param lost: called with the reason when the lease is lost.
    :param asked: called with the requester when a handoff is requested.
    """

    def __init__(
        self,
        lost: Callable[[str], object] = lambda why: None,
        asked: Callable[[str], object] = lambda who: None,
    ) -> None:
        self._lost = lost
        self._asked = asked

    def lost(self, why: str) -> None:
        self._lost(why)

    def handoff_requested(self, handoff_to: str) -> None:
        self._asked(handoff_to)
