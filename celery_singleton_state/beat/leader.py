"""The lease of the beats: a beat acquires it to lead, and renews it while it leads.

The lease is like the lease of any singleton, but no heartbeat renews it. The loop that sends ticks
renews it, in the same statement that records the sent ticks. So if a beat hangs because its broker
does not answer, its lease expires and another beat leads.

A leader takes the time from the store's clock, which all beats share. It uses its own clock only to
measure how much time has passed. So a host whose clock is wrong does no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import NoReturn

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from celery.utils.nodenames import gethostname

from celery_singleton_state import history
from celery_singleton_state.history import Outcome
from celery_singleton_state.keys import row_key
from celery_singleton_state.lease.holder_files import HolderRecord
from celery_singleton_state.lease.lease import HeldLease, clock
from celery_singleton_state.recovery import free_holder
from celery_singleton_state.runtime import Runtime, runtime_of
from celery_singleton_state.startup import warn_of_single_host
from celery_singleton_state.store.base import Ended, Row, Store, StoreError, StoreNotReady
from celery_singleton_state.store.sql.url import parse_url
from celery_singleton_state.text.storable import storable
from celery_singleton_state.text.urls import shown_url
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)

#: The prefix of the keys of all beats' rows.
PREFIX = "singleton-beat:"
#: Seconds after which a beat that stands by polls the leader's row again.
STANDBY_POLL = 0.5


def key_of(name: str) -> str:
    """Return the key of the row with the lease of the beats with this name.

    The key is ASCII text, so that a database of any encoding can store it.
    """
    return row_key(PREFIX, storable(name))


class NotLeading(Exception):
    """This beat must not send now: it does not lead, or it has to renew its lease first."""


class Leader:
    """One beat's access to the lease of the beats: acquire, renew and release it, and record ticks.

    :raises ImproperlyConfigured: a setting is not allowed, or the store's URL cannot be used.
    """

    def __init__(self, app: Celery) -> None:
        self.runtime: Runtime = runtime_of(app)
        #: The URL of the store with the lease, without its password.
        self.store_url = shown_url(parse_url(self.runtime.settings.store_url))
        self.name = self.runtime.settings.beat_name
        self.key = key_of(self.name)
        self._prefix = f"{self.key}:"
        self._held: HeldLease | None = None
        self._slot: int | None = None
        #: The number of the last write under this lease; and the number of the last write that the
        #: store has answered.
        self._number = self._seen = 0
        self._started = 0.0
        self._entries: tuple[history.Entry, ...] = ()
        #: The seconds to add to this process's clock to get the store's time.
        self._offset = 0.0
        self._logged = ""

    def check(self) -> None:
        """Check the store, and warn if only the beats of one host can share it.

        If the store is unavailable, this is logged, and the beat stands by until the store answers.

        :raises ImproperlyConfigured: the store cannot be used. The error names what is missing.
        """
        try:
            self._store.check((self.runtime.settings.key_prefix, self._prefix))
        except StoreNotReady as error:
            raise ImproperlyConfigured(str(error)) from error
        except StoreError as error:
            logger.error("beat stands by until the store is available: %s", error)
        warn_of_single_host(self.runtime.app, self.runtime.settings.store_url)

    @property
    def leads(self) -> bool:
        """Whether this beat may send now."""
        return self._held is not None and self._held.remaining > 0

    @property
    def fence(self) -> int | None:
        """The fence of the lease that this beat holds, even if the lease may have expired;
        ``None`` if this beat holds no lease.
        """
        return self._held.lease.fence if self._held else None

    @property
    def renew_in(self) -> float:
        """Seconds until the lease is to be renewed; negative when that is overdue."""
        return self._held.renew_at - clock() if self._held else 0.0

    def now(self) -> datetime:
        """Return the store's current time, which is known only while this beat leads."""
        return datetime.fromtimestamp(clock() + self._offset, UTC)

    def may_campaign(self) -> bool:
        """Whether the lease's row shows that no beat leads, so that this beat can campaign.

        If the holder's process is dead, its lease is freed. If another beat leads, that is logged.

        :raises StoreError: the store is unavailable.
        """
        row = self.row()
        if row is None or not row.held or free_holder(self.runtime, row.holder):
            return True
        self.say(f"beat stands by: {row.holder} leads {self.name!r}")
        return False

    def campaign(self) -> bool:
        """Try to acquire the lease; return whether this beat leads now.

        :raises StoreError: the store is unavailable. It is not known whether the lease was
            acquired.
        """
        self.give_up()
        settings, store = self.runtime.settings, self._store
        holder = self.runtime.new_holder(f"celerybeat@{gethostname()}")
        self._slot = self.runtime.holder_files.note(HolderRecord(self.key, holder, 0))
        asked_at = clock()
        try:
            acquired = store.acquire(self.key, holder, settings.lease_ttl, None)
        except BaseException:
            # Release the lease: the store may have given it to this beat, although the answer was
            # lost.
            self._return(holder)
            raise
        if acquired is None:
            self._clear()
            return False
        self._number, self._seen = 0, acquired.write
        self._entries = history.decode(acquired.history, self.key)
        # The store read its clock before the answer came, so this offset is too small by at most
        # the time that the answer took. Ticks can be late by that time, but never early. The first
        # ``record`` corrects the offset.
        self._offset = acquired.acquired_at - clock()
        self._started = acquired.acquired_at
        self._held = HeldLease(acquired.lease, asked_at, settings.heartbeat_interval)
        self.say_leads()
        return True

    def row(self) -> Row | None:
        """Return the row with the lease; ``None`` if no beat has ever led.

        :raises StoreError: the store is unavailable.
        """
        return self._store.peek(self.key)

    def load(self) -> dict[str, str]:
        """Return a dict that maps the key of each entry's row to the row's JSON.

        All rows are read in one statement.

        :raises StoreError: the store is unavailable.
        """
        return self._store.entries.load(self._prefix)

    def record(self, entries: Mapping[str, str]) -> None:
        """Store the states of entries and renew the lease, in one statement.

        :param entries: maps the name of each entry to the entry's state as JSON.
        :raises NotLeading: another beat leads, or this beat has handed over. Nothing was stored.
        :raises StoreError: the store is unavailable.
        """
        if self._held is None:
            raise NotLeading
        asked_at = clock()
        rows = {self._key_of(name): value for name, value in entries.items()}
        self._number += 1
        now = self._store.entries.record(self._held.lease, rows, self._number, self._seen)
        if now is None:
            self._lose()
        self._seen = self._number
        self._held.renewed(asked_at)
        # The store read its clock after the request was sent and before the answer came. These two
        # times bound the offset. The old offset is kept if it lies within the bounds.
        self._offset = min(max(self._offset, now - clock()), now - asked_at)

    def forget(self, names: Sequence[str]) -> None:
        """Remove the rows of the entries with these names.

        :raises NotLeading: another beat leads. Nothing was removed.
        :raises StoreError: the store is unavailable.
        """
        assert self._held is not None
        keys = [self._key_of(name) for name in names]
        self._number += 1
        if not self._store.entries.forget(self._held.lease, keys, self._number, self._seen):
            self._lose()
        self._seen = self._number

    def _key_of(self, name: str) -> str:
        """Return the key of an entry's row, as ASCII text.

        All entries are stored in one statement. A name that the database's encoding lacks would
        make that statement fail for all of them.
        """
        return row_key(self._prefix, storable(name))

    def resign(self, why: str) -> None:
        """Release the lease, so that another beat can lead at once.

        :param why: the reason, for the log.
        """
        held = self._held
        if held is None:
            return
        entry = history.Entry(
            task_id=None,
            generation=0,
            holder=held.lease.holder,
            fence=held.lease.fence,
            tick=None,
            outcome=Outcome.SUCCEEDED,
            error=None,
            started=self._started,
            finished=self.now().timestamp(),
        )
        document = history.append(self._entries, entry, self.runtime.settings.history)
        try:
            released = self._store.release(held.lease, Ended(Outcome.SUCCEEDED, document))
        except StoreError as error:
            logger.warning(
                "beat: the lease of %r could not be released, and is released later: %s",
                *(self.name, error),
            )
            self._held = None
            self._return(held.lease.holder)
            return
        self.give_up()
        ended = "gave back" if released else "had lost"
        self.say(f"beat {ended} the lead of {self.name!r}: {why}")

    def give_up(self) -> None:
        """Stop leading in this process, without a request to the store."""
        self._held = None
        self._clear()

    def _lose(self) -> NoReturn:
        self.give_up()
        self.say(f"beat lost the lead of {self.name!r}: its lease was taken over")
        raise NotLeading

    def say(self, what: str, level: int = logging.INFO) -> None:
        """Log a text, unless it is the text that this method logged last."""
        if what != self._logged:
            logger.log(level, "%s", what)
            self._logged = what

    def say_leads(self) -> None:
        """Log that this beat leads, unless that was the last text that :meth:`say` logged."""
        assert self._held is not None
        lease = self._held.lease
        self.say(f"beat leads {self.name!r} as {lease.holder}, fence {lease.fence}")

    @property
    def _store(self) -> Store:
        return self.runtime.sql

    def _return(self, holder: str) -> None:
        """Have this process release a lease that the store may have given to this beat.

        A thread of the process tries until the store answers.
        """
        slot, self._slot = self._slot, None
        self.runtime.unreleased.add(self._store, self.key, holder, slot)

    def _clear(self) -> None:
        slot, self._slot = self._slot, None
        self.runtime.holder_files.clear(slot)
