"""A lease as its run holds it, and the clock by which it is counted."""

from __future__ import annotations

import time
from collections.abc import Callable

from celery_singleton_state.store.base import Lease

# CLOCK_MONOTONIC stands still while the machine is suspended, and the store's clock does not.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


#: The part of a lease's life for which its holder trusts it. The rest is for the body to end in.
TRUSTED_PART = 0.9


def clock() -> float:
    """Seconds on the clock that leases are trusted by; only differences mean anything."""
    return time.clock_gettime(CLOCK)


class HeldLease:
    """A lease as its holder sees it.

    :param asked_at: :func:`clock` just before the request that acquired it was sent.
    :param interval: seconds between renewals.
    """

    def __init__(self, lease: Lease, asked_at: float, interval: float) -> None:
        self.lease = lease
        self.renew_every = min(interval, TRUSTED_PART * lease.ttl / 2)
        #: Why it is lost, as a text for people; ``None`` while it is not.
        self.lost: str | None = None
        #: Who asked the holder to hand over, as far as it has heard.
        self.asked_by: str | None = None
        self.asked_at = asked_at
        self.forget()
        self.renewed(asked_at)

    def forget(self) -> None:
        """Call nobody any more: its run is over."""
        #: Called when the heartbeat finds it lost, in the heartbeat's thread.
        self.on_lost: Callable[[], None] = lambda: None
        #: Called there, too, with whoever asks the holder to hand over.
        self.on_handoff: Callable[[str], None] = lambda who: None
        #: Called before anybody reads how long it may be trusted.
        self.look: Callable[[], None] = lambda: None

    def renewed(self, asked_at: float) -> None:
        """Trust it anew, counted from before the request.

        The answer to an older request than the last answered one changes nothing.
        """
        if asked_at < self.asked_at:
            return
        self.asked_at = asked_at
        self.trusted_until = asked_at + TRUSTED_PART * self.lease.ttl
        self.renew_at = asked_at + self.renew_every

    def answered(self, asked_at: float, who: str | None) -> None:
        """Take the answer to a renewal.

        :param who: asks the holder to hand over, if anybody does.
        """
        self.renewed(asked_at)
        if who:
            self.asked_by = who
            self.on_handoff(who)

    def lose(self, why: str) -> None:
        """Trust it no longer, whoever else may hold it or not."""
        self.lost = why
        self.on_lost()

    @property
    def remaining(self) -> float:
        """Seconds that it may still be trusted; 0 when it is lost."""
        if not self.lost:
            self.look()
        return 0.0 if self.lost else max(0.0, self.trusted_until - clock())
