"""The interface of a store: its methods, and the plain values that they take and return.

:mod:`celery_singleton_state.lease` explains the protocol of the lease.
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
    """A request to the store failed. The error's text says why."""


class StoreUnavailable(StoreError):
    """The store is unavailable: it refused the request, closed the connection or did not answer.

    The request may have taken effect or not. The same request may succeed later.
    """


class StoreRefusesValue(StoreError):
    """The store can never hold the value of a request. The request changed nothing.

    The value is too large or out of range, a check of the table refuses it, or the database's
    encoding lacks one of the value's characters. The same request would fail again.

    :param is_of_text: whether the reason is a character that the encoding lacks.
    """

    def __init__(self, text: str, is_of_text: bool = False) -> None:
        super().__init__(text)
        self.is_of_text = is_of_text


class StoreNotReady(StoreError):
    """The store's table is missing or belongs to an older release of this package.

    The error's text names the command that creates or upgrades the table.
    """


class StoreMisconfigured(StoreNotReady):
    """The database is set up wrongly, and creating the table would not correct this.

    A missing privilege is an example. The error's text says what the operator has to do.
    """


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease that was acquired. Every later request of its holder names this lease.

    :param key: the key of the singleton's row.
    :param holder: the holder's name, ``nodename:pid:nonce``. Each acquisition has a new name.
    :param fence: a number that grows with each acquisition of the key. The fence is the store's
        clock in milliseconds since 1970. If the row's last fence or last rank is not smaller than
        this number, the fence is 1 more than the larger one of the two.
    :param ttl: seconds after which the lease expires, unless the holder renews it.
    """

    key: str
    holder: str
    fence: int
    ttl: float


@dataclass(frozen=True, slots=True)
class Acquired:
    """A lease, and the contents of the row at its acquisition.

    :param value: the state as JSON; the JSON ``null`` if the singleton has no state.
    :param schema_version: the version of the state's schema; ``None`` if there is no state.
    :param history: the record of the last runs, as JSON; ``None`` if no run has ended yet.
    :param acquired_at: the time of the acquisition, in seconds since the epoch by the store's
        clock.
    :param write: the row's write number after the acquisition: 0, or :data:`TAKEN_OVER` if this
        acquisition took over another holder's expired lease. The run's first write names this
        number as :attr:`Write.seen`.
    :param ticks_done: the record of the ticks that are done, as JSON; see
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
    """A state that is to be stored: its JSON, and the version of its schema."""

    value: str
    schema_version: int


@dataclass(frozen=True, slots=True)
class Write:
    """A request to write a state under a lease.

    The store carries out the write only if the row's write number is at least ``seen`` and at most
    ``number``. If the row's write number is larger than ``number``, a newer write has taken effect,
    so this request is late. If the row's write number is smaller than ``seen``, the database has
    lost writes that it had confirmed.

    :param number: the number of this write: 1 for the first write under a lease, 2 for the second.
        A number is never used again for another state, even if the write failed or was rolled
        back.
    :param seen: the number of the newest write that the store has confirmed to this run. Before the
        first confirmation: :attr:`Acquired.write`.
    """

    number: int
    seen: int
    new: NewValue


@dataclass(frozen=True, slots=True)
class Queued:
    """The queued or running message of a singleton, as ``enqueue_once`` reads it from the row.

    :param number: the row's queue number. Three requests raise it by one: a claim, which notes a
        message as queued, an acquisition, and a dequeueing.
    :param task_id: the task id of the queued message. If no message is queued: the task id of the
        running message, or ``None``.
    :param running: whether ``task_id`` belongs to the running message.
    """

    number: int
    task_id: str | None
    running: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a run, as its release records it in the row.

    :param outcome: an :class:`~celery_singleton_state.history.Outcome`.
    :param history: the whole new history, as JSON.
    :param hold: the hold period in seconds, counted from the acquisition. Until its end the lease
        is kept, even after the run. 0: the lease is free at once.
    :param ticks_done: the new record of the ticks that are done, as JSON; ``None`` leaves the old
        record in the row.
    """

    outcome: str
    history: str
    hold: float = 0.0
    ticks_done: str | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """The store's answer to a save that took effect.

    :param handoff_to: the task id of the message that has asked the holder to hand over; ``None``
        if no message has.
    """

    handoff_to: str | None


@dataclass(frozen=True, slots=True)
class Released:
    """The store's answer to a release that took effect.

    :param wanted: the pending run in the row, as JSON. The caller has to send it now. ``None`` if
        there is no pending run.
    """

    wanted: str | None


@dataclass(frozen=True, slots=True)
class Listed:
    """A singleton's row without its state, for lists of many singletons.

    :param task: the task's name; ``None`` if the row has none, for example because the row was
        written before the table had this column.
    :param updated_at, acquired_at, last_finished_at: seconds since the epoch by the store's clock.
    :param holder: ``None`` if no run holds the lease, and during a hold period.
    :param task_id: the task id of the run that holds the lease.
    :param expires_in: seconds until the lease expires or the hold period ends; negative if the
        lease has expired; ``None`` if the lease is free.
    :param history: the record of the last runs, as JSON. :meth:`Leases.list` leaves the history
        out (``None``) if the last run succeeded.
    :param read_at: the time at which the row was read, by the store's clock.
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
        """Whether the lease is taken now, because a run holds it or because of a hold period."""
        return self.expires_in is not None and self.expires_in > 0

    @property
    def in_hold_period(self) -> bool:
        """Whether the lease is kept in its hold period after a run that has ended."""
        return self.held and self.holder is None


