"""Owners of leases, for tests of which events an owner is notified of."""

from __future__ import annotations

from collections.abc import Callable


class RecordingOwner:
    """An owner of a lease that calls the given functions when something happens to the lease.

    :param lost: called with the reason when the lease is lost; by default nothing is called.
    :param asked: called with the requester when a handoff is requested; by default nothing is
        called.
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
