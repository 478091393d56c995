"""What a run loads and writes: its state, and the writes to the row in the name of its lease."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

from celery_singleton_state import history
from celery_singleton_state.errors import (
    HeartbeatFailed,
    SchemaDecodeFailed,
    SingletonError,
    StatePersistFailed,
)
from celery_singleton_state.hooks import WriteRefused
from celery_singleton_state.keys import row_key
from celery_singleton_state.lease.lease import HeldLease, clock, retry_immediately
from celery_singleton_state.state.codec import NO_STATE, Codec, StateError
from celery_singleton_state.store.base import (
    Acquired,
    NewValue,
    Store,
    StoreError,
    StoreRefusesValue,
    StoreUnavailable,
    Write,
)
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)

TRIES = 3

T = TypeVar("T")


def not_written(name: str, error: StoreError) -> SingletonError:
    """The error of a singleton whose write the store did not carry out, as far as is known."""
    is_of_value = isinstance(error, StoreRefusesValue)
    return (SchemaDecodeFailed if is_of_value else StatePersistFailed)(name, str(error))


class FencedWriter:
    """Numbers a run's writes and sends each with its fence and holder.

    :param name: the singleton's name, for its errors.
    :param seen: the row's write number when the lease was acquired.
    :param tell: told of a write that the store refused.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        held: HeldLease,
        seen: int,
        emit: Callable[..., None],
    ) -> None:
        self._name = name
        self._store = store
        self._held = held
        self._emit = emit
        self._number = 0
        self._seen = seen
        #: Whether the outcome of every transaction is known.
        self.may_write = True

    def next_write(self, new: NewValue) -> Write:
        """Give a new state the next number."""
        self._number += 1
        return Write(self._number, self._seen, new)

    def answered(self, write: Write) -> None:
        """Note that a write was carried out."""
        self._seen = write.number

    def write(
        self,
        operation: str,
        request: Callable[[], T | None],
        recognised: Callable[[], bool] = lambda: False,
    ) -> T | None:
        """Send a write, with tries in place and never past the lease's life.

        :param operation: what it is, for those who look on.
        :param request: sends it; false when it was refused.
        :param recognised: asked when a repeated write is refused: whether that is because an
            earlier one, whose answer was lost, took effect.
        :returns: the store's answer; ``None`` where it was lost.
        :raises HeartbeatFailed: the lease was lost, before or by this refusal.
        :raises SchemaDecodeFailed: the store cannot hold the value; nothing was written.
        :raises StatePersistFailed: the store is unavailable; whether an earlier try took
            effect is not known.
        """
        if self._held.lost:
            raise self.failure()
        uncertain = False

        def attempt() -> T | None:
            nonlocal uncertain
            try:
                answer = request()
                if not answer and not (uncertain and recognised()):
                    raise self.refused(operation)
                return answer
            except StoreUnavailable:
                uncertain = True
                raise

        try:
            return retry_immediately(attempt, TRIES, clock() + self._held.remaining)
        except StoreError as error:
            raise not_written(self._name, error) from error

    def has_ended(self, own: history.Entry) -> bool:
        """Whether a release took effect whose answer was lost.

        :param own: the entry that the release would have left in the row's history.
        :raises StatePersistFailed: that cannot be known any more.
        """
        row = self._store.peek(self._held.lease.key)
        entries = history.decode(row.history if row else None, self._name)
        ended = history.has_ended(entries, own, row.run_count if row else 0)
        if ended is None:
            raise StatePersistFailed(
                self._name,
                "whether the run was saved is not known: the answer was lost, and more runs have "
                "ended since than the history holds",
            )
        return ended

    def was_committed(self, write: Write) -> bool:
        """Whether a transaction was committed whose COMMIT was not answered, or was interrupted.

        If the store says that the lease is not held any more, the lease is lost. If the store
        does not say anything while the lease is trusted, the outcome stays unknown, and the run
        writes no state from here on.
        """
        self.may_write = False
        if self._held.lost:
            return False
        try:
            until = clock() + self._held.remaining
            committed = retry_immediately(lambda: self._is_written(write), float("inf"), until)
        except StoreError:
            return False
        self.may_write = True
        if committed is None:
            self.refused("transaction")
        elif committed:
            self.answered(write)
        return bool(committed)

    def _is_written(self, write: Write) -> bool | None:
        """:raises StoreUnavailable: the store does not say, for whatever reason: a moment ago it
        let this process in.
        """
        try:
            return self._store.written(self._held.lease, write.number)
        except StoreError as error:
            raise StoreUnavailable(str(error)) from error

    def refuse_if_undecided(self) -> None:
        """Refuse to write after a transaction whose outcome is unknown.

        :raises StatePersistFailed: what the run holds in memory and what the row holds may differ.
        """
        if not self.may_write:
            raise StatePersistFailed(
                self._name,
                "whether a transaction was committed is not known, so this run saves nothing "
                "any more; the next one starts from what the row holds",
            )

    def refuse_if_lost(self) -> None:
        """:raises HeartbeatFailed: the lease is known to be lost; the store is not asked."""
        if self._held.lost:
            raise self.failure()

    def refused(self, operation: str) -> HeartbeatFailed:
        """The error of a write that the store refused; the lease is lost from here on."""
        self._held.lost = self._held.lost or "the write was refused"
        self._emit(WriteRefused, operation=operation)
        return self.failure()

    def failure(self) -> HeartbeatFailed:
        """The error of a run whose lease is lost."""
        return HeartbeatFailed(
            self._name,
            f"the lease with fence {self._held.lease.fence} is lost: {self._held.lost}",
        )


