"""A run's state, and its fenced writes to the row."""

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

#: The largest number of immediate tries of one write.
TRIES = 3

T = TypeVar("T")


def not_written(name: str, error: StoreError) -> SingletonError:
    """Make the error of a write that the store refused or did not answer.

    It is ``SchemaDecodeFailed`` if the store cannot hold the value, else ``StatePersistFailed``.

    :param name: the singleton's name.
    """
    is_of_value = isinstance(error, StoreRefusesValue)
    return (SchemaDecodeFailed if is_of_value else StatePersistFailed)(name, str(error))


class FencedWriter:
    """Numbers a run's writes, and sends each with the run's fence and holder.

    :param name: the singleton's name, for errors.
    :param held: the run's lease.
    :param seen: the row's write number when the lease was acquired.
    :param emit: emits an event when the store refuses a write.
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
        #: Whether the outcome of every transaction so far is known. If not, the run writes no
        #: state.
        self.may_write = True

    def next_write(self, new: NewValue) -> Write:
        """Return the write of a new state, with the run's next write number."""
        self._number += 1
        return Write(self._number, self._seen, new)

    def answered(self, write: Write) -> None:
        """Note that the store has answered that it carried out a write."""
        self._seen = write.number

    def write(
        self,
        operation: str,
        request: Callable[[], T | None],
        recognised: Callable[[], bool] = lambda: False,
    ) -> T | None:
        """Send a write, with immediate retries while the lease may be trusted.

        :param operation: the name of the operation, for the event of a refusal.
        :param request: sends the write and returns the store's answer, which is false if the store
            refused the write.
        :param recognised: called if a repeated write is refused. It returns whether the refusal
            only means that an earlier try, whose answer was lost, took effect. Left out: every
            refusal means that the lease is lost.
        :returns: the store's answer. It is false only if the store refused a repeated write because
            an earlier try had taken effect. Every other refusal raises an error.
        :raises HeartbeatFailed: the lease was lost before, or the store's refusal shows that it is.
        :raises SchemaDecodeFailed: the store cannot hold the value; nothing was written.
        :raises StatePersistFailed: the store is unavailable; a try may still have taken effect.
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
        """Return whether a release took effect, after its answer was lost.

        :param own: the entry that the release would have left in the row's history.
        :raises StatePersistFailed: the row's history cannot tell any more.
        """
        row = self._store.peek(self._held.lease.key)
        entries = history.decode(row.history if row else None, self._name)
        ended = history.has_ended(entries, own, row.run_count if row else 0)
        if ended is None:
            raise StatePersistFailed(
                self._name,
                "whether the run was saved is not known: the store's answer was lost, and more "
                "runs have ended since than the row's history holds",
            )
        return ended

    def was_committed(self, write: Write) -> bool:
        """Return whether a COMMIT that was interrupted or not answered took effect.

        If the store answers that the lease is not held any more, the lease is lost. If the store
        does not answer while the lease may be trusted, the outcome stays unknown: the result is
        false, and the run writes no state from then on.
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
        """Ask the store whether it carried out a write; ``None`` if the lease is not held any more.

        :raises StoreUnavailable: the store did not answer. Every other error of the store becomes
            a ``StoreUnavailable``, too, and is retried: the store has just served this process.
        """
        try:
            return self._store.written(self._held.lease, write.number)
        except StoreError as error:
            raise StoreUnavailable(str(error)) from error

    def refuse_if_undecided(self) -> None:
        """Refuse a write after a transaction whose outcome is unknown.

        :raises StatePersistFailed: there was such a transaction, so the state in memory may differ
            from the state in the row.
        """
        if not self.may_write:
            raise StatePersistFailed(
                self._name,
                "whether a transaction was committed is not known, so this run saves nothing more; "
                "the next run starts from the state in the row",
            )

    def refuse_if_lost(self) -> None:
        """Refuse to continue with a lost lease, without a request to the store.

        :raises HeartbeatFailed: the lease is known to be lost.
        """
        if self._held.lost:
            raise self.failure()

    def refused(self, operation: str) -> HeartbeatFailed:
        """Handle the store's refusal of a write: mark the lease as lost, and make the error."""
        self._held.lost = self._held.lost or "the write was refused"
        self._emit(WriteRefused, operation=operation)
        return self.failure()

    def failure(self) -> HeartbeatFailed:
        """Make the error of a run whose lease is lost."""
        return HeartbeatFailed(
            self._name,
            f"the lease with fence {self._held.lease.fence} is lost: {self._held.lost}",
        )


