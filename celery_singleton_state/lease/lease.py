"""A lease as its run holds it, and the clock by which it is counted."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from celery_singleton_state.store.base import Lease, StoreUnavailable

T = TypeVar("T")

# CLOCK_MONOTONIC stands still while the machine is suspended, and the store's clock does not.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

#: The part of a lease's life for which its holder trusts it. The rest is for the body to end in.
TRUSTED_PART = 0.9


#: Seconds on the clock that leases are trusted by; only differences mean anything.
clock: Callable[[], float] = partial(time.clock_gettime, CLOCK)


#: Seconds before the second try; doubled for each further one, and jittered.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0


class Owner(Protocol):
    """Whoever a lease is held for. It is called in the heartbeat's threads, and must not wait."""

    def lost(self, why: str) -> None:
        """The lease is lost."""

    def handoff_requested(self, handoff_to: str) -> None:
        """Somebody wants the lease."""


class HeldLease:
    """A lease as its holder sees it.

    :param asked_at: :data:`clock` just before the request that acquired it was sent.
    :param interval: seconds between renewals.
    :param owner: told what becomes of the lease; ``None`` before its run begins and after its end.
    """

    def __init__(
        self, lease: Lease, asked_at: float, interval: float, owner: Owner | None = None
    ) -> None:
        self.lease = lease
        self.owner = owner
        #: Why it is lost, as a text for people; ``None`` while it is not.
        self.lost: str | None = None
        #: Who asked the holder to hand over, as far as it has heard.
        self.handoff_to: str | None = None
        #: Called before anybody reads how long it may be trusted.
        self.refresh: Callable[[], None] | None = None
        self.renew_every = min(interval, TRUSTED_PART * lease.ttl / 2)
        self.asked_at = asked_at
        self.trusted_until = asked_at + TRUSTED_PART * lease.ttl
        self.renew_at = asked_at + self.renew_every

    def renewed(self, asked_at: float) -> None:
        """Trust it anew, counted from before the request.

        The answer to an older request than the last answered one changes nothing.
        """
        if asked_at < self.asked_at:
            return
        self.asked_at = asked_at
        self.trusted_until = asked_at + TRUSTED_PART * self.lease.ttl
        self.renew_at = asked_at + self.renew_every

    def answered(self, asked_at: float, handoff_to: str | None) -> None:
        """Take the answer to a renewal.

        :param who: asks the holder to hand over, if anybody does.
        """
        self.renewed(asked_at)
        if handoff_to:
            self.handoff_to = handoff_to
            owner = self.owner
            if owner is not None:
                owner.handoff_requested(handoff_to)

    @property
    def remaining(self) -> float:
        """Seconds that it may still be trusted; 0 when it is lost."""
        if self.refresh is not None and not self.lost:
            self.refresh()
        return 0.0 if self.lost else max(0.0, self.trusted_until - clock())


def retry_immediately(request: Callable[[], T], tries: float, until: float) -> T:
    """Send a request until the store answers it.

    :param tries: how often at most; infinity for no limit.
    :param until: the moment, on :data:`~celery_singleton_state.lease.lease.clock`, after which it
        is not sent again.
    :raises StoreUnavailable: the last try's.
    """
    pause = FIRST_PAUSE
    while True:
        tries -= 1
        try:
            return request()
        except StoreUnavailable:
            if tries <= 0 or clock() + pause >= until:
                raise
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE)