class RunState:
    """A run's state; of a singleton without a schema it is always ``None``.

    :param name: the singleton's name, for its errors.
    """

    def __init__(self, name: str, codec: Codec[Any] | None, acquired: Acquired) -> None:
        self.value: Any = None
        #: What the row is known to hold; ``None`` while a write's answer is unknown.
        self.stored: NewValue | None = NewValue(acquired.value, acquired.schema_version or 1)
        #: How long the JSON is that the row held, and of which version, if it has one.
        self.found = len(acquired.value), acquired.schema_version
        self._name = name
        self._codec = codec
        self._key = acquired.lease.key

    def need(self, what: str) -> Codec[Any]:
        """:raises RuntimeError: the singleton has no state, which ``what`` needs."""
        if self._codec is None:
            raise RuntimeError(f"{self._name}: {what} needs a state_schema")
        return self._codec

    def load(self, set_aside: Callable[[str, str], None] | None) -> None:
        """Decode what the row held, or make the initial state, where there is a schema.

        :param set_aside: keeps a value that cannot be decoded under a key, so that the run can
            start anew; ``None``: that is an error.
        :raises SchemaDecodeFailed: there is no way to a state.
        """
        found = self.stored
        if self._codec is None or found is None:
            return
        try:
            if found.value == NO_STATE:
                self.value = self._codec.initial()
                return
            try:
                self.value = self._codec.decode(found.value, found.schema_version)
            except StateError as error:
                if set_aside is None:
                    raise
                key = _quarantine_key(self._key, found.value)
                set_aside(key, found.value)
                logger.error("singleton %s: %s; kept under %s", self._name, error, key)
                self.value = self._codec.initial()
        except StateError as error:
            raise SchemaDecodeFailed(self._name, str(error)) from error

    def document(self) -> NewValue:
        """The state as it is to be stored.

        :raises SchemaDecodeFailed: it does not fit its schema.
        """
        codec = self._codec or self.need("state")
        try:
            return NewValue(codec.encode(self.value), codec.version)
        except StateError as error:
            raise SchemaDecodeFailed(self._name, str(error)) from error

    def changed(self) -> NewValue | None:
        """The same, if it differs from what the row holds."""
        if self._codec is None:
            return None
        new = self.document()
        return None if new == self.stored else new

    def roll_back(self, before: NewValue) -> None:
        """Go back, with the rows: a body that goes on must not save a state without them."""
        codec = self.need("state")
        # If a time limit interrupts the decoding, there is no state that could be saved.
        self.value = None
        self.value = codec.decode(before.value, before.schema_version)


def _quarantine_key(key: str, value: str) -> str:
    """The key under which a value of this row is kept that cannot be decoded: always the same."""
    digest = hashlib.sha256(value.encode()).hexdigest()[:12]
    return row_key(f"quarantine:{digest}:", key)
