"""The heartbeat: keeps leases of a process alive, in one statement, and says which are lost.

Two threads, as one that waits for the store cannot tell the time: one renews the leases, the
other judges them by the clock. Both are started by the first lease, and neither is woken by runs
that are shorter than an interval.
"""

from __future__ import annotations

import logging
import threading

from .alarm import Alarm
from .lease import HeldLease, clock
from .store.base import Leases, StoreError

logger = logging.getLogger(__name__)

#: A renewal that met no answer is repeated after this part of the interval.
RETRY_PART = 0.125
#: A lease that is due within this part of its interval is renewed together with one that is due.
TOGETHER_PART = 0.5


class Heartbeat:
    """Renews the leases that it is given until they are dropped or lost."""

    def __init__(self, store: Leases) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._held: set[HeldLease] = set()
        self._renewal = Alarm(
            "singleton-heartbeat", self._lock, self._held, lambda held: held.renew_at, self._renew
        )
        self._judge = Alarm(
            "singleton-judge", self._lock, self._held, lambda held: held.trusted_until, self._expire
        )

    def hold(self, held: HeldLease) -> None:
        """Keep a lease alive from now on."""
        with self._lock:
            self._held.add(held)
            self._renewal.expect(held)
            self._judge.expect(held)

    def drop(self, held: HeldLease) -> None:
        """Leave a lease alone from now on."""
        with self._lock:
            self._held.discard(held)

    def close(self) -> None:
        """End the threads; leases that are still held run out."""
        self._renewal.close()
        self._judge.close()

    # -- in the judge's thread

    def _expire(self, due: list[HeldLease]) -> None:
        for held in due:
            # It may have been renewed meanwhile, or given back.
            if not held.remaining:
                self._lose(held, "it was not renewed before its life ran out")

    # -- in the renewal's thread

    def _renew(self, due: list[HeldLease]) -> None:
        now = clock()
        with self._lock:
            due = [
                held
                for held in self._held
                if held.renew_at - held.renew_every * TOGETHER_PART <= now
            ]
        if due:
            self._renew_all(due)

    def _renew_all(self, due: list[HeldLease]) -> None:
        asked_at = clock()
        alive = self._ask(due)
        if alive is None:
            return
        for held in due:
            if held.lease.key in alive:
                held.renewed(asked_at)
                if who := alive[held.lease.key]:
                    held.on_handoff(who)
            elif len(due) == 1:
                self._lose(held, "its renewal was refused")
            else:
                # One whose row somebody has locked must not cost the others their lives.
                self._renew_all([held])

    def _ask(self, due: list[HeldLease]) -> dict[str, str | None] | None:
        try:
            return self._store.renew([held.lease for held in due])
        except Exception as error:  # whatever it is, the other leases still need this thread
            logger.warning(
                "could not renew %d leases: %s",
                len(due),
                error,
                exc_info=not isinstance(error, StoreError),
            )
            for held in due:
                held.renew_at = clock() + held.renew_every * RETRY_PART
            return None

    def _lose(self, held: HeldLease, why: str) -> None:
        with self._lock:
            # One that was dropped was given back by its own run.
            if held not in self._held:
                return
            self._held.discard(held)
        held.lose(why)
