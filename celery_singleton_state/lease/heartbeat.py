"""The heartbeat: renew all leases of a process with one statement, and find out which are lost.

The heartbeat has two threads, because the renewing thread may block on the store and cannot also
watch the clock. One thread renews the leases; the other checks whether they have expired. The first
lease starts both threads. A run that is shorter than an interval wakes neither.

Locked rows
-----------
A statement for several leases skips the rows that another transaction has locked. Otherwise one
locked row would delay the renewal of all leases, and all could expire. If a lease was skipped,
either its row is locked or the lease is lost. Only a statement for this lease alone, which waits
for the lock, can tell which. A third thread, started by the first skipped lease, sends these
statements: one at a time, the most urgent lease first. Each statement ends within the store's
time-out. Meanwhile the first thread keeps sending its statements for all leases, in time. So a
skipped lease is renewed as soon as its row is free, even while the third thread waits for another
row. The first thread sends a statement for one lease alone only if the process holds no other
lease.

In a child of a prefork worker
------------------------------
The parent process renews the leases of its children
(:mod:`celery_singleton_state.lease.renewal_slots`). The child's threads read the parent's answers
before they renew a lease and before they count it as lost. The child's own renewal is due at half
of the lease's life after the last renewal by either process. So the child renews only if the
parent did not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Set
from operator import attrgetter
from typing import Generic, TypeVar

from celery_singleton_state.store.base import Leases, StoreError
from celery_singleton_state.text.visible import logger_of

from .lease import HeldLease, clock
from .renewal_slots import LeftToParent, hear_signals, listen

T = TypeVar("T")

logger = logger_of(__name__)

#: The time after which a renewal without an answer is repeated, as a fraction of the lease's
#: renewal interval.
RETRY_PART = 0.125
#: How early a lease may be renewed, as a fraction of its renewal interval. So one statement can
#: renew it together with a lease that is due.
TOGETHER_PART = 0.5

#: Seconds that a timer thread waits after an error before it continues.
AFTER_ERROR = 0.1
#: The longest time, in seconds, for which a timer thread sleeps before it checks its items again.
#: It sleeps without limit only if it has no items, and no item came since its last check.
LINGER = 1.0

REFUSED = "its renewal was refused"


class Heartbeat:
    """Renews leases, from :meth:`hold` until they are dropped or lost.

    :param parent: how this process asks its parent to renew the leases; left out: only this process
        renews them.
    """

    def __init__(self, store: Leases, parent: LeftToParent | None = None) -> None:
        self._store = store
        self._parent = parent
        self._lock = threading.Lock()
        self._held: set[HeldLease] = set()
        #: Leases that a statement for several leases skipped, because their rows are locked or the
        #: leases are lost. A statement for each lease alone finds out which.
        self._skipped: set[HeldLease] = set()
        self._renewal = TimerThread(
            "singleton-heartbeat", self._lock, self._held, attrgetter("renew_at"), self._renew
        )
        self._expiry = TimerThread(
            "singleton-expiry", self._lock, self._held, attrgetter("trusted_until"), self._expire
        )
        self._waiting = TimerThread(
            "singleton-locked", self._lock, self._skipped, lambda held: 0.0, self._wait_for
        )
        if parent is not None:
            listen(self.take_answers)

    def hold(self, held: HeldLease) -> None:
        """Renew a lease from now on."""
        if self._parent is not None:
            # Try to install the handler of the parent's signal here, too: only the main thread can
            # do this, and the heartbeat may have been made in another thread.
            hear_signals()
            self._parent.add(held)
        with self._lock:
            self._held.add(held)
            self._renewal.expect(held)
            self._expiry.expect(held)

    def drop(self, held: HeldLease) -> None:
        """Stop renewing a lease, because its run releases it."""
        with self._lock:
            self._held.discard(held)
            self._skipped.discard(held)
        if self._parent is not None:
            self._parent.remove(held)

    def take_answers(self) -> None:
        """Read the parent's answers and apply them to the leases. Any thread may call this."""
        if self._parent is None:
            return
        with self._lock:
            leases = list(self._held)
        for held in leases:
            answer = self._parent.answer_to(held)
            if answer is None:
                continue
            if answer.asked_at is None:
                self._lose(held, REFUSED)
            else:
                held.answered(answer.asked_at, answer.handoff_to)

    def close(self) -> None:
        """End the threads. Leases that are still held will expire."""
        for timer in (self._renewal, self._expiry, self._waiting):
            timer.close()

    # -- in the thread that checks whether leases have expired

    def _expire(self, due: list[HeldLease]) -> None:
        self.take_answers()
        for held in due:
            # Check again, because the lease may have been renewed or released since it was found
            # due.
            if not held.remaining:
                self._lose(held, "it was not renewed before it expired")

    # -- in the thread that renews

    def _renew(self, _: list[HeldLease]) -> None:
        self.take_answers()
        due = self._to_be_renewed()
        if due:
            self._renew_all(due)

    def _to_be_renewed(self) -> list[HeldLease]:
        """Return the leases to renew now: all that are due or nearly due, if at least one is due.

        The result has one lease of each key at most. Two runs of a process can hold leases of the
        same key: the first run lost its lease and does not know it yet, and the second run took the
        lease over. The store answers by key, so the answer for the second lease would count for the
        first as well.
        """
        now = clock()
        by_key: dict[str, HeldLease] = {}
        with self._lock:
            for one in sorted(self._held, key=lambda one: one.renew_at):
                by_key.setdefault(one.lease.key, one)
        held = list(by_key.values())
        if not held or held[0].renew_at > now:
            return []
        together = [one for one in held if one.renew_at - one.renew_every * TOGETHER_PART <= now]
        # A statement for one lease waits for its row's lock, and would delay the renewal of the
        # other leases. So add a second lease: a statement for several leases skips locked rows.
        return together if len(together) > 1 else held[:2]

    def _renew_all(self, due: list[HeldLease]) -> None:
        asked_at = clock()
        alive = self._ask(due)
        if alive is None:
            return
        skipped = self._take(due, asked_at, alive)
        if len(due) == 1:
            for held in skipped:
                self._lose(held, REFUSED)
            return
        for held in skipped:
            self._ask_again(held)
        with self._lock:
            for held in self._held.intersection(skipped):
                self._skipped.add(held)
                self._waiting.expect(held)

    def _ask(self, due: list[HeldLease]) -> dict[str, str | None] | None:
        try:
            return self._store.renew([held.lease for held in due])
        except Exception as error:  # go on after any error: the other leases need this thread
            logger.warning(
                "singletons: %d leases were not renewed, will try again: %s",
                len(due),
                error,
                exc_info=not isinstance(error, StoreError),
            )
            for held in due:
                self._ask_again(held)
            return None

    @staticmethod
    def _ask_again(held: HeldLease) -> None:
        held.renew_at = clock() + held.renew_every * RETRY_PART

    def _take(
        self, asked: list[HeldLease], asked_at: float, alive: dict[str, str | None]
    ) -> list[HeldLease]:
        """Apply the store's answers to the leases, and return the leases that were not renewed."""
        renewed = [held for held in asked if held.lease.key in alive]
        for held in renewed:
            held.answered(asked_at, alive[held.lease.key])
        with self._lock:
            self._skipped.difference_update(renewed)
        return [held for held in asked if held.lease.key not in alive]

    # -- in the thread that waits for locked rows

    def _wait_for(self, skipped: list[HeldLease]) -> None:
        held = min(skipped, key=lambda one: one.asked_at + one.lease.ttl)
        with self._lock:
            self._skipped.discard(held)
        asked_at = clock()
        alive = self._ask([held])
        if alive is not None and self._take([held], asked_at, alive):
            self._lose(held, REFUSED)

    # -- in any of the threads

    def _lose(self, held: HeldLease, why: str) -> None:
        with self._lock:
            # A lease that was dropped is not lost: its own run releases it.
            if held not in self._held:
                return
            self._held.discard(held)
            self._skipped.discard(held)
        if self._parent is not None and why is not REFUSED:
            # After a refusal the child's request stays in its slot: the parent does not renew the
            # lease any more, but sends signals for the request until the run ends.
            self._parent.remove(held)
        # From here on the run does not trust the lease, even if no other holder has it yet.
        held.lost = why
        owner = held.owner
        if owner is not None:
            owner.lost(why)


