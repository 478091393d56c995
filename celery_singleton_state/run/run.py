"""One run of a singleton, from the acquired lease to its release."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from celery.exceptions import Ignore
from sqlalchemy import Connection

from celery_singleton_state import history
from celery_singleton_state.errors import (
    HeartbeatFailed,
    SchemaDecodeFailed,
    SingletonError,
    StatePersistFailed,
)
from celery_singleton_state.history import DIED, Outcome
from celery_singleton_state.hooks import Acquired as BecameLeader
from celery_singleton_state.hooks import Lost, Released, StateLoaded, StateSaved, TookOver
from celery_singleton_state.lease.lease import HeldLease, clock
from celery_singleton_state.message.coalesce import send_pending_run
from celery_singleton_state.message.delivery import Delivery
from celery_singleton_state.message.poison import refuse_poison
from celery_singleton_state.message.results import keep
from celery_singleton_state.message.reused_ids import forget_result
from celery_singleton_state.store.base import (
    TAKEN_OVER,
    Acquired,
    Ended,
    NewValue,
    Saved,
    StoreError,
    Write,
)
from celery_singleton_state.text.visible import logger_of

from .current import ACTIVE, CURRENT
from .ending import is_for_good, is_of_lease, outcome_of, ticks_after
from .interrupt import Body
from .writes import FencedWriter, RunState, not_written

logger = logger_of(__name__)


class ReplacedEagerly(Ignore):
    """Raised in the body of an eager call that replaces itself, to end the run first.

    The replacement is called after the run, because a replacement by the same singleton would find
    the lease taken.

    :param signature: the Celery signature of the replacement.
    """

    def __init__(self, signature: Any) -> None:
        super().__init__(signature)
        self.signature = signature


class Run:
    """One run of a singleton, which has acquired its lease.

    :param delivery: the message that the run is for.
    :param acquired: the lease, and what the row held when it was acquired.
    :param asked_at: :data:`~celery_singleton_state.lease.lease.clock` just before the request for
        the lease was sent.
    """

    def __init__(self, delivery: Delivery, acquired: Acquired, asked_at: float) -> None:
        self.task = delivery.task
        self.name = delivery.name
        self.request = delivery.request
        self.outer = CURRENT.get()
        self.entries = history.decode(acquired.history, delivery.name)
        #: Whether no message follows with this run's task id: neither a retry nor a replacement.
        self.is_final = True
        #: Whether this run's tick continues in the message that replaces the run.
        self.tick_continues = False
        #: Whether the body has replaced itself; and whether the body is sending the replacement at
        #: this moment.
        self.is_replaced = self.is_replacing = False
        runtime = delivery.runtime
        self.held = HeldLease(acquired.lease, asked_at, runtime.settings.heartbeat_interval)
        self.body = Body(delivery.name)
        self._delivery = delivery
        self._store = delivery.store
        self._heartbeat = delivery.heartbeat
        self.state = RunState(delivery.name, delivery.codec, acquired)
        self._writer = FencedWriter(
            delivery.name, self._store, self.held, acquired.write, delivery.emit
        )
        #: Whether the store has answered that the lease is released.
        self.given_back = False
        self._acquired_at = acquired.acquired_at
        self._ticks_done = acquired.ticks_done
        self._took_over = acquired.write == TAKEN_OVER
        self._asked_at = asked_at
        self._in_transaction = False
        #: A lock that is held while the state is written. A write must be answered before the next
        #: one gets its number, and a body can have several threads that write.
        self._writing = threading.RLock()
        #: Whether the body has ended; and whether the whole run has ended. After its body, a run
        #: still saves the state and releases the lease.
        self._is_ending = self.is_over = False
        self._pid = os.getpid()
        self._leads = False
        #: A lock that is held while ``on_lose_leadership()`` runs.
        self._stopping = threading.Lock()
        #: A lock that makes sure that the run's end is emitted once, as lost or as released. The
        #: first thread that emits the end acquires the lock, and no thread releases it.
        self._end_emitted = threading.Lock()

    def execute(self, body: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Load the state, run the body, save and release; return the body's result."""
        token = CURRENT.set(self)
        ACTIVE.add(self)
        self.held.owner = self
        try:
            self._emit_begin()
            result, new = self._body(body, args, kwargs)
            self._delivery.earlier.result = result
            kept = keep(self._delivery, result) if self._delivery.is_message else None
            self.end(Outcome.SUCCEEDED, new=new, result=kept)
            return result
        finally:
            try:
                if self._pid == os.getpid():
                    if not self.given_back:
                        self._heartbeat.drop(self.held)
                    if self.held.lost:
                        self._emit_lost(self.held.lost)
                    self._stop_leading()
            finally:
                CURRENT.reset(token)
                ACTIVE.discard(self)
                # Mark the run as over, because a thread with a copy of the context can outlive the
                # run.
                self.is_over = True
                self._delivery.place.handoff_to = self.held.handoff_to
                # Clear the lease's owner, which is this run: the cycle of references would keep the
                # run in memory until the garbage collector runs.
                self.held.owner = None
                # Free the state, which can be large. Code that keeps an error of the body keeps the
                # error's traceback, and with it this run.
                self.state.value = self.state.stored = None

    def _body(
        self, body: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, NewValue | None]:
        try:
            self._heartbeat.hold(self.held)
            if self._delivery.is_message:
                # Check the lease after this call: the result backend can be slow, and the lease can
                # be lost meanwhile.
                forget_result(self._delivery)
                self._writer.refuse_if_lost()
            self._load()
            self._leads = True
            self.task.on_become_leader()
            result = self.body.call(body, args, kwargs)
            if self._in_transaction:
                raise RuntimeError(
                    f"{self.name}: the body ended within transaction(), which another thread may "
                    "still be in; make the body wait for that thread"
                )
            if not self._writer.may_write:
                self._writer.refuse_if_undecided()
            return result, self.state.changed()
        except BaseException as error:
            self._end_with(error)
            raise

    def _load(self) -> None:
        if self._delivery.codec is None:
            return
        size, version = self.state.found
        self._delivery.emit(StateLoaded, size=size, schema_version=version)
        starts_anew = self._delivery.options.on_decode_error == "initial"
        self.state.load(self._set_aside if starts_anew else None)

    def _set_aside(self, key: str, value: str) -> None:
        def keep() -> bool:
            self._store.set_aside(key, value)
            return True

        self._writer.write("quarantine", keep)

    # -- called by the heartbeat, in its threads

    def lost(self, why: str) -> None:
        """Handle the loss of the lease, as ``on_lease_lost`` says.

        Interrupt the body, or call ``on_lose_leadership()`` in a new thread while the body runs.
        """
        self._emit_lost(why)
        if self._delivery.options.on_lease_lost == "interrupt":
            self.body.interrupt(f"the lease with fence {self.held.lease.fence} is lost: {why}")
        else:
            threading.Thread(target=self._stop_leading_beside, daemon=True).start()

    def handoff_requested(self, handoff_to: str) -> None:
        """Interrupt the body if a message asks for the lease and ``on_lease_lost`` allows it.

        :param handoff_to: the task id of that message.
        """
        if self._delivery.options.on_lease_lost == "interrupt":
            self.body.interrupt(_handoff_detail(handoff_to))

    def _stop_leading_beside(self) -> None:
        CURRENT.set(self)
        self._stop_leading()

    def _stop_leading(self) -> None:
        """Call ``on_lose_leadership()``, once; a second caller waits until that call is done."""
        with self._stopping:
            if not self._leads:
                return
            self._leads = False
            try:
                self.task.on_lose_leadership()
            except Exception:
                logger.exception("singleton %s: on_lose_leadership() failed", self.name)

    # -- events for the hooks

    def _emit_begin(self) -> None:
        lease, emit = self.held.lease, self._delivery.emit
        how = None
        if self._took_over:
            how = "expired"
        elif self.entries and self.entries[-1].outcome == Outcome.LOST:
            how = "died" if self.entries[-1].error == DIED else "handoff"
        if how:
            emit(TookOver, holder=lease.holder, fence=lease.fence, how=how)
        emit(BecameLeader, holder=lease.holder, fence=lease.fence)

    def _emit_saved(self, operation: str, new: NewValue | None) -> None:
        """Emit that a state was saved; emit nothing if there was no new state."""
        if new is not None:
            self._delivery.emit(StateSaved, operation=operation, size=len(new.value))

    def _emit_lost(self, why: str) -> None:
        if self._end_emitted.acquire(blocking=False):
            lease = self.held.lease
            self._delivery.emit(
                Lost,
                holder=lease.holder,
                fence=lease.fence,
                why=why,
                seconds=clock() - self._asked_at,
            )

    def _emit_end(self, outcome: Outcome, error: str | None) -> None:
        """Emit that the run has ended; emit nothing if the loss of its lease was emitted before."""
        if self._end_emitted.acquire(blocking=False):
            lease = self.held.lease
            self._delivery.emit(
                Released,
                holder=lease.holder,
                fence=lease.fence,
                outcome=outcome,
                seconds=clock() - self._asked_at,
                error=error,
                given_back=self.given_back,
            )

    # -- called by the body

    def checkpoint(self) -> None:
        """Save the state now, fenced, and renew the lease."""
        self._refuse_elsewhere("checkpoint()")
        self.state.need("checkpoint()")
        with self._writing:
            self._refuse_ended("checkpoint()")
            saved = self._checkpoint()
        self._hand_over(saved)

    def _checkpoint(self) -> Saved | None:
        if self._in_transaction:
            raise RuntimeError(
                f"{self.name}: checkpoint() within transaction(); leave it out, because the "
                "transaction's commit saves the state"
            )
        self._writer.refuse_if_undecided()
        new = self.state.document()
        write = self._writer.next_write(new)
        asked_at = clock()
        self.state.stored = None
        saved = self._writer.write("checkpoint", lambda: self._store.save(self.held.lease, write))
        self._writer.answered(write)
        self.held.renewed(asked_at)
        self.state.stored = new
        self._emit_saved("checkpoint", new)
        return saved

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Surround the code in which the body sends its replacement and then raises ``Ignore``.

        The state is saved first, because the replacement starts from it, perhaps on another worker
        and before this run has ended. If the save fails, nothing is sent.
        """
        self._refuse_elsewhere("replace()")
        if self._in_transaction:
            raise RuntimeError(f"{self.name}: replace() within transaction(); call it after that")
        self._writer.refuse_if_lost()
        self.refuse_if_handoff_requested()
        if self.state.changed() is not None:
            self.checkpoint()
        self.is_replacing = True
        try:
            yield
        except Ignore:
            self.is_replaced, self.is_final = True, False
            raise
        finally:
            self.is_replacing = False

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a transaction that commits the body's rows together with the fenced state."""
        self.state.need("transaction()")
        self._refuse_elsewhere("transaction()")
        with self._writing:
            self._refuse_ended("transaction()")
            if self._in_transaction:
                raise RuntimeError(f"{self.name}: transaction() within transaction()")
            self._in_transaction = True
        try:
            with self._committing() as connection:
                yield connection
        finally:
            self._in_transaction = False
        self.refuse_if_handoff_requested()

    @contextmanager
    def _committing(self) -> Iterator[Connection]:
        self._writer.refuse_if_lost()
        self._writer.refuse_if_undecided()
        before = self.state.document()
        write = saved = None
        # This ``ExitStack`` holds the lock `_writing` from the save until the commit is answered.
        with ExitStack() as writing:
            try:
                with self._store.transaction() as transaction:
                    try:
                        yield transaction.connection
                    except BaseException:
                        if self.held.lost:
                            # A run without its lease must end soon, so do not wait for a rollback.
                            transaction.abandon()
                        raise
                    self._refuse_elsewhere("transaction()")
                    # Check for the body's end before the lock is taken, too. A run that is ending
                    # holds the lock while its release waits for the row, which this transaction may
                    # have locked.
                    self._refuse_ended("transaction()")
                    writing.enter_context(self._writing)
                    self._refuse_ended("transaction()")
                    write = self._writer.next_write(self.state.document())
                    self._writer.refuse_if_lost()
                    self.state.stored = None
                    asked_at = clock()
                    saved = transaction.save(self.held.lease, write)
                    if saved is None:
                        raise self._writer.refused("transaction")
                self._writer.answered(write)
            except BaseException as error:
                # If the save was not answered, COMMIT was never sent. If the save was answered, the
                # COMMIT may have been carried out.
                if write is None or saved is None or not self._writer.was_committed(write):
                    self.state.roll_back(before)
                    if isinstance(error, StoreError):
                        raise self._not_committed(error) from error
                    raise
                self._committed(write, asked_at)
                if not isinstance(error, StoreError):
                    raise
            else:
                self._committed(write, asked_at)
            self._note_handoff_request(saved)

    def _committed(self, write: Write, asked_at: float) -> None:
        self.held.renewed(asked_at)
        self.state.stored = write.new
        self._emit_saved("transaction", write.new)

    def _not_committed(self, error: StoreError) -> SingletonError:
        """Make the error of a transaction that was rolled back, or whose outcome is unknown."""
        if self.held.lost:
            return self._writer.failure()
        return not_written(self.name, error)

    def _hand_over(self, saved: Saved | None) -> None:
        """End the run after a save whose answer says that a message asks for the lease.

        :raises HeartbeatFailed: a message asks for the lease; the state is saved.
        """
        self._note_handoff_request(saved)
        self.refuse_if_handoff_requested()

    def _note_handoff_request(self, saved: Saved | None) -> None:
        if saved is not None and saved.handoff_to is not None:
            self.held.handoff_to = saved.handoff_to

    def refuse_if_handoff_requested(self) -> None:
        """End the run if a message has asked for its lease.

        :raises HeartbeatFailed: a message has asked for the lease.
        """
        if self.held.handoff_to is not None:
            raise HeartbeatFailed(self.name, _handoff_detail(self.held.handoff_to))

    @property
    def headers(self) -> dict[str, Any]:
        """The package's headers for a retry of the run's message."""
        return self._delivery.resent

    @property
    def is_here(self) -> bool:
        """Whether this process is the run's own, and not a child that the body forked."""
        return self._pid == os.getpid()

    def _refuse_elsewhere(self, what: str) -> None:
        """Refuse a call in a child that the body forked.

        :param what: the name of the call, for the error.
        :raises RuntimeError: this process is such a child.
        """
        if not self.is_here:
            raise RuntimeError(
                f"{self.name}: {what} in process {os.getpid()}, which the body forked; the run and "
                f"its lease belong to process {self._pid}: send it the data, and call {what} there"
            )

    def _refuse_ended(self, what: str) -> None:
        """Refuse a call after the end of the body, from a thread that outlives it.

        :param what: the name of the call, for the error.
        :raises RuntimeError: the body has ended.
        """
        if self._is_ending:
            raise RuntimeError(
                f"{self.name}: {what} is available only while its body runs: the run has ended"
            )

    # -- the end of the run

    def end(
        self,
        outcome: Outcome,
        error: BaseException | None = None,
        new: NewValue | None = None,
        result: history.Kept | None = None,
    ) -> None:
        """Release the lease, record the run's outcome, and save a new state if there is one.

        :param outcome: how the run ended.
        :param error: the error that ended it; ``None`` if there is none.
        :param new: the state to save; ``None`` if it did not change or must not be saved.
        :param result: the run's result, kept in the row for a later copy of the message.
        :raises HeartbeatFailed: the lease was lost; nothing was written.
        :raises SchemaDecodeFailed: the store cannot hold the new state; the lease is released
            without it.
        :raises StatePersistFailed: the store is unavailable.
        """
        if self._pid != os.getpid():
            return  # in a child that the body forked: only the parent may end the run
        text = history.describe(error) if error else None
        entry = self._entry(outcome, text, result)
        self._is_ending = True
        try:
            with self._writing:
                self._release(entry, new)
        except StatePersistFailed as failure:
            if error is None:
                outcome, text = Outcome.FAILED, history.describe(failure)
            self._emit_end(outcome, text)
            raise
        except HeartbeatFailed:
            raise
        except SchemaDecodeFailed as refused:
            if new is None:
                self._emit_end(outcome, text)
                raise
            self._end_without(outcome, error, refused)
            return
        except BaseException as interruption:
            self._find_out_end(entry, new, interruption)
            raise
        if new is not None:
            self._emit_saved("save", new)
        self._emit_end(outcome, text)

    def _end_without(
        self, outcome: Outcome, error: BaseException | None, refused: SchemaDecodeFailed
    ) -> None:
        """Release the lease without a new state that the store cannot hold.

        The row keeps its old state.

        :param outcome, error: how the run ended.
        :param refused: the store's refusal.
        :raises SchemaDecodeFailed: the refusal, if no other error ended the run.
        """
        if error is None:
            self.is_final = self.is_final and is_for_good(refused, self._delivery)
            try:
                self.end(Outcome.FAILED, refused)
            except SingletonError as failure:
                # Do not raise this failure, because it would retry the message: the body would run
                # again, and end with the state that the store cannot hold.
                _warn_not_released(self.name, failure)
            raise refused
        _warn_not_saved(self.name, refused)
        self.end(outcome, error)

    def _find_out_end(
        self, entry: history.Entry, new: NewValue | None, interruption: BaseException
    ) -> None:
        """Find out whether an interrupted release took effect, and emit the run's end accordingly.

        :param entry: the entry that the release would have left in the row's history.
        :param new: the state that the release would have saved.
        :param interruption: what interrupted the release, a time limit for example.
        """
        try:
            self.given_back = self._writer.has_ended(entry)
        except (StoreError, StatePersistFailed):
            self.given_back = False
        if self.given_back:
            send_pending_run(self.task.app, self._store, self.held.lease.key, None, self.request.id)
            self._emit_saved("save", new)
            self._emit_end(Outcome(entry.outcome), entry.error)
        else:
            self._emit_end(Outcome.FAILED, history.describe(interruption))

    def _entry(
        self, outcome: Outcome, error: str | None, result: history.Kept | None = None
    ) -> history.Entry:
        lease = self.held.lease
        return history.Entry(
            task_id=self.request.id,
            generation=self._delivery.generation,
            holder=lease.holder,
            fence=lease.fence,
            tick=self._delivery.tick,
            outcome=outcome,
            error=error,
            started=self._acquired_at,
            finished=self._acquired_at + clock() - self._asked_at,
            final=self.is_final,
            sent=self._delivery.sent,
            result=result,
        )

    def _release(self, entry: history.Entry, new: NewValue | None) -> None:
        lease = self.held.lease
        self._heartbeat.drop(self.held)
        limit = self._delivery.runtime.settings.history
        hold = self._delivery.options.hold_at_least or 0.0
        continues = entry.outcome != Outcome.SUCCEEDED or self.is_replaced
        if continues or hold <= entry.finished - entry.started:
            hold = 0.0
        document = history.append(self.entries, entry, limit)
        ended = Ended(
            entry.outcome, document, hold, self._ticks_after(entry) if entry.tick else None
        )
        write = self._writer.next_write(new) if new else None
        released = self._writer.write(
            "save" if new else "release",
            partial(self._store.release, lease, ended, write),
            recognised=lambda: self._writer.has_ended(entry),
        )
        self.given_back = True
        if released is None or released.wanted:
            send_pending_run(self.task.app, self._store, lease.key, released, self.request.id)

    def _ticks_after(self, entry: history.Entry) -> str | None:
        """The row's new record of ended ticks; ``None`` if the run does not change it."""
        handoff_requested = self.held.handoff_to is not None
        return ticks_after(
            self._delivery,
            entry,
            self._ticks_done,
            handoff_requested,
            self.is_replaced,
            self.tick_continues,
        )

    def refuse_poison(self) -> None:
        """Fail the run, before its body, if too many processes died while they ran its message.

        :raises HeartbeatFailed: too many processes died.
        """
        try:
            refuse_poison(self._delivery, self.entries)
        except HeartbeatFailed as error:
            self.end(Outcome.FAILED, error)
            raise

    def end_as_duplicate(self, done: history.Entry | None) -> None:
        """Release the lease of a message that is a duplicate, without calling the body.

        :param done: the run that did the message's work, if it is known.
        """
        self.is_final = done is not None and done.final
        try:
            self._release(self._entry(Outcome.DUPLICATE, None), None)
        except SingletonError as failure:
            # The work is done, so the message must not fail because the release failed. Another
            # thread will release the lease.
            logger.warning(
                "singleton %s: the lease of a duplicate was not released: %s", self.name, failure
            )

    def _end_with(self, error: BaseException) -> None:
        """Release the lease after an error of the body or of the load.

        Nothing is raised here, so that the caller can raise that error.
        """
        if self.held.lost or not self.is_here:
            return
        self.is_final = self.is_final and is_for_good(error, self._delivery)
        outcome = outcome_of(error, self._delivery, self.is_replaced)
        try:
            reported = None if outcome == Outcome.SUCCEEDED else error
            self.end(outcome, reported, self._value_after(error))
        except Exception as failure:
            _warn_not_released(self.name, failure)

    def _value_after(self, error: BaseException) -> NewValue | None:
        is_saved = self._delivery.options.persist_on_error or (
            self.is_replaced and isinstance(error, Ignore)
        )
        if not is_saved or self.state.value is None or not isinstance(error, Exception):
            return None
        if is_of_lease(error, self._delivery) or not self._writer.may_write:
            return None
        try:
            return self.state.changed()
        except SchemaDecodeFailed as failure:
            _warn_not_saved(self.name, failure)
            return None


def _warn_not_released(name: str, failure: Exception) -> None:
    logger.warning("singleton %s: the lease was not released after an error: %s", name, failure)


def _warn_not_saved(name: str, failure: Exception) -> None:
    logger.warning("singleton %s: the state was not saved after an error: %s", name, failure)


def _handoff_detail(handoff_to: str) -> str:
    """The text of the error of a run that was asked to hand over."""
    return f"asked to hand over to {handoff_to}; the state is that of the last checkpoint"
