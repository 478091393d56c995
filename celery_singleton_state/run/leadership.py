"""What a task hears of its run's lease, and what becomes of a body whose run is not to go on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from celery_singleton_state.errors import HeartbeatFailed
from celery_singleton_state.lease.lease import HeldLease

from .interrupt import Body

logger = logging.getLogger(__name__)


class Leadership:
    """A run's leadership: begun once, and ended once, however the run ends.

    :param interrupts: whether the body is interrupted when its run has lost the lease, or is asked
        to hand it over.
    :param lost: told that it is lost; makes the error of that.
    :param enter: makes the calling thread one of the run's.
    """

    def __init__(
        self,
        task: Any,
        singleton: str,
        held: HeldLease,
        interrupts: bool,
        lost: Callable[[], HeartbeatFailed],
        enter: Callable[[], object],
    ) -> None:
        self.body = Body(singleton)
        self._task = task
        self._singleton = singleton
        self._interrupts = interrupts
        self._lost = lost
        self._enter = enter
        self._telling = threading.Lock()
        self._leads = False
        held.on_lost = self._on_lost
        held.on_handoff = self._on_handoff

    def begin(self) -> None:
        """Tell the task that it leads."""
        self._leads = True
        self._task.on_become_leader()

    def forget(self) -> None:
        """Let go of the run, which is over: it is freed at once, with its state."""
        self._lost = lambda: HeartbeatFailed("")
        self._enter = lambda: None

    def end(self) -> None:
        """Tell the task that it leads no longer, once; who comes second waits until it is told."""
        with self._telling:
            if not self._leads:
                return
            self._leads = False
            try:
                self._task.on_lose_leadership()
            except Exception:
                logger.exception("singleton %s: on_lose_leadership() failed", self._singleton)

    # -- in the heartbeat's threads, which must not wait for what a task does about it

    def _on_lost(self) -> None:
        why = self._lost().detail
        if self._interrupts:
            self.body.interrupt(why)
        else:
            threading.Thread(target=self._end_beside, daemon=True).start()

    def _on_handoff(self, who: str) -> None:
        if self._interrupts:
            self.body.interrupt(asked_by(who))

    def _end_beside(self) -> None:
        self._enter()
        self.end()


def asked_by(who: str) -> str:
    """Why a run ends that was asked to hand over."""
    return f"asked to hand over to {who}; the state is that of the last checkpoint"