class RunState:
    """A run's state, and the last state that the row is known to hold.

    :param name: the singleton's name, for errors.
    :param codec: encodes and decodes the state; ``None`` without a schema: the state is ``None``.
    :param acquired: the row's content when the lease was acquired.
    """

    def __init__(self, name: str, codec: Codec[Any] | None, acquired: Acquired) -> None:
        self.value: Any = None
        #: The state that the row is known to hold; ``None`` while a write has no answer yet.
        self.stored: NewValue | None = NewValue(acquired.value, acquired.schema_version or 1)
        #: The length of the JSON that the row held at the acquisition; and its schema version,
        #: ``None`` if the row has none.
        self.found = len(acquired.value), acquired.schema_version
        self._name = name
        self._codec = codec
        self._key = acquired.lease.key

    def need(self, what: str) -> Codec[Any]:
        """Return the codec for a call that needs a state; refuse the call if there is no state.

        :param what: the name of the call, for the error.
        :raises RuntimeError: the singleton has no state.
        """
        if self._codec is None:
            raise RuntimeError(f"{self._name}: {what} needs a state_schema, an option of the task")
        return self._codec

    def load(self, set_aside: Callable[[str, str], None] | None) -> None:
        """Decode the row's value, or make the initial state if the row has none.

        :param set_aside: called with a key and a value that cannot be decoded. It stores the value
            under the key, so that the run can start with the initial state. ``None``: such a value
            is an error.
        :raises SchemaDecodeFailed: the value cannot be decoded, or there is no initial state.
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
                logger.error(
                    "singleton %s: starts with its initial state, because its value cannot be "
                    "decoded: %s; the value is kept under the key %s",
                    self._name,
                    error,
                    key,
                )
                self.value = self._codec.initial()
        except StateError as error:
            raise SchemaDecodeFailed(self._name, str(error)) from error

    def document(self) -> NewValue:
        """Encode the state for the store.

        :raises SchemaDecodeFailed: the state does not fit its schema.
        """
        codec = self._codec or self.need("state")
        try:
            return NewValue(codec.encode(self.value), codec.version)
        except StateError as error:
            raise SchemaDecodeFailed(self._name, str(error)) from error

    def changed(self) -> NewValue | None:
        """Encode the state if it differs from the state in the row; else return ``None``.

        :raises SchemaDecodeFailed: the state does not fit its schema.
        """
        if self._codec is None:
            return None
        new = self.document()
        return None if new == self.stored else new

    def roll_back(self, before: NewValue) -> None:
        """Set the state back after a transaction was rolled back.

        The body's rows were rolled back, too. A body that catches the error and continues must not
        save a state that does not match them.

        :param before: the state when the transaction began.
        """
        codec = self.need("state")
        # Set the state to None first. A time limit may interrupt the decoding, and then no wrong
        # state can be saved.
        self.value = None
        self.value = codec.decode(before.value, before.schema_version)


def _quarantine_key(key: str, value: str) -> str:
    """Return the key under which to keep a value that cannot be decoded.

    The key depends on the row and the value only, so the same value is kept once.
    """
    digest = hashlib.sha256(value.encode()).hexdigest()[:12]
    return row_key(f"quarantine:{digest}:", key)
