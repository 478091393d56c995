"""A lease as its holder sees it, and the clock that tells how long the holder may trust it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from celery_singleton_state.store.base import Lease, StoreUnavailable

T = TypeVar("T")

# The clock by which a holder trusts its lease. While this machine is suspended, the store's clock
# goes on and leases expire. So the holder's clock must go on, too: CLOCK_BOOTTIME does, and
# CLOCK_MONOTONIC does not.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

#: The fraction of a lease's life for which its holder trusts the lease. In the rest of the life,
#: the body of a run that lost its lease has to end.
TRUSTED_PART = 0.9


#: Return the time in seconds, on the clock by which a holder trusts its lease. Only the difference
#: between two such times has a meaning.
clock: Callable[[], float] = partial(time.clock_gettime, CLOCK)


#: Seconds before the second immediate try of a request; doubled for each further try up to
#: LONGEST_PAUSE, and jittered.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0


class Owner(Protocol):
    """The run that holds a lease. The heartbeat's threads call its methods, so none may block."""

    def lost(self, why: str) -> None:
        """Called when the lease is lost.

        :param why: the reason, for people.
        """

    def handoff_requested(self, handoff_to: str) -> None:
        """Called when a message asks the holder to hand over the lease.

        :param handoff_to: the task id of that message.
        """


class HeldLease:
    """A lease as its holder sees it: how long it can be trusted, and when its renewal is due.

    :param asked_at: :data:`clock` just before the request that acquired the lease was sent.
    :param interval: seconds between renewals. A lease with a short life is renewed more often.
    :param owner: the run that is told when the lease is lost, or when a message asks for it;
        ``None`` before the run begins and after its end.
    """

    def __init__(
        self, lease: Lease, asked_at: float, interval: float, owner: Owner | None = None
    ) -> None:
        self.lease = lease
        self.owner = owner
        #: Why the lease is lost, for people; ``None`` while it is not lost.
        self.lost: str | None = None
        #: The task id of the message that asked this holder to hand over; ``None`` if the holder
        #: has heard of no such request.
        self.handoff_to: str | None = None
        #: A function that applies the renewals that the parent process has made. It is called
        #: before ``remaining`` is computed. ``None`` if no parent renews the lease.
        self.refresh: Callable[[], None] | None = None
        self.renew_every = min(interval, TRUSTED_PART * lease.ttl / 2)
        self.asked_at = asked_at
        self.trusted_until = asked_at + TRUSTED_PART * lease.ttl
        self.renew_at = asked_at + self.renew_every

    def renewed(self, asked_at: float) -> None:
        """Extend the trust in the lease after a renewal.

        :param asked_at: :data:`clock` just before the renewal was sent. If an answered renewal was
            sent later, nothing changes.
        """
        if asked_at < self.asked_at:
            return
        self.asked_at = asked_at
        self.trusted_until = asked_at + TRUSTED_PART * self.lease.ttl
        self.renew_at = asked_at + self.renew_every

    def answered(self, asked_at: float, handoff_to: str | None) -> None:
        """Apply the answer to a renewal that succeeded.

        :param asked_at: :data:`clock` just before the renewal was sent.
        :param handoff_to: the task id of the message that asks this holder to hand over; ``None``
            if no message does.
        """
        self.renewed(asked_at)
        if handoff_to:
            self.handoff_to = handoff_to
            owner = self.owner
            if owner is not None:
                owner.handoff_requested(handoff_to)

    @property
    def remaining(self) -> float:
        """Seconds for which the holder may still trust the lease; 0 when it is lost."""
        if self.refresh is not None and not self.lost:
            self.refresh()
        return 0.0 if self.lost else max(0.0, self.trusted_until - clock())


def retry_immediately(request: Callable[[], T], tries: float, until: float) -> T:
    """Send a request, and repeat it while the store is unavailable.

    :param tries: the largest number of tries; infinity for no limit.
    :param until: the time, on :data:`~celery_singleton_state.lease.lease.clock`, after which the
        request is not repeated.
    :returns: the store's answer.
    :raises StoreUnavailable: the last try failed, too.
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
