"""Owners of leases, for tests of what tells them."""

from __future__ import annotations

from collections.abc import Callable


class Told:
    """Told what becomes of a lease.

    :param lost: called with why it is lost.
    :param asked: called with whoever asks for it.
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
