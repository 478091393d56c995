"""Leases that this process may hold without a run, and gives back until the store has answered.

An acquisition whose answer was lost may have taken the lease; a release may have failed. Nobody
else knows of such a lease: its holder's process lives, so others wait until the lease runs out.
Therefore the process keeps the holder's name and sends *give back* at once, and every interval
until it is answered. Until then the lease stays noted in the process's file of holdings, so that
others on its host free it if the process dies.

A delivery leaves its holder's name here when its body has ended and not before: a successor that
began while the body of a lost run still tidies up would run beside it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from celery_singleton_state.store.base import (
    Leases,
    Released,
    StoreMisconfigured,
    StoreRefusesValue,
    StoreUnavailable,
)
from celery_singleton_state.text.visible import logger_of

#: Told the store's answer to the request that gave a lease back.
Then = Callable[[Released | None], None]

logger = logger_of(__name__)


@dataclass(eq=False, slots=True)
class _UnreleasedLease:
    store: Leases
    key: str
    holder: str
    slot: int | None
    then: Then
    #: Whether a request was not answered: it may have been carried out.
    is_unsure: bool = False


class UnreleasedLeases:
    """Gives leases back in a thread of its own, which lives while there are any.

    :param strike_out: clears a place in the file of holdings.
    :param interval: seconds between two tries while the store does not answer.
    """

    def __init__(
        self,
        clear: Callable[[int | None], None],
        interval: float,
    ) -> None:
        self._clear = clear
        self._interval = interval
        self._lock = threading.Lock()
        self._leases: list[_UnreleasedLease] = []
        self._closed = False
        #: Set when there is something new to do.
        self._called = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def add(
        self,
        store: Leases,
        key: str,
        holder: str,
        slot: int | None,
        then: Then = lambda released: None,
    ) -> None:
        """Give a lease back to its store, if this holder has it, as soon as the store answers.

        :param slot: the lease's place in the file of holdings; it is cleared when the store has
            answered.
        :param then: called when the lease was given back, or may have been by a request whose
            answer was lost.
        """
        if os.getpid() != self._pid:
            return  # a child that the body forked: the lease is its parent's
        with self._lock:
            self._leases.append(_UnreleasedLease(store, key, holder, slot, then))
            self._called.set()
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name="singleton-give-back", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    logger.warning("%s: given back together with the next lease: %s", key, error)
                else:
                    self._thread = thread

    def close(self) -> None:
        """End the thread. What is not given back yet stays noted in the file of holdings."""
        self._closed = True
        self._called.set()
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while leases := self._left():
            returned = [lease for lease in leases if self._is_released(lease)]
            with self._lock:
                self._leases = [lease for lease in self._leases if lease not in returned]
            if len(returned) < len(leases):
                self._called.wait(self._interval)

    def _left(self) -> list[_UnreleasedLease]:
        """The leases to give back, new ones first; none ends the thread."""
        with self._lock:
            self._called.clear()
            leases = [] if self._closed else sorted(self._leases, key=lambda one: one.is_unsure)
            if not leases:
                self._thread = None
            return leases

    def _is_released(self, lease: _UnreleasedLease) -> bool:
        """Ask the store to take a lease back; returns whether it has answered."""
        try:
            released = lease.store.give_back(lease.key, lease.holder)
        except (StoreUnavailable, StoreMisconfigured, StoreRefusesValue) as error:
            if not getattr(error, "is_of_text", False):
                logger.warning("%s: not given back yet: %s", lease.key, error)
                lease.is_unsure = True
                return False
            # The store can have no such key, and so no lease of it.
            released = None
        except Exception as error:  # whatever it is, the other leases still need this thread
            logger.warning("%s: not given back, its lease runs out: %s", lease.key, error)
            released = None
        self._clear(lease.slot)
        if released is not None:
            logger.info("%s is free: %s gave it back", lease.key, lease.holder)
        if released is not None or lease.is_unsure:
            lease.then(released)
        return True
