"""What a delivery does that finds the lease taken: one function for each policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .errors import LeaderHandoffFailed
from .store.base import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Conflict:
    """A delivery that found the lease of its singleton taken.

    :param row: the row as it was seen just after; it may have changed since.
    """

    singleton: str
    row: Row | None

    @property
    def holder(self) -> str:
        """Who holds the lease, for how long, for people."""
        if self.row is None or self.row.expires_in is None:
            return "held by another run until a moment ago"
        return (
            f"held by {self.row.holder} for task {self.row.task_id or '(called directly)'}, "
            f"lease runs out in {max(self.row.expires_in, 0):.1f} s unless renewed"
        )


def skip(conflict: Conflict) -> None:
    """The delivery succeeds with ``None``."""
    logger.info("singleton %s skipped: %s", conflict.singleton, conflict.holder)


def refuse(conflict: Conflict) -> None:
    """The delivery fails."""
    raise LeaderHandoffFailed(conflict.singleton, conflict.holder)


#: The policies that ``on_conflict`` names.
POLICIES: Mapping[str, Callable[[Conflict], None]] = {"skip": skip, "raise": refuse}