@dataclass(frozen=True, slots=True)
class Row(Listed):
    """A singleton's whole row, with its state.

    :param value: the state as JSON; the JSON ``null`` if the singleton has no state.
    :param wanted: the pending run, as JSON; ``None`` if there is none.
    :param write: the number of the last write under the present lease.
    :param handoff_to: the task id of the message that has asked the holder to hand over; ``None``
        if no message has.
    :param newest: the rank of the message that asked last for a handoff; 0 if no message has.
        Ranks order the messages of a singleton from old to new.
    :param newest_sent: the time at which the newest message was sent; ``None`` if this time is not
        known. The newest message is the last one that acquired the lease or asked for a handoff.
        See :mod:`celery_singleton_state.message.place`.
    :param ticks_done: the record of the ticks that are done, as JSON.
    :param queue: the queue number, which the next claim has to name.
    :param queued_task_id: the task id of the message that counts as queued; ``None`` if no message
        does.
    :param queued_in: seconds until that message no longer counts as queued.
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
        """The largest rank in the row. Ranks order the messages of a singleton from old to new.

        The rank of a message that acquires the lease is the lease's fence. A message that asks for
        a handoff writes its own rank to the row.
        """
        return max(self.fence, self.newest)

    @property
    def next_rank(self) -> int:
        """A rank for a new request: larger than each rank in the row, and at least the store's
        clock in milliseconds since 1970.
        """
        return max(self.rank + 1, int(self.read_at * 1000))


@dataclass(frozen=True, slots=True)
class SeenTicks:
    """The columns of a singleton's row that a beat reads while it waits for a tick to end.

    :param held: whether the lease is held now, by a run or in a hold period.
    :param task_id: the task id of the message that the holder runs; ``None`` in a hold period and
        if the lease is free.
    :param ticks_done: the record of the ticks that are done, as JSON.
    """

    held: bool
    task_id: str | None
    ticks_done: str | None


#: The row's write number directly after a takeover. A takeover acquires an expired lease that its
#: holder did not release. After every other acquisition the write number is 0.
TAKEN_OVER = -1

Seen = TypeVar("Seen", bound=Listed)


def seen(row: Seen) -> Seen:
    """Return a row that was read from the store, with its values in their usual form.

    Values of a wrong type are converted. The names and ids of tasks are unescaped. After the end of
    a hold period ``expires_in`` becomes ``None``.
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
    """Return an error's class and text in one line, for logs and for the texts of other errors."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class RowRequests(Protocol):
    """The requests that processes other than the lease's holder can make on a singleton's row.

    Several methods take the :class:`Row` that the caller has read. They change nothing if the row
    has got another fence or holder since then.
    """

    def request_handoff(
        self, row: Row, handoff_to: str, rank: int | None = None, sent: str | None = None
    ) -> bool:
        """Ask the lease's present holder to hand over.

        :param row: the row that the caller has read.
        :param handoff_to: the task id of the message that asks for the handoff.
        :param rank: the rank of this message, larger than the ranks of all earlier messages.
            ``None``: :attr:`Row.next_rank`.
        :param sent: the time at which this message was sent; ``None`` if this time is not known.
        :returns: false if the lease has another holder by now, or if another message of this rank
            or a larger rank has asked. So a late request cannot stop the holder in favour of an
            older message. A request that is repeated succeeds again.
        """

    def release_early(self, row: Row) -> bool:
        """End a hold period early.

        :param row: the row that the caller has read.
        :returns: false if the hold period in ``row`` has ended already, or if another run has
            acquired the lease since the row was read.
        """

    def request_run(self, row: Row, pending_run: str) -> bool:
        """Note a pending run in the row, which the lease's holder sends when it releases the lease.

        The pending run replaces an earlier one.

        :param row: the row that the caller has read.
        :param pending_run: the pending run, as JSON.
        :returns: false if the lease has another holder by now, or if the stored pending run is not
            the one in ``row``. So a late request cannot replace a newer pending run.
        """

    def wanted(self, key: str) -> str | None:
        """Return the pending run in the row, as JSON, or ``None``.

        A holder calls this method if the answer to its release was lost.
        """

    def pending_run_sent(self, key: str, pending_run: str) -> None:
        """Remove a pending run from the row because it was sent. A newer pending run stays."""

    def queued(self, key: str) -> Queued:
        """Return the queued or running message, and the queue number for :meth:`claim`."""

    def claim(
        self,
        key: str,
        task_id: str,
        life: float,
        number: int,
        first: bool = False,
        task: str | None = None,
    ) -> bool:
        """Note a message as queued, so that ``enqueue_once`` sends no other message.

        The message replaces another message that the row has as queued.

        :param life: seconds for which the message counts as queued.
        :param number: the queue number that :meth:`queued` returned.
        :param first: true if this is the caller's first attempt, false if the caller repeats the
            claim because its answer was lost.
        :param task: the task's name, for a new row.
        :returns: false if the row has another queue number by now. A repeated claim succeeds again
            while the row has this claim and its life has not ended. A first attempt never succeeds
            in this way: if the row has an equal claim, another caller with the same task id made
            it.
        """

    def expect(self, tasks: Mapping[str, str]) -> None:
        """Insert an empty row for each singleton that is expected to run and has no row yet.

        :param tasks: a mapping from each singleton's key to the name of its task.
        """

    def put(self, key: str, row: Row | None, new: NewValue, task: str | None = None) -> bool:
        """Store a state while no run holds the lease, for example by an operator's command.

        :param row: the row that the caller has read; ``None`` if there was no row.
        :param task: the task's name, for a new row.
        :returns: false if the lease is held, or if the row has changed since the caller read it.
        """

    def dequeue(self, key: str, task_id: str, task: str | None = None) -> None:
        """Note that a message is no longer queued, so that claims that arrive late are refused.

        An acquisition of the lease dequeues its message as well, so a run does not call this
        method.

        :param task: the task's name, for a new row.
        """


class Entries(Protocol):
    """The part of a store that keeps the entries of a beat schedule, each in a row of its own.

    Only the leading beat writes these rows.
    """

    def load(self, prefix: str) -> dict[str, str]:
        """Return a dict from key to value of all entries whose keys begin with a prefix.

        A row whose key is the prefix itself is left out.
        """

    def record(
        self, lease: Lease, entries: Mapping[str, str], number: int, seen: int
    ) -> float | None:
        """Store the values of entries and renew the leader's lease, in one transaction.

        An expired lease is renewed as well, unless another beat has acquired it.

        :param entries: a mapping from each entry's key to its value. It may be empty.
        :param number, seen: the numbers of this write under the leader's lease, as in
            :class:`Write`.
        :returns: the store's time in seconds since the epoch; ``None`` if the write was refused.
        """

    def forget(self, lease: Lease, keys: Sequence[str], number: int, seen: int) -> bool:
        """Remove the rows of entries, if the leader still has its lease.

        :param number, seen: the numbers of this write under the leader's lease, as in
            :class:`Write`.
        :returns: false if the write was refused.
        """


class Leases(Protocol):
    """The interface of a store that keeps leases. Every method may raise :exc:`StoreError`."""

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
        """Acquire a free or expired lease, and load the singleton's row.

        The same holder may repeat the request, because the answer may have been lost. The repeated
        request only makes sure that the lease lives for at least ``ttl`` seconds from now.

        :param ttl: the lease's life in seconds.
        :param task_id: the task id of the message that asks for the lease.
        :param rank: the rank of this message, by which the messages of a singleton are ordered from
            old to new; 0 if this message has no rank. A message with a rank does not get the lease
            if the row has a larger :attr:`Row.rank`, because a newer message has come.
        :param sent: the time at which this message was sent, as
            :func:`~celery_singleton_state.message.place.moment` returns it. A message without a
            rank does not get the lease if the row's newest message was sent later. The store
            compares the two times only if both come from the same host's clock.
        :param task: the task's name, for the row.
        :returns: ``None`` if the lease is held, or if the message is not the newest one.
        """

    def renew(self, leases: Sequence[Lease]) -> dict[str, str | None]:
        """Renew leases: each expires ``ttl`` seconds from now.

        A request for a single lease waits if another transaction has locked the row. If its key is
        missing in the answer, the lease is lost. A request for several leases may skip locked rows.
        So if a key is missing in that answer, the lease may still be held.

        :param leases: leases with different keys, because the answer identifies a lease by its key.
        :returns: a dict from the key of each renewed lease to the task id of the message that asks
            the holder to hand over, or to ``None``.
        """

    def release(self, lease: Lease, ended: Ended, write: Write | None = None) -> Released | None:
        """Release a lease, record how its run ended, and store a new state if one is given.

        :returns: ``None`` if the store refused the release, because the lease has another holder by
            now or the write is late.
        """

    def give_back(self, key: str, holder: str) -> Released | None:
        """Release a lease, identified by its holder's name alone, and record no run.

        A caller whose acquisition was not answered needs this method, because the caller does not
        know the fence, and does not know whether it got the lease. A late request changes nothing,
        because the name of a holder is never used again.

        :returns: ``None`` if this holder does not hold the lease.
        """

    def peek(self, key: str) -> Row | None:
        """Return the row of a singleton, or ``None`` if it has no row."""

    def list(self, prefix: str, also: str = "") -> Sequence[Listed]:
        """Return the rows of all singletons whose keys begin with a prefix, ordered by key.

        :param also: the key of one more singleton, which need not begin with the prefix.
        """

    def contents(
        self, keys: Sequence[str], values: bool
    ) -> dict[str, tuple[str | None, str | None]]:
        """Return a dict that maps the keys of some singletons to pairs: the history and the state.

        :param values: whether to read the states. If false, each state is ``None``.
        """

    def ticks(self, keys: Sequence[str]) -> dict[str, SeenTicks]:
        """Return a dict that maps the keys of some singletons to :class:`SeenTicks`. A key without
        a row is left out.
        """

    def unused(self, prefix: str, older_than: float) -> Mapping[str, str | None]:
        """Return the unused singletons whose keys begin with a prefix.

        The result maps the singletons' keys, in order, to the names of their tasks.

        A singleton is unused if all of these conditions are true:

        - Its lease has no holder, not even a holder whose lease has expired.
        - It is in no hold period.
        - Its row has no request for a handoff, no pending run and no queued message.
        - For ``older_than`` seconds by the store's clock, its state has not changed and no run has
          ended.
        """

    def prune(self, keys: Sequence[str], older_than: float) -> Sequence[str]:
        """Remove the rows of unused singletons, and return their keys.

        The conditions of :meth:`unused` are evaluated again when a row is removed, so a singleton
        whose run has begun meanwhile keeps its row. Rows that another transaction has locked may be
        skipped. The next acquisition of a removed key inserts a new row, whose fence is the store's
        clock in milliseconds since 1970.

        :param keys: the keys of the singletons that may be removed.
        """

    @property
    def requests(self) -> RowRequests:
        """The requests that processes other than the lease's holder can make on a row."""

    def check(self, prefixes: Sequence[str] = (KEY_PREFIX,)) -> None:
        """Check that the store can be used.

        :param prefixes: the prefixes of the keys that will be used.
        :raises StoreError: the store cannot be used. The error's text says what is missing.
        """

    def close(self) -> None:
        """Close all connections to the store."""


