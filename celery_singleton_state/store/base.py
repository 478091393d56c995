"""What every store does: five verbs over leases, plain values in and out.

The lease's protocol is explained in :mod:`celery_singleton_state.lease.lease`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from celery_singleton_state.keys import KEY_PREFIX
from celery_singleton_state.text.storable import restored

from .odd_values import odd_values


class StoreError(Exception):
    """The store did not do what was asked; the message says why, for people."""


class StoreUnavailable(StoreError):
    """The store refused, broke off or did not answer. The same request may succeed later.

    Whether the request took effect is not known.
    """


class StoreRefusesValue(StoreError):
    """The store cannot hold what it was given: its encoding lacks a character, it is too large, out
    of range, or refused by a check. Nothing was changed, and the same request fails again.

    :param is_of_text: whether a text has a character that the store's encoding lacks.
    """

    def __init__(self, text: str, is_of_text: bool = False) -> None:
        super().__init__(text)
        self.is_of_text = is_of_text


class StoreNotReady(StoreError):
    """The store's table is missing or of an older release; the message names the command."""


class StoreMisconfigured(StoreNotReady):
    """The database is not set up as it must be, which making the table does not mend; the message
    says what is to be done.
    """


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run, as its holder names it in every later request.

    :param key: the row's key.
    :param holder: ``nodename:pid:nonce``, new for each acquisition.
    :param fence: a number that only grows: at each acquisition the larger of the last fence + 1
        and the store's clock in milliseconds since 1970.
    :param ttl: seconds that it lives without a renewal.
    """

    key: str
    holder: str
    fence: int
    ttl: float


@dataclass(frozen=True, slots=True)
class Acquired:
    """A lease and what the row held when it was acquired.

    :param value: the state as JSON, ``null`` when there is none.
    :param acquired_at: seconds since the epoch by the store's clock.
    :param write: the row's write number, which is the first :attr:`Write.seen` of the run: 0, or
        :data:`TAKEN_OVER` if the lease of another holder had run out.
    :param ticks_done: what is known of ticks, as JSON; see
        :mod:`~celery_singleton_state.ticks_done`.
    """

    lease: Lease
    value: str
    schema_version: int | None
    history: str | None
    acquired_at: float
    write: int
    ticks_done: str | None = None


@dataclass(frozen=True, slots=True)
class NewValue:
    """A state to be stored, as JSON, and the version of its schema."""

    value: str
    schema_version: int


@dataclass(frozen=True, slots=True)
class Write:
    """One write of a state within a lease.

    The store carries it out if the row's write number is at least ``seen`` and at most ``number``.
    A larger one means that a newer write was carried out, so this one is late; a smaller one that
    the database has lost writes that it had answered.

    :param number: 1 for the first write of a lease, and one more for each further one. A number
        belongs to one content for ever, also if that write failed or was rolled back.
    :param seen: the number of the newest write whose answer has come, or :attr:`Acquired.write`.
    """

    number: int
    seen: int
    new: NewValue


@dataclass(frozen=True, slots=True)
class Queued:
    """What ``enqueue_once`` finds.

    :param number: the queue's number, which each claim, acquisition and dequeueing raises by one.
    :param task_id: of the message that is queued; else of the one that is running, if there is one.
    :param running: whether that message is running.
    """

    number: int
    task_id: str | None
    running: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended, for the row.

    :param history: the whole new history, as JSON.
    :param hold: seconds from its acquisition that the lease is kept, though the run is over.
    :param ticks_done: what is known of ticks from now on, as JSON; ``None``: as before.
    """

    outcome: str
    history: str
    hold: float = 0.0
    ticks_done: str | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """Answer to a save.

    :param handoff_to: who asks the holder to hand over, if anybody does.
    """

    handoff_to: str | None


@dataclass(frozen=True, slots=True)
class Released:
    """Answer to a release.

    :param wanted: the wish for one more run that is in the row, as JSON; to be granted now.
    """

    wanted: str | None


