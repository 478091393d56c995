"""``celery beat -S singleton``: the schedule in the store, and its ticks sent by who leads."""

from __future__ import annotations

import heapq
import logging
from datetime import datetime
from typing import Any

from celery.beat import Scheduler

from .entry import SingletonEntry
from .entry_state import EntryState
from .mixin import LeaderMixin

logger = logging.getLogger(__name__)

#: Ticks between two records, which are what the next leader sends again at most.
BATCH = 500
#: Entries that a warning of missed ticks names.
LISTED = 20


class SingletonScheduler(LeaderMixin, Scheduler):
    """A scheduler of which any number may run; its schedule's state is in the singletons' store.

    What a tick costs grows with the entries that are due, and not with those that there are.
    """

    Entry = SingletonEntry
    #: Also twice this, but a minute at least, is what `inspect ping` takes for a stalled beat.
    max_interval = 5

    def setup_schedule(self) -> None:
        self.merge_inplace(self.app.conf.beat_schedule)
        self.install_default_entries(self.schedule)
        self._leader.check()

    def update_from_dict(self, entries: Any) -> None:
        super().update_from_dict(entries)
        self._fence = None

    def add(self, **fields: Any) -> Any:
        entry = super().add(**fields)
        # The schedule is taken over anew, with what the store may know of the entry.
        self._fence = None
        return entry

    @property
    def info(self) -> str:
        return f"    . leader -> {self._leader.name} in {self._leader.store_url}"

    def _take_over(self) -> None:
        now = self._leader.now()
        states = self._load()
        self._heap = []
        schedule: Any = self.schedule
        for number, (name, entry) in enumerate(schedule.items()):
            state = states.pop(name, None)
            if state is None:
                entry.begin(now)
            else:
                entry.resume(state, now)
            if entry.state() != state:
                self._unrecorded[name] = entry.state()
            self._heap.append((entry.next_tick, number, entry))
        heapq.heapify(self._heap)
        if states:
            self._leader.forget(list(states))
            logger.info("beat: %d entries are in the schedule no more", len(states))
        logger.info(
            "beat: %d entries, %d of them new or changed", len(self.schedule), len(self._unrecorded)
        )

    def _work(self, *_args: Any, **_kwargs: Any) -> float:
        heap = self._heap
        missed: list[str] = []
        now = self._leader.now()
        try:
            # A lease that is to be renewed is renewed first, with what was sent till then.
            while heap and heap[0][0] <= now and self._leader.renew_in > 0:
                if len(self._unrecorded) >= BATCH:
                    break
                first, number, entry = heap[0]
                if count := entry.miss(now):
                    missed.append(f"{count} of {entry.name} from {first:%Y-%m-%d %H:%M:%S} on")
                    self._unrecorded[entry.name] = entry.state()
                # At once, and not in the order of its due time: who is behind would have missed it
                # again by then.
                if entry.next_tick <= now:
                    self.apply_entry(entry, self.producer)
                heapq.heapreplace(heap, (entry.next_tick, number, entry))
                now = self._leader.now()
        finally:
            if missed:
                _log_missed(missed)
        return (heap[0][0] - now).total_seconds() if heap else float(self.max_interval)

    def _due(self, entry: SingletonEntry) -> datetime:
        return entry.next_tick

    def _sent(self, entry: SingletonEntry, due: datetime) -> EntryState:
        entry.sent(self._leader.now())
        return entry.state()


def _log_missed(missed: list[str]) -> None:
    more = f", and of {len(missed) - LISTED} more entries" if len(missed) > LISTED else ""
    logger.warning(
        "beat: ticks were missed, and are not sent (UTC): %s%s", ", ".join(missed[:LISTED]), more
    )