class Store(Leases, Protocol):
    """The interface of a store that keeps leases and states.

    Every method may raise :exc:`StoreError`.
    """

    def save(self, lease: Lease, write: Write) -> Saved | None:
        """Store a state during a run, and renew the lease.

        An expired lease may still save, unless another holder has acquired it.

        :returns: ``None`` if the store refused the save, because the lease has another holder by
            now or the write is late.
        """

    def written(self, lease: Lease, number: int) -> bool | None:
        """Return whether a write took effect, although its COMMIT was not answered.

        The store locks the row to read it, so the answer waits for a COMMIT that is still in
        progress.

        :param number: the number of the write.
        :returns: ``None`` if ``lease`` is no longer held, so that the answer is not known.
        """

    def set_aside(self, key: str, value: str) -> None:
        """Store a copy of a state that cannot be decoded, under a separate key."""

    def transaction(self) -> AbstractContextManager[FencedTransaction]:
        """Open a transaction on the store's database, which can include a save of the state."""

    @property
    def entries(self) -> Entries:
        """The rows of the entries of a beat schedule."""


class FencedTransaction(Protocol):
    """An open transaction on the store's database, for the caller's own statements and then one
    save of the state under the lease.
    """

    connection: Any

    def save(self, lease: Lease, write: Write) -> Saved | None:
        """Store a state as the transaction's last statement.

        If the answer to the COMMIT is lost, :meth:`Store.written` finds out whether the state was
        stored.

        :returns: ``None`` if the store refused the save, because the lease has another holder by
            now or the write is late.
        """

    def abandon(self) -> None:
        """Give up the transaction without waiting for the store, which rolls it back by itself."""