@dataclass(frozen=True, slots=True)
class Listed:
    """A singleton's row, as it can be seen from outside, in a list of many.

    :param holder: ``None`` when nobody holds the lease, also in a hold period after the last run.
    :param task: the task's name; ``None`` if no run has written it, for example in a row that was
        made before there was this column.
    :param expires_in: seconds until the lease or its hold period ends, negative when the lease has
        run out; ``None`` when the singleton is free.
    :param updated_at, acquired_at, last_finished_at: seconds since the epoch by the store's
        clock; ``read_at`` is when it was asked.
    :param history: as JSON; in a list left out where the last run succeeded.
    """

    key: str
    task: str | None
    schema_version: int | None
    updated_at: float | None
    fence: int
    holder: str | None
    task_id: str | None
    acquired_at: float | None
    expires_in: float | None
    run_count: int
    last_outcome: str | None
    last_finished_at: float | None
    history: str | None
    read_at: float = field(compare=False)

    @property
    def held(self) -> bool:
        """Whether nobody can acquire the lease now: a run has it, or a hold period keeps it."""
        return self.expires_in is not None and self.expires_in > 0

    @property
    def in_hold_period(self) -> bool:
        """Whether the run is over and the lease kept for a while."""
        return self.held and self.holder is None


@dataclass(frozen=True, slots=True)
class Row(Listed):
    """The whole row.

    :param value: the state as JSON, ``null`` when there is none.
    :param wanted: the wish for one more run, as JSON, if there is one.
    :param write: the number of the last write.
    :param handoff_to: who asked the holder to hand over, if anybody did.
    :param newest: the rank of the message that asked last; 0 if none did.
    :param newest_sent: when the message was sent that acquired or asked last, if that is known; see
        :mod:`celery_singleton_state.message.place`.
    :param ticks_done: what is known of ticks, as JSON.
    :param queue: the queue's number, for a claim.
    :param queued_task_id: the message that counts as queued, if one does.
    :param queued_in: seconds until it does not count any more.
    """

    value: str
    wanted: str | None
    write: int
    handoff_to: str | None
    newest: int
    newest_sent: str | None
    ticks_done: str | None = None
    queue: int = field(default=0, compare=False)
    queued_task_id: str | None = field(default=None, compare=False)
    queued_in: float | None = field(default=None, compare=False)

    @property
    def rank(self) -> int:
        """The rank of the message that acquired or asked last; an acquisition's is its fence."""
        return max(self.fence, self.newest)

    @property
    def next_rank(self) -> int:
        """A rank above all that are in the row, and not below the store's clock in milliseconds."""
        return max(self.rank + 1, int(self.read_at * 1000))


@dataclass(frozen=True, slots=True)
class SeenTicks:
    """What a singleton's row says to a beat that waits for the end of a tick.

    :param held: whether somebody holds the lease now.
    :param task_id: of the message that the holder runs, if there is one.
    :param ticks_done: what is known of ticks, as JSON.
    """

    held: bool
    task_id: str | None
    ticks_done: str | None


#: The write number after an acquisition that took over the lease of a holder which did not give it
#: back. It tells such a takeover from an orderly handoff.
TAKEN_OVER = -1

Seen = TypeVar("Seen", bound=Listed)


def seen(row: Seen) -> Seen:
    """A row as it was read: with values of the kinds that its fields have, with tasks and their ids
    as they were given, and without a hold period that is over.
    """
    if odd := odd_values(row):
        row = replace(row, **odd)
    names = ("task", "task_id", "queued_task_id", "handoff_to")
    found = {name: getattr(row, name, None) for name in names}
    escaped = {name: restored(text) for name, text in found.items() if text and "\\" in text}
    if escaped:
        row = replace(row, **escaped)
    if row.holder is None and row.expires_in is not None and not row.held:
        return replace(row, expires_in=None)
    return row


