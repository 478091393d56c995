"""The heartbeat: renews the leases of a process, in one statement, and finds out which are lost.

Two threads, because the renewing thread may block on the store and cannot also watch the clock: one
renews the leases, the other evaluates them by the clock. Both are started by the first lease, and
neither is woken by runs that are shorter than an interval.

Locked rows
-----------
A statement for several leases passes over rows that somebody has locked, so that one lock cannot
cost all leases their lives. A lease that was passed over is either locked or lost, and only a
statement for it alone, which waits for the lock, can tell. A third thread, started when there is
such a lease, sends these statements, one at a time and the most urgent lease first; each ends after
the store's time-out. Meanwhile the first thread goes on with the statements for all, soon and on
time, so that a lease is renewed as soon as its row is free, whichever row the third thread waits
for. The first thread asks for a lease alone only if the process holds no other.

In a child of a prefork worker
------------------------------
There the parent renews (:mod:`celery_singleton_state.lease.renewal_slots`). The threads take the
parent's answers before they renew and before they give a lease up for lost. The child's own renewal
is due at half of the life, counted from the last renewal of either, so it is sent only if the
parent's did not come.
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

#: A renewal that met no answer is repeated after this part of the interval.
RETRY_PART = 0.125
#: A lease that is due within this part of its interval is renewed together with one that is due.
TOGETHER_PART = 0.5

#: Seconds that a thread waits after an error before it looks again.
AFTER_ERROR = 0.1
#: Seconds between two looks while there is nothing to wait for.
LINGER = 1.0

REFUSED = "its renewal was refused"


class Heartbeat:
    """Renews the leases that it is given until they are dropped or lost.

    :param parent: renews as well; left out: this process alone does.
    """

    def __init__(self, store: Leases, parent: LeftToParent | None = None) -> None:
        self._store = store
        self._parent = parent
        self._lock = threading.Lock()
        self._held: set[HeldLease] = set()
        #: Leases that a statement for several passed over.
        self._skipped: set[HeldLease] = set()
        self._renewal = TimerThread(
            "singleton-heartbeat", self._lock, self._held, attrgetter("renew_at"), self._renew
        )
        self._expiry = TimerThread(
            "singleton-judge", self._lock, self._held, attrgetter("trusted_until"), self._expire
        )
        self._waiting = TimerThread(
            "singleton-locked", self._lock, self._skipped, lambda held: 0.0, self._wait_for
        )
        if parent is not None:
            listen(self.take_answers)

    def hold(self, held: HeldLease) -> None:
        """Keep a lease alive from now on."""
        if self._parent is not None:
            # The heartbeat may have been made in another thread than the main one.
            hear_signals()
            self._parent.add(held)
        with self._lock:
            self._held.add(held)
            self._renewal.expect(held)
            self._expiry.expect(held)

    def drop(self, held: HeldLease) -> None:
        """Leave a lease alone from now on."""
        with self._lock:
            self._held.discard(held)
            self._skipped.discard(held)
        if self._parent is not None:
            self._parent.remove(held)

    def take_answers(self) -> None:
        """Take what the parent has answered. Any thread may call this."""
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
        """End the threads; leases that are still held run out."""
        for timer in (self._renewal, self._expiry, self._waiting):
            timer.close()

    # -- in the thread that evaluates leases by the clock

    def _expire(self, due: list[HeldLease]) -> None:
        self.take_answers()
        for held in due:
            # It may have been renewed meanwhile, or given back.
            if not held.remaining:
                self._lose(held, "it was not renewed before its life ran out")

    # -- in the thread that renews

    def _renew(self, _: list[HeldLease]) -> None:
        self.take_answers()
        due = self._to_be_renewed()
        if due:
            self._renew_all(due)

    def _to_be_renewed(self) -> list[HeldLease]:
        """The leases that are due or nearly so, if any is due; of each key one.

        Two runs of a process can hold leases of one key: one lost its lease and does not know it
        yet, the other took it over. The store answers by key, so the renewal of the second lease
        would count for the first one as well.
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
        # A statement for one lease waits for its row's lock, and the other leases would wait, too.
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
        except Exception as error:  # whatever it is, the other leases still need this thread
            logger.warning(
                "could not renew %d leases: %s",
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
        """Take the store's answers; returns the leases that it did not renew."""
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

    # -- in any of them

    def _lose(self, held: HeldLease, why: str) -> None:
        with self._lock:
            # A lease that was dropped was given back by its own run.
            if held not in self._held:
                return
            self._held.discard(held)
            self._skipped.discard(held)
        if self._parent is not None and why is not REFUSED:
            # After a refusal the parent renews no more, but its signals go on until the run ends.
            self._parent.remove(held)
        # It is trusted no longer, whoever else may hold it or not.
        held.lost = why
        owner = held.owner
        if owner is not None:
            owner.lost(why)


class TimerThread(Generic[T]):
    """A thread that calls back with those things whose moments have come.

    What is shorter than the wait is gone when the thread looks. It then lingers, looking now and
    then, and sleeps for good only when nothing came in between: to wake it for each short run would
    cost each two switches between threads.

    :param name: the thread's.
    :param things: watched over, and changed by others, under the lock.
    :param moment: when a thing is due, on :data:`~celery_singleton_state.lease.lease.clock`.
    :param ring: called in the thread, without the lock; a due thing it leaves as it was comes
        again at once.
    """

    def __init__(
        self,
        name: str,
        lock: threading.Lock,
        things: Set[T],
        moment: Callable[[T], float],
        ring: Callable[[list[T]], None],
    ) -> None:
        self._name = name
        self._changed = threading.Condition(lock)
        self._things = things
        self._moment = moment
        self._ring = ring
        self._wakes_at = float("inf")
        #: Whether there was anything since it last looked.
        self._used = False
        self._thread: threading.Thread | None = None
        self._closed = False

    def expect(self, thing: T) -> None:
        """See to it that a new thing is not slept through. The caller holds the lock."""
        self._used = True
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        elif self._moment(thing) < self._wakes_at:
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
                    self._ring(due)
                except Exception:  # whatever it is, the other things still need this thread
                    logger.exception("singletons: thread %s goes on", self._name)
                    time.sleep(AFTER_ERROR)
        finally:
            with self._changed:
                self._thread = None

    def _wait_until_due(self) -> list[T]:
        """What is due, as soon as anything is; nothing when it was closed."""
        with self._changed:
            while not self._closed:
                due = [thing for thing in self._things if self._moment(thing) <= clock()]
                if due:
                    return due
                self._wakes_at = self._next_wake()
                forever = self._wakes_at == float("inf")
                # Not for longer, because the wait's clock stands still while the host is suspended.
                left = min(self._wakes_at - clock(), LINGER)
                self._changed.wait(None if forever else left)
            return []

    def _next_wake(self) -> float:
        if self._things:
            return min(map(self._moment, self._things))
        self._used, was_used = False, self._used
        return clock() + LINGER if was_used else float("inf")
