"""Release the leases that this process may hold without a run, and try until the store answers.

If the answer to an acquisition was lost, the store may have given the lease. A release may have
failed, too. No other process frees such a lease, because its holder's process lives: other runs
would have to wait until the lease expires. So this process keeps the holder's name and asks the
store to release the lease: at once, and again after each interval until the store answers. Until
then the lease stays in the process's holder file, so that another process on the host frees the
lease if this process dies.

A delivery adds its holder's name here only after its body has ended. Otherwise the next run could
begin while the body of a lost run still tidies up.
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

#: A function that is called with the store's answer after a lease was released.
AfterRelease = Callable[[Released | None], None]

logger = logger_of(__name__)


@dataclass(eq=False, slots=True)
class _UnreleasedLease:
    store: Leases
    key: str
    holder: str
    slot: int | None
    then: AfterRelease
    #: Whether a request to release the lease was not answered, and so may have been carried out.
    is_unsure: bool = False


class UnreleasedLeases:
    """Releases leases in a thread of its own, which lives while there are leases to release.

    :param clear: frees a lease's slot in the holder file.
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
        #: An event that is set when a lease was added, or when the thread should end.
        self._called = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def add(
        self,
        store: Leases,
        key: str,
        holder: str,
        slot: int | None,
        then: AfterRelease = lambda released: None,
    ) -> None:
        """Release a lease, if this holder has it, as soon as the store answers.

        :param slot: the lease's slot in the holder file, which is freed when the store has
            answered; ``None`` if the lease has none.
        :param then: called after a request has released the lease, or if an earlier request, whose
            answer was lost, may have released it; left out: nothing is called.
        """
        if os.getpid() != self._pid:
            return  # in a child that the body forked: only its parent may release the lease
        with self._lock:
            self._leases.append(_UnreleasedLease(store, key, holder, slot, then))
            self._called.set()
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name="singleton-release", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    logger.warning(
                        "%s: its lease will be released together with the next one: %s", key, error
                    )
                else:
                    self._thread = thread

    def close(self) -> None:
        """End the thread. Leases that are not released yet stay in the holder file."""
        self._closed = True
        self._called.set()
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while leases := self._left():
            done = [lease for lease in leases if self._is_released(lease)]
            with self._lock:
                self._leases = [lease for lease in self._leases if lease not in done]
            if len(done) < len(leases):
                self._called.wait(self._interval)

    def _left(self) -> list[_UnreleasedLease]:
        """Return the leases to release, new ones first. An empty result ends the thread."""
        with self._lock:
            self._called.clear()
            leases = [] if self._closed else sorted(self._leases, key=lambda one: one.is_unsure)
            if not leases:
                self._thread = None
            return leases

    def _is_released(self, lease: _UnreleasedLease) -> bool:
        """Ask the store to release a lease; return whether to stop asking.

        Asking stops when the store has answered, or has raised an error that it would raise again.
        """
        try:
            released = lease.store.give_back(lease.key, lease.holder)
        except (StoreUnavailable, StoreMisconfigured, StoreRefusesValue) as error:
            if not getattr(error, "is_of_text", False):
                logger.warning("%s: not released yet, will try again: %s", lease.key, error)
                lease.is_unsure = True
                return False
            # The store cannot hold this key. So it has no lease of this key, and there is nothing
            # to release.
            released = None
        except Exception as error:  # go on after any error: the other leases need this thread
            logger.warning("%s: not released, its lease must expire: %s", lease.key, error)
            released = None
        self._clear(lease.slot)
        if released is not None:
            logger.info("%s is free: %s released it", lease.key, lease.holder)
        if released is not None or lease.is_unsure:
            lease.then(released)
        return True
