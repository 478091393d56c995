"""One beat's part in the question who leads: the beats' lease, and the store's time with it.

The lease is like any singleton's. What differs is who renews it: not a thread, but each record of
what was sent, and so the same loop that sends. A beat that hangs in a broker's silence stops
renewing, and another leads.

A leader goes by the store's clock, which all beats share, and by its own only for how much time has
passed; so a host whose clock is wrong does no harm.
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

PREFIX = "singleton-beat:"
#: Seconds between two looks of a beat that stands by.
STANDBY_POLL = 0.5


def key_of(name: str) -> str:
    """The key of the row of the beats with this name, in ASCII, so that each database has it."""
    return row_key(PREFIX, storable(name))


class NotLeading(Exception):
    """This beat may not send, or not before it has renewed its lease."""


class Leader:
    """What a beat knows of the leadership, and does for it.

    :raises ImproperlyConfigured: a setting is not allowed, or the store's URL cannot be used.
    """

    def __init__(self, app: Celery) -> None:
        self.runtime: Runtime = runtime_of(app)
        #: Where the lease is, without a password.
        self.store_url = shown_url(parse_url(self.runtime.settings.store_url))
        self.name = self.runtime.settings.beat_name
        self.key = key_of(self.name)
        self._prefix = f"{self.key}:"
        self._held: HeldLease | None = None
        self._slot: int | None = None
        #: The numbers of the last write under this lease, and of the last that was answered.
        self._number = self._seen = 0
        self._started = 0.0
        self._entries: tuple[history.Entry, ...] = ()
        #: The store's time is the clock's plus this.
        self._offset = 0.0
        self._logged = ""

    def check(self) -> None:
        """See that the store can be used, and that it may be that of several beats.

        :raises ImproperlyConfigured: it cannot be used; the message says what is missing.
        """
        try:
            self._store.check((self.runtime.settings.key_prefix, self._prefix))
        except StoreNotReady as error:
            raise ImproperlyConfigured(str(error)) from error
        except StoreError as error:
            logger.error("beat stands by until it reaches the store: %s", error)
        warn_of_single_host(self.runtime.app, self.runtime.settings.store_url)

    @property
    def leads(self) -> bool:
        """Whether this beat may send now."""
        return self._held is not None and self._held.remaining > 0

    @property
    def fence(self) -> int | None:
        """Of the lease that is held, trusted or not."""
        return self._held.lease.fence if self._held else None

    @property
    def renew_in(self) -> float:
        """Seconds until the lease is to be renewed; negative when that is overdue."""
        return self._held.renew_at - clock() if self._held else 0.0

    def now(self) -> datetime:
        """The store's time, while this beat leads."""
        return datetime.fromtimestamp(clock() + self._offset, UTC)

    def may_campaign(self) -> bool:
        """Whether nobody leads, as far as one can see without asking for the lease.

        :raises StoreError: it is out of reach.
        """
        row = self.row()
        if row is None or not row.held or free_holder(self.runtime, row.holder):
            return True
        self.say(f"beat stands by: {row.holder} leads {self.name!r}")
        return False

    def campaign(self) -> bool:
        """Ask for the lease; returns whether this beat leads now.

        :raises StoreError: it is out of reach; what it did is not known.
        """
        self.give_up()
        settings, store = self.runtime.settings, self._store
        holder = self.runtime.new_holder(f"celerybeat@{gethostname()}")
        self._slot = self.runtime.holder_files.note(HolderRecord(self.key, holder, 0))
        asked_at = clock()
        try:
            acquired = store.acquire(self.key, holder, settings.lease_ttl, None)
        except BaseException:
            # It may have taken the lease.
            self._return(holder)
            raise
        if acquired is None:
            self._clear()
            return False
        self._number, self._seen = 0, acquired.write
        self._entries = history.decode(acquired.history, self.key)
        # Not early, whatever the answer took; the first record makes it right.
        self._offset = acquired.acquired_at - clock()
        self._started = acquired.acquired_at
        self._held = HeldLease(acquired.lease, asked_at, settings.heartbeat_interval)
        self.say_leads()
        return True

    def row(self) -> Row | None:
        """The lease's row, if any beat has led yet.

        :raises StoreError: it is out of reach.
        """
        return self._store.peek(self.key)

    def load(self) -> dict[str, str]:
        """The rows of all entries, by key; one statement.

        :raises StoreError: it is out of reach.
        """
        return self._store.entries.load(self._prefix)

    def record(self, entries: Mapping[str, str]) -> None:
        """Store what entries have become, by name, and renew the lease; one statement.

        :raises NotLeading: somebody else leads, or this beat has handed over; nothing was stored.
        :raises StoreError: it is out of reach.
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
        # The store read its clock between the request and the answer: that much is known, and a
        # time that was right before stays as it is.
        self._offset = min(max(self._offset, now - clock()), now - asked_at)

    def forget(self, names: Sequence[str]) -> None:
        """Remove the rows of entries.

        :raises NotLeading: somebody else leads; nothing was removed.
        :raises StoreError: it is out of reach.
        """
        assert self._held is not None
        keys = [self._key_of(name) for name in names]
        self._number += 1
        if not self._store.entries.forget(self._held.lease, keys, self._number, self._seen):
            self._lose()
        self._seen = self._number

    def _key_of(self, name: str) -> str:
        """The key of an entry's row, in ASCII: one name must not keep all others' rows out."""
        return row_key(self._prefix, storable(name))

    def resign(self, why: str) -> None:
        """Give the lease back, so that another beat leads at once."""
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
            logger.warning("beat: the lead of %r is not given back yet: %s", self.name, error)
            self._held = None
            self._return(held.lease.holder)
            return
        self.give_up()
        ended = "gave back" if released else "had lost"
        self.say(f"beat {ended} the lead of {self.name!r}: {why}")

    def give_up(self) -> None:
        """Hold the lease no more, whatever the store says."""
        self._held = None
        self._clear()

    def _lose(self) -> NoReturn:
        self.give_up()
        self.say(f"beat lost the lead of {self.name!r}: its lease was taken over")
        raise NotLeading

    def say(self, what: str, level: int = logging.INFO) -> None:
        """Log what has changed, and not again what has not."""
        if what != self._logged:
            logger.log(level, "%s", what)
            self._logged = what

    def say_leads(self) -> None:
        """Log that it leads, if that is news: also after it has waited for something."""
        assert self._held is not None
        lease = self._held.lease
        self.say(f"beat leads {self.name!r} as {lease.holder}, fence {lease.fence}")

    @property
    def _store(self) -> Store:
        return self.runtime.sql

    def _return(self, holder: str) -> None:
        """Have the process give back a lease that this beat may hold."""
        slot, self._slot = self._slot, None
        self.runtime.unreleased.add(self._store, self.key, holder, slot)

    def _clear(self) -> None:
        slot, self._slot = self._slot, None
        self.runtime.holder_files.clear(slot)
