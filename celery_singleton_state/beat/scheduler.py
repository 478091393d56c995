"""The scheduler of ``celery beat -S singleton``, which keeps its state in the store."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from celery.beat import Scheduler

from celery_singleton_state.store.base import SeenTicks, Store, StoreError, StoreRefusesValue
from celery_singleton_state.text.visible import logger_of
from celery_singleton_state.ticks import message_of

from .entry import SingletonEntry
from .entry_checks import fields_of
from .entry_state import EntryState
from .mixin import LeaderMixin
from .under_way import row_key_of

logger = logger_of(__name__)

#: How many messages are sent at most before they are recorded in the store. If the leader dies, the
#: next leader sends at most that many messages again.
BATCH = 500
#: How many entries a warning about missed ticks names at most.
LISTED = 20


class SingletonScheduler(LeaderMixin, Scheduler):
    """The scheduler of ``celery beat -S singleton``. Any number of beats may run it.

    The state of the schedule is in the store of the singletons. The cost of a tick grows with the
    number of entries that are due, and not with the number of all entries.
    """

    Entry = SingletonEntry
    #: The longest time between two ticks of the scheduler, in seconds. `celery inspect ping` also
    #: uses it: a beat counts as stalled after twice this time, but after a minute at the earliest.
    max_interval = 5

    #: How many messages were sent since the last record in the store.
    _sent_now = 0
    #: Whether the entry that was sent last has been recorded as sent.
    _counted = False
    #: Whether the store was unavailable when it was last asked which ticks have ended.
    _cannot_ask = False

    def setup_schedule(self) -> None:
        self.merge_inplace(self.app.conf.beat_schedule)
        self.install_default_entries(self.schedule)
        self._leader.check()

    def merge_inplace(self, entries: Any) -> None:
        super().merge_inplace(fields_of(entries))

    def update_from_dict(self, entries: Any) -> None:
        super().update_from_dict(fields_of(entries))
        self._fence = None

    def add(self, **fields: Any) -> Any:
        entry = super().add(**fields)
        # Take over the schedule again, to load the state that the store may have for the new entry.
        self._fence = None
        return entry

    @property
    def info(self) -> str:
        return f"    . leader -> {self._leader.name} in {self._leader.store_url}"

    def _take_over(self) -> None:
        now = self._leader.now()
        states = self._load()
        prefix = self._leader.runtime.settings.key_prefix
        self._heap = []
        schedule: Any = self.schedule
        for number, (name, entry) in enumerate(schedule.items()):
            entry.row_key = row_key_of(entry, self.app, prefix)
            state = states.pop(name, None)
            if state is None:
                entry.begin(now)
            else:
                entry.resume(state, now)
            if entry.state() != state:
                self._unrecorded[name] = entry.state()
            check_at = entry.next_check(now) if entry.under_way else entry.next_tick
            self._heap.append((check_at, number, entry))
        heapq.heapify(self._heap)
        if states:
            self._leader.forget(list(states))
            logger.info(
                "beat: %d entries are no longer in the schedule, and were removed from the store",
                len(states),
            )
        logger.info(
            "beat: %d entries, %d of them new or changed", len(self.schedule), len(self._unrecorded)
        )

    def _work(self, *_args: Any, **_kwargs: Any) -> float:
        """Send the due ticks in rounds, one tick of each due entry in a round.

        So the backlog of one entry delays another entry for one round at most.

        :returns: the seconds until the next entry is due.
        """
        missed: list[str] = []
        self._sent_now = 0
        try:
            # The rounds end when the lease has to be renewed. The caller then renews the lease, and
            # records the sent ticks.
            while self._may_go_on() and self._round(missed):
                pass
        finally:
            if missed:
                _log_missed(missed)
        if not self._heap:
            return float(self.max_interval)
        return float((self._heap[0][0] - self._leader.now()).total_seconds())

    def _may_go_on(self) -> bool:
        return not self._closed and self._leader.renew_in > 0 and self._sent_now < BATCH

    def _round(self, missed: list[str]) -> bool:
        """Send one tick of each due entry, until this beat has to stop.

        :param missed: a list to which descriptions of missed ticks are added.
        :returns: whether any entry was due.
        """
        heap, now = self._heap, self._leader.now()
        turns: list[tuple[datetime, int, SingletonEntry]] = []
        while heap and heap[0][0] <= now and len(turns) < BATCH:
            turns.append(heapq.heappop(heap))
        done = 0
        try:
            self._find_ended([entry for *_, entry in turns if entry.under_way])
            for _, number, entry in turns:
                if not self._may_go_on():
                    break
                check_at = self._turn(entry, missed)
                heapq.heappush(heap, (check_at, number, entry))
                done += 1
        finally:
            for turn in turns[done:]:
                heapq.heappush(heap, turn)
        return bool(turns)

    def _turn(self, entry: SingletonEntry, missed: list[str]) -> datetime:
        """Send one tick of an entry, if it has one to send; return when to check the entry again.

        :param missed: a list to which a description of missed ticks is added.
        """
        now = self._leader.now()
        if entry.under_way:
            if entry.under_way.is_overdue:
                if entry.is_too_late(entry.under_way.due, now):
                    missed.append(
                        f"1 of {entry.name} from {entry.under_way.due:%Y-%m-%d %H:%M:%S} on"
                    )
                    entry.give_up()
                    self._unrecorded[str(entry.name)] = entry.state()
                    return entry.next_check(now)
                logger.warning(
                    "beat: the tick %s of %s is sent again, because the row of its singleton shows"
                    " nothing of it",
                    *(entry.under_way.due, entry.name),
                )
                return self._send_tick(entry)
            return entry.next_check(now)
        if (first := entry.next_tick) > now:
            return first
        if count := entry.miss(now):
            missed.append(f"{count} of {entry.name} from {first:%Y-%m-%d %H:%M:%S} on")
            self._unrecorded[str(entry.name)] = entry.state()
        elif entry.next_tick != first:
            # The schedule overrides ``is_due``, and the next time to ask it has changed. Record
            # this time, so that another leader asks whether the schedule is due at this same time.
            self._unrecorded[str(entry.name)] = entry.state()
        # Send the tick at once, and not in the order of due times: if the beat is behind, the tick
        # could be too late when its turn in that order comes.
        if entry.next_tick <= now and not entry.is_passing:
            return self._send_tick(entry)
        return entry.next_check(now)

    def _send_tick(self, entry: SingletonEntry) -> datetime:
        """Send the tick of an entry; return when to check the entry again."""
        self._counted = False
        self.apply_entry(entry, producer=self.producer)
        self._sent_now += 1
        if not self._counted and not self._postponed.wait(entry.name):
            # A tool that wraps ``apply_entry`` has suppressed the sending without an error, so the
            # entry is tried again later.
            self._postponed.add(entry.name)
        now = self._leader.now()
        pause = timedelta(seconds=self._postponed.wait(entry.name))
        return max(entry.next_check(now), now + pause)

    def _find_ended(self, entries: Sequence[SingletonEntry]) -> None:
        """Ask the store which ticks in progress have ended, and record the ended ones.

        :param entries: entries with a tick in progress.
        """
        waiting = [(entry, entry.under_way) for entry in entries if entry.under_way]
        if not waiting:
            return
        try:
            tasks = {tick.key: entry.task for entry, tick in waiting}
            rows: dict[str, SeenTicks] = {}
            for store, keys in self._leader.runtime.by_store(tasks):
                rows |= _ticks(store, keys)
        except StoreError as error:
            # Only entries with a tick in progress wait for the store. Other entries go on, because
            # the leases of singletons can be in another store than the schedule.
            if not self._cannot_ask:
                logger.warning("beat: the store cannot be asked which ticks have ended: %s", error)
            self._cannot_ask = True
            return
        self._cannot_ask = False
        now = self._leader.now()
        for entry, tick in waiting:
            name = str(entry.name)
            if tick.has_ended(rows.get(tick.key), self._leader.name, name, now):
                entry.under_way = None
                self._unrecorded[name] = entry.state()

    def _not_sent(self, entry: Any) -> None:
        """Do nothing: this scheduler counts an entry only after it was sent."""

    def _due(self, entry: SingletonEntry) -> datetime:
        return entry.under_way.due if entry.under_way else entry.next_tick

    def _message(self, entry: SingletonEntry, due: datetime) -> Any:
        tick = entry.under_way
        return message_of(
            entry,
            self._leader.name,
            due,
            previous=entry.previous_tick if tick else entry.tick_before,
            one_by_one=entry.row_key is not None,
            begins_anew=tick is not None and tick.is_continued,
        )

    def _sent(self, entry: SingletonEntry, due: datetime) -> EntryState:
        self._counted = True
        now = self._leader.now()
        if entry.under_way and entry.row_key:
            entry.under_way.sent_again(entry.row_key, now)
        else:
            entry.sent(now)
        if self._failure is not None and not self._was_sent:
            # The message of this tick can never be sent, so no row will show that the tick has
            # ended.
            entry.under_way = None
        return entry.state()


def _ticks(store: Store, keys: Collection[str]) -> dict[str, SeenTicks]:
    """Return a dict that maps the keys of rows to what the rows show of ticks.

    The store refuses the whole request if it cannot store one of the keys. Then each key is asked
    for alone, and a refused key is left out, because it can have no row.

    :raises StoreError: the store is unavailable.
    """
    try:
        return store.ticks(list(keys))
    except StoreRefusesValue:
        found: dict[str, SeenTicks] = {}
        for key in keys:
            with suppress(StoreRefusesValue):
                found |= store.ticks([key])
        return found


def _log_missed(missed: list[str]) -> None:
    more = f", and of {len(missed) - LISTED} more entries" if len(missed) > LISTED else ""
    logger.warning(
        "beat: ticks were missed, and are not sent (UTC): %s%s", ", ".join(missed[:LISTED]), more
    )
