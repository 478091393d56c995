"""One run of a singleton's body, from the acquired lease to its release."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore, Retry
from sqlalchemy import Connection

from . import history
from .errors import HeartbeatFailed, SchemaDecodeFailed, SingletonError, StatePersistFailed
from .history import Outcome
from .in_place import in_place
from .lease import HeldLease, clock
from .quarantine import quarantine_key
from .state import NO_STATE, StateError
from .store.base import Acquired, Ended, NewValue, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from .delivery import Delivery

logger = logging.getLogger(__name__)

PERSIST_TRIES = 3

_current: ContextVar[Run | None] = ContextVar("celery_singleton_state_run", default=None)


def current_run(task: Any) -> Run | None:
    """The run of this task that the calling code is in, if it is in one."""
    run = _current.get()
    while run is not None and run.task is not task:
        run = run.outer
    return run


class Run:
    """A run that has acquired its lease.

    :param asked_at: :func:`~celery_singleton_state.lease.clock` before the lease was asked for.
    """

    def __init__(self, delivery: Delivery, acquired: Acquired, asked_at: float) -> None:
        self.task = delivery.task
        self.name = delivery.name
        self.request = delivery.request
        self.state: Any = None
        self.outer = _current.get()
        self.entries = history.decode(acquired.history, delivery.name)
        settings = delivery.runtime.settings
        self.held = HeldLease(acquired.lease, asked_at, settings.heartbeat_interval)
        self._delivery = delivery
        self._runtime = delivery.runtime
        self._codec = delivery.codec
        self._acquired = acquired
        self._asked_at = asked_at
        #: What the row is known to hold; ``None`` while a write's answer is unknown.
        self._stored: NewValue | None = NewValue(acquired.value, acquired.schema_version or 1)
        self._in_transaction = False
        self._leads = False

    def execute(self, args: Any, kwargs: Any) -> Any:
        """Load the state, run the body, save and release; returns what the body returned."""
        token = _current.set(self)
        try:
            result, new = self._body(args, kwargs)
            self.end(Outcome.SUCCEEDED, new=new)
            return result
        finally:
            try:
                self._runtime.heartbeat.drop(self.held)
                if self._leads:
                    self._lose_leadership()
            finally:
                _current.reset(token)

    def _body(self, args: Any, kwargs: Any) -> tuple[Any, NewValue | None]:
        try:
            self._runtime.heartbeat.hold(self.held)
            self._load()
            self._leads = True
            self.task.on_become_leader()
            return self.task.run(*args, **kwargs), self._changed_value()
        except BaseException as error:
            self._end_with(error)
            raise

    # -- what the body may do

    def checkpoint(self) -> None:
        """Save the state now, fenced, and prolong the lease."""
        self.need_state("checkpoint()")
        if self._in_transaction:
            raise RuntimeError(
                f"{self.name}: checkpoint() within transaction(), whose commit saves the state"
            )
        new = self._value()
        asked_at = clock()
        self._stored = None
        self._persist(lambda: self._runtime.store.save(self.held.lease, new))
        self.held.renewed(asked_at)
        self._stored = new

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction whose commit carries the body's rows and the fenced state, or neither."""
        self.need_state("transaction()")
        if self._in_transaction:
            raise RuntimeError(f"{self.name}: transaction() within transaction()")
        self._refuse_if_lost()
        before = self._value()
        self._in_transaction = True
        saved_at = None
        try:
            with self._runtime.store.transaction() as transaction:
                yield transaction.connection
                new = self._value()
                self._refuse_if_lost()
                self._stored = None
                asked_at = clock()
                saved_at = transaction.save(self.held.lease, new)
                if saved_at is None:
                    raise self._refused()
        except StoreError as error:
            if saved_at is None or not self._was_committed(saved_at):
                self._roll_back(before)
                raise StatePersistFailed(self.name, str(error)) from error
        except BaseException:
            self._roll_back(before)
            raise
        finally:
            self._in_transaction = False
        self.held.renewed(asked_at)
        self._stored = new

    def _roll_back(self, before: NewValue) -> None:
        """The state goes back with the rows: a body that goes on must not save it without them."""
        assert self._codec is not None
        self.state = self._codec.decode(before.value, before.schema_version)

    # -- its ends

    def end(
        self, outcome: Outcome, error: BaseException | None = None, new: NewValue | None = None
    ) -> None:
        """Release the lease with a note of how the run ended, and with a new value or without.

        :raises HeartbeatFailed: the lease was lost; nothing was written.
        :raises StatePersistFailed: the store is out of reach.
        """
        lease = self.held.lease
        self._runtime.heartbeat.drop(self.held)
        started = self._acquired.acquired_at
        entry = history.Entry(
            task_id=self.request.id,
            generation=self._delivery.generation,
            holder=lease.holder,
            fence=lease.fence,
            tick=None,
            outcome=outcome,
            error=history.describe(error) if error else None,
            started=started,
            finished=started + clock() - self._asked_at,
        )
        ended = Ended(outcome, history.append(self.entries, entry, self._runtime.settings.history))
        self._persist(
            lambda: self._runtime.store.release(lease, ended, new), recognised=self._has_ended
        )

    def give_back(self) -> None:
        """Release the lease of a message that turned out to be done: nothing hangs on it."""
        try:
            self.end(Outcome.DUPLICATE)
        except SingletonError as failure:
            logger.warning("singleton %s: a duplicate was not released: %s", self.name, failure)

    def _end_with(self, error: BaseException) -> None:
        """Release after an error, which is the one to be reported whatever happens here."""
        if self.held.lost:
            return
        outcome = Outcome.FAILED
        if isinstance(error, Retry):
            outcome = Outcome.RETRIED
        elif isinstance(error, Ignore):
            outcome = Outcome.SKIPPED
        try:
            self.end(outcome, error, self._value_after(error))
        except Exception as failure:
            logger.warning("singleton %s: not released after an error: %s", self.name, failure)

    def _value_after(self, error: BaseException) -> NewValue | None:
        wanted = self._delivery.options.persist_on_error
        if not wanted or self.state is None or not isinstance(error, Exception):
            return None
        try:
            return self._changed_value()
        except SchemaDecodeFailed as failure:
            logger.warning("singleton %s: not saved after an error: %s", self.name, failure)
            return None

    def _lose_leadership(self) -> None:
        try:
            self.task.on_lose_leadership()
        except Exception:
            logger.exception("singleton %s: on_lose_leadership() failed", self.name)

    # -- the state

    def _load(self) -> None:
        if self._codec is None:
            return
        try:
            if self._acquired.value == NO_STATE:
                self.state = self._codec.initial()
            else:
                self.state = self._decoded()
        except StateError as error:
            raise SchemaDecodeFailed(self.name, str(error)) from error

    def _decoded(self) -> Any:
        assert self._codec is not None
        found = self._acquired
        try:
            return self._codec.decode(found.value, found.schema_version)
        except StateError as error:
            if self._delivery.options.on_decode_error != "initial":
                raise
            key = quarantine_key(found.lease.key, found.value)

            def keep() -> bool:
                self._runtime.store.set_aside(key, found.value)
                return True

            self._persist(keep)
            logger.error("singleton %s: %s; kept under %s", self.name, error, key)
            return self._codec.initial()

    def _value(self) -> NewValue:
        assert self._codec is not None
        try:
            return NewValue(self._codec.encode(self.state), self._codec.version)
        except StateError as error:
            raise SchemaDecodeFailed(self.name, str(error)) from error

    def _changed_value(self) -> NewValue | None:
        """What is to be written, if it differs from what is there."""
        if self._codec is None:
            return None
        new = self._value()
        return None if new == self._stored else new

    def need_state(self, what: str) -> None:
        """Refuse what makes sense only with a state."""
        if self._codec is None:
            raise RuntimeError(f"{self.name}: {what} needs a state_schema")

    # -- the store

    def _persist(
        self, request: Callable[[], bool], recognised: Callable[[], bool] = lambda: False
    ) -> None:
        """Send a fenced write, with tries in place.

        :param recognised: asked when a repeated write is refused: whether that is because an
            earlier one, whose answer was lost, took effect.
        """
        self._refuse_if_lost()
        uncertain = False

        def attempt() -> bool:
            nonlocal uncertain
            try:
                return request() or (uncertain and recognised())
            except StoreUnavailable:
                uncertain = True
                raise

        try:
            written = in_place(attempt, PERSIST_TRIES, self.held.trusted_until)
        except StoreError as error:
            raise StatePersistFailed(self.name, str(error)) from error
        if not written:
            raise self._refused()

    def _has_ended(self) -> bool:
        row = self._runtime.store.peek(self.held.lease.key)
        lease = self.held.lease
        entries = history.decode(row.history if row else None, self.name)
        return history.written_by(entries, lease.fence, lease.holder)

    def _was_committed(self, saved_at: float) -> bool:
        lease = self.held.lease
        try:
            row = in_place(
                lambda: self._runtime.store.peek(lease.key), PERSIST_TRIES, self.held.trusted_until
            )
        except StoreError:
            return False
        return row is not None and row.fence == lease.fence and row.updated_at == saved_at

    def _refuse_if_lost(self) -> None:
        if self.held.lost:
            raise self._refused()

    def _refused(self) -> HeartbeatFailed:
        why = self.held.lost or "the write was refused"
        self.held.lost = why
        return HeartbeatFailed(
            self.name, f"the lease with fence {self.held.lease.fence} is lost: {why}"
        )