class TimerThread(Generic[T]):
    """A thread that waits until items are due, and calls a function with the due items.

    A short run adds an item and removes it before the item is due. If each such run woke the
    thread, each run would cost two switches between threads. So a thread without items checks again
    every :data:`LINGER` seconds, and sleeps without limit only if no item came since its last
    check.

    :param name: the thread's name.
    :param items: the items to watch. Other threads change this set while they hold the lock.
    :param due_at: returns the time at which an item is due, on
        :data:`~celery_singleton_state.lease.lease.clock`.
    :param callback: called in the thread, without the lock, with the due items. If it neither
        removes an item nor changes its due time, it is called with that item again at once.
    """

    def __init__(
        self,
        name: str,
        lock: threading.Lock,
        items: Set[T],
        due_at: Callable[[T], float],
        callback: Callable[[list[T]], None],
    ) -> None:
        self._name = name
        self._changed = threading.Condition(lock)
        self._items = items
        self._due_at = due_at
        self._callback = callback
        self._wakes_at = float("inf")
        #: Whether an item was added since the thread's last check.
        self._used = False
        self._thread: threading.Thread | None = None
        self._closed = False

    def expect(self, item: T) -> None:
        """Make sure that the thread wakes when a new item is due. The caller must hold the lock."""
        self._used = True
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        elif self._due_at(item) < self._wakes_at:
            self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        try:
            while due := self._wait_until_due():
                try:
                    self._callback(due)
                except Exception:  # go on after any error: the other items need this thread
                    logger.exception("singletons: error in thread %s, which continues", self._name)
                    time.sleep(AFTER_ERROR)
        finally:
            with self._changed:
                self._thread = None

    def _wait_until_due(self) -> list[T]:
        """Wait until at least one item is due, and return the due items; [] after a close."""
        with self._changed:
            while not self._closed:
                due = [item for item in self._items if self._due_at(item) <= clock()]
                if due:
                    return due
                self._wakes_at = self._next_wake()
                forever = self._wakes_at == float("inf")
                # The wait is limited because a wait does not count the time while the host is
                # suspended, and an item may be due when the host wakes up.
                left = min(self._wakes_at - clock(), LINGER)
                self._changed.wait(None if forever else left)
            return []

    def _next_wake(self) -> float:
        if self._items:
            return min(map(self._due_at, self._items))
        self._used, was_used = False, self._used
        return clock() + LINGER if was_used else float("inf")