def one_line(error: BaseException) -> str:
    """What an error is and says, for people."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class RowRequests(Protocol):
    """What others than a lease's holder can ask of a row."""

    def request_handoff(
        self, row: Row, handoff_to: str, rank: int | None = None, sent: str | None = None
    ) -> bool:
        """Ask the holder that was seen to hand over.

        :param rank: of the message that asks, larger than that of all messages before it.
            ``None``: :attr:`Row.next_rank`.
        :param sent: when that message was sent.
        :returns: false if it is not the holder any more, or if a message of this rank or a larger
            one has asked: a late request must not stop the holder in favour of an older message.
            The same request, repeated, succeeds again.
        """

    def release_early(self, row: Row) -> bool:
        """End the hold period that was seen; false when there is none, or another one, by now."""

    def request_run(self, row: Row, pending_run: str) -> bool:
        """Have the holder that was seen send one more run when it releases, by this wish alone.

        :returns: false if it is not the holder any more, or if the row has another wish by now
            than when it was seen: a late request must not replace a newer wish.
        """

    def wanted(self, key: str) -> str | None:
        """The wish that is in the row, for a release whose answer was lost."""

    def pending_run_sent(self, key: str, pending_run: str) -> None:
        """The run that was wanted was sent; a newer wish stays."""

    def queued(self, key: str) -> Queued:
        """The message that is queued or running, and the queue's number for :meth:`claim`."""

    def claim(
        self,
        key: str,
        task_id: str,
        life: float,
        number: int,
        first: bool = False,
        task: str | None = None,
    ) -> bool:
        """Note a message as queued, for so many seconds, in place of any other.

        :param number: of the queue, as it was seen.
        :param first: whether the caller has not sent this claim before.
        :param task: the task's name, for a new row.
        :returns: false if the queue has another number by now. A claim that is repeated while it
            still counts succeeds again; one that is sent first does not, because the equal claim
            in the row is that of another caller with the same task id.
        """

    def expect(self, tasks: Mapping[str, str]) -> None:
        """Note that these singletons are to run, as rows that no run has changed yet.

        :param tasks: the task's name by the singleton's key.
        """

    def put(self, key: str, row: Row | None, new: NewValue, task: str | None = None) -> bool:
        """Store a state from outside a run.

        :param row: as it was seen; ``None`` if there was none.
        :param task: the task's name, for a new row.
        :returns: false if a lease is held, or if the row has changed since it was seen.
        """

    def dequeue(self, key: str, task_id: str, task: str | None = None) -> None:
        """Note that a message is not queued any more, and refuse a claim for it that is late.

        :param task: the task's name, for a new row.

        (An acquisition for it does so by itself.)
        """


class Entries(Protocol):
    """The rows of a schedule's entries, which only their leader writes."""

    def load(self, prefix: str) -> dict[str, str]:
        """The values of all rows whose keys begin with a prefix and go on, by key."""

    def record(
        self, lease: Lease, entries: Mapping[str, str], number: int, seen: int
    ) -> float | None:
        """Store values by key, if there are any, and prolong the leader's lease.

        All or nothing. That the lease ran out does not matter as long as nobody took it since.

        :param number, seen: of this write within the leader's lease, as in :class:`Write`.
        :returns: the store's time in seconds since the epoch; ``None`` if the write was refused.
        """

    def forget(self, lease: Lease, keys: Sequence[str], number: int, seen: int) -> bool:
        """Remove rows, as a write of the leader's like :meth:`record`; false if it was refused."""


