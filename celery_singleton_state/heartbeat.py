"""The heartbeat: one thread that keeps all leases of a process alive, in one statement.

It is started by the first lease and wakes when the earliest renewal is due. Runs that are shorter
than an interval are gone when it looks: it wakes once an interval for all of them together, and
sleeps for good when an interval passed without any. To wake it for each would cost each run two
switches between threads.
"""

from __future__ import annotations

import logging
import threading

from .lease import HeldLease, clock
from .store.base import Store, StoreError

logger = logging.getLogger(__name__)

#: A renewal that met no answer is repeated after this part of the interval.
RETRY_PART = 0.125


class Heartbeat:
    """Renews the leases that it is given until they are dropped or lost."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._held: set[HeldLease] = set()
        self._changed = threading.Condition()
        self._wakes_at = float("inf")
        #: Whether there was a lease since it last looked, and the shortest interval of all.
        self._used = False
        self._interval = float("inf")
        self._thread: threading.Thread | None = None
        self._closed = False

    def hold(self, held: HeldLease) -> None:
        """Keep a lease alive from now on."""
        with self._changed:
            self._held.add(held)
            self._used = True
            self._interval = min(self._interval, held.renew_every)
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(
                    target=self._beat, name="singleton-heartbeat", daemon=True
                )
                thread.start()
                self._thread = thread
            elif held.renew_at < self._wakes_at:
                self._changed.notify()

    def drop(self, held: HeldLease) -> None:
        """Leave a lease alone from now on."""
        with self._changed:
            self._held.discard(held)

    def close(self) -> None:
        """End the thread; leases that are still held run out."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        while self._wait_until_due():
            with self._changed:
                due = [held for held in self._held if held.renew_at <= clock()]
            if due:
                self._renew(due)
            with self._changed:
                for held in list(self._held):
                    if not held.remaining:
                        self._lose(held, "it was not renewed before its life ran out")

    def _wait_until_due(self) -> bool:
        with self._changed:
            while not self._closed:
                self._wakes_at = self._next_look()
                delay = self._wakes_at - clock()
                if delay <= 0:
                    return True
                self._changed.wait(None if delay == float("inf") else delay)
            return False

    def _next_look(self) -> float:
        if self._held:
            return min(held.renew_at for held in self._held)
        self._used, was_used = False, self._used
        return clock() + self._interval if was_used else float("inf")

    def _renew(self, due: list[HeldLease]) -> None:
        asked_at = clock()
        alive = self._ask(due)
        if alive is None:
            return
        passed_over = [held for held in due if held.lease.key not in alive]
        self._note(due, alive, asked_at, refused_too=len(due) == 1)
        if len(due) > 1:
            # One whose row somebody has locked must not cost the others their lives.
            for held in passed_over:
                self._renew([held])

    def _ask(self, due: list[HeldLease]) -> set[str] | None:
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
                again_at = clock() + held.renew_every * RETRY_PART
                held.renew_at = min(again_at, held.trusted_until)
            return None

    def _note(
        self, due: list[HeldLease], alive: set[str], asked_at: float, refused_too: bool
    ) -> None:
        with self._changed:
            # What was dropped meanwhile was given back by its own run.
            for held in self._held.intersection(due):
                if held.lease.key in alive:
                    held.renewed(asked_at)
                elif refused_too:
                    self._lose(held, "its renewal was refused")

    def _lose(self, held: HeldLease, why: str) -> None:
        self._held.discard(held)
        held.lost = why
        logger.error("lease on %s (fence %d) is lost: %s", held.lease.key, held.lease.fence, why)