class Leases(Protocol):
    """Where leases live. Every verb may raise :exc:`StoreError`."""

    def acquire(
        self,
        key: str,
        holder: str,
        ttl: float,
        task_id: str | None,
        rank: int = 0,
        sent: str | None = None,
        task: str | None = None,
    ) -> Acquired | None:
        """Take a free or expired lease and load its row; ``None`` when somebody holds it.

        :param rank: of a message that was ranked before. It does not get the lease if the row has
            a larger :attr:`Row.rank`, that of a newer message. 0: it was not ranked.
        :param sent: when the message was sent, as
            :func:`~celery_singleton_state.message.place.moment` tells it. A message that was not
            ranked does not get the lease if the newest message of the row was sent later by the
            same clock.
        :param task: the task's name, for the row.

        Asked again by the same holder it changes nothing, except that the lease lives for at least
        ``ttl`` from now. So a request whose answer was lost can be repeated, and a late one does
        no harm.
        """

    def renew(self, leases: Sequence[Lease]) -> dict[str, str | None]:
        """Prolong leases by their life from now; returns the keys of those that it prolonged,
        and for each who asks its holder to hand over, if anybody does.

        Asked for several, it may pass over rows that somebody has locked at this moment. Asked
        for one alone, it waits, and a key that is not returned is no longer held. No two of the
        leases have the same key: the answer could not tell them apart.
        """

    def release(self, lease: Lease, ended: Ended, write: Write | None = None) -> Released | None:
        """Give a lease back, with a new state or without; ``None`` when that is refused."""

    def give_back(self, key: str, holder: str) -> Released | None:
        """Give a lease back whose fence may be unknown, and which may never have been taken.

        Nothing is noted of a run. A holder's name is never used again, so a late request is
        refused.

        :returns: ``None`` if this is not the holder.
        """

    def peek(self, key: str) -> Row | None:
        """The row of a singleton, if it has one."""

    def list(self, prefix: str, also: str = "") -> Sequence[Listed]:
        """The rows of all singletons whose keys begin with a prefix, and one more, by key."""

    def contents(
        self, keys: Sequence[str], values: bool
    ) -> dict[str, tuple[str | None, str | None]]:
        """The histories of some singletons by key, and their values if they are wanted."""

    def ticks(self, keys: Sequence[str]) -> dict[str, SeenTicks]:
        """What is known of the ticks of some singletons, by key; of those that have a row."""

    def unused(self, prefix: str, older_than: float) -> Mapping[str, str | None]:
        """The keys, in order, of singletons that begin with a prefix and that nobody uses, each
        with the name of its task.

        Nobody holds the lease, not even late; nobody asked the holder to hand over, or wants one
        more run; no message is queued; and neither the state has changed nor a run ended for so
        many seconds, by the store's clock.
        """

    def prune(self, keys: Sequence[str], older_than: float) -> Sequence[str]:
        """Remove the rows of those of the keys that nobody uses; returns them.

        What :meth:`unused` asks is asked again of each row as it is removed: a run that begins
        meanwhile keeps its row. It may pass over rows that somebody has locked at this moment.
        The next acquisition of a key that was removed makes a new row, whose fence is the store's
        clock.
        """

    @property
    def requests(self) -> RowRequests:
        """What others than a lease's holder can ask of a row."""

    def check(self, prefixes: Sequence[str] = (KEY_PREFIX,)) -> None:
        """See that the store can be used; :exc:`StoreError` says what is missing.

        :param prefixes: what the keys begin with that it is used for.
        """

    def close(self) -> None:
        """Close all connections."""


class Store(Leases, Protocol):
    """Where leases and states live. Every verb may raise :exc:`StoreError`."""

    def save(self, lease: Lease, write: Write) -> Saved | None:
        """Store a state and prolong the lease; ``None`` when that is refused.

        That the lease ran out does not matter as long as nobody took it since.
        """

    def written(self, lease: Lease, number: int) -> bool | None:
        """Whether the write with this number took effect, after a COMMIT that was not answered.

        The row is read under its lock, so that a COMMIT which is still under way has ended.

        :returns: ``None`` if the lease is not held any more.
        """

    def set_aside(self, key: str, value: str) -> None:
        """Keep a value that cannot be decoded under a key of its own."""

    def transaction(self) -> AbstractContextManager[FencedTransaction]:
        """A transaction on the store's database that can carry a fenced save."""

    @property
    def entries(self) -> Entries:
        """The rows of a schedule's entries."""


class FencedTransaction(Protocol):
    """An open transaction: the caller's own statements and one fenced save."""

    connection: Any

    def save(self, lease: Lease, write: Write) -> Saved | None:
        """Store a state within the transaction, last; ``None`` when that is refused.

        :meth:`Store.written` tells whether it was committed when the answer to that was lost.
        """

    def abandon(self) -> None:
        """Leave the transaction to be rolled back without waiting for an answer of the store."""
