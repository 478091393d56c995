"""One run of a singleton's body, from the acquired lease to its release."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from celery.exceptions import Ignore, Reject, Retry
from sqlalchemy import Connection

from celery_singleton_state import history, ticks_done
from celery_singleton_state.errors import (
    HeartbeatFailed,
    SchemaDecodeFailed,
    SingletonError,
    StatePersistFailed,
)
from celery_singleton_state.history import Outcome
from celery_singleton_state.lease.lease import HeldLease, clock
from celery_singleton_state.message.coalesce import grant
from celery_singleton_state.message.delivery import Delivery
from celery_singleton_state.message.poison import refuse_poison
from celery_singleton_state.message.resend import means_to_kill
from celery_singleton_state.message.results import keep
from celery_singleton_state.message.sent_anew import forget_result
from celery_singleton_state.retry import RetryAfter
from celery_singleton_state.store.base import (
    TAKEN_OVER,
    Acquired,
    Ended,
    NewValue,
    Saved,
    StoreError,
    Write,
)
from celery_singleton_state.ticks import Tick
from celery_singleton_state.ticks_done import EntryTicks

from .leadership import Leadership, asked_by
from .report import Report
from .state import RunState
from .writes import FencedWriter, not_written

logger = logging.getLogger(__name__)

#: How many spans of ticks a row keeps of one entry: with conflicts that wait, messages of ticks can
#: overtake each other; elsewhere a gap is nearly always a tick that was skipped.
SPANS_OF_WAITING, SPANS = 1000, 300


class ReplacedEagerly(Ignore):
    """Ends the body of an eager call that another task replaces, before that is called.

    :param signature: of the other task, which would meet this run's lease if it is the same one.
    """

    def __init__(self, signature: Any) -> None:
        super().__init__(signature)
        self.signature = signature


_current: ContextVar[Run | None] = ContextVar("celery_singleton_state_run", default=None)
#: The runs of this process, and of those that it was forked from.
_active: set[Run] = set()


def current_run(task: Any) -> Run | None:
    """The run of this task that the calling code is in, if it is in one."""
    run = _innermost(task)
    return None if run is None or run.is_over else run


def why_no_run(task: Any) -> str:
    """Why code that is in no run of this task is in none, for its error."""
    if _innermost(task) is not None:
        return "the run whose context this code has is over"
    if not any(run.task is task and run._is_here for run in tuple(_active)):
        return ""
    return (
        "its body runs in another thread or greenlet of this process; what the body starts has the "
        "run's context if it is started by contextvars.copy_context().run, for example "
        "executor.submit(contextvars.copy_context().run, function)"
    )


def _innermost(task: Any) -> Run | None:
    run = _current.get()
    while run is not None and run.task is not task:
        run = run.outer
    return run


class Run:
    """A run that has acquired its lease.

    :param asked_at: :func:`~celery_singleton_state.lease.lease.clock` before the lease was asked
        for.
    """

    def __init__(self, delivery: Delivery, acquired: Acquired, asked_at: float) -> None:
        self.task = delivery.task
        self.name = delivery.name
        self.request = delivery.request
        self.outer = _current.get()
        self.entries = history.decode(acquired.history, delivery.name)
        #: Whether its body has sent no message with its id: neither a retry nor a replacement.
        self.is_final = True
        #: Whether its tick ends with the message that replaces it.
        self.tick_goes_on = False
        #: Whether its body has replaced itself, and whether it is just doing so.
        self.is_replaced = self.is_replacing = False
        self.state = RunState(delivery.name, delivery.codec, acquired)
        settings = delivery.runtime.settings
        self.held = HeldLease(acquired.lease, asked_at, settings.heartbeat_interval)
        self._delivery = delivery
        self._store = delivery.runtime.store
        self._heartbeat = delivery.runtime.heartbeat_of(delivery.key)
        self._report = Report(delivery, self.held, asked_at)
        self._writer = FencedWriter(
            delivery.name, self._store, self.held, acquired.write, self._report.refused
        )
        #: Whether the store has answered that the lease is given back.
        self.given_back = False
        self._acquired_at = acquired.acquired_at
        self._ticks_done = acquired.ticks_done
        self._took_over = acquired.write == TAKEN_OVER
        self._asked_at = asked_at
        self._in_transaction = False
        #: Held while the state is written: a body can have threads of its own, and a write must be
        #: answered before the next one is numbered.
        self._writing = threading.RLock()
        #: Whether the body has ended; and the run, with all that follows its body.
        self._is_ending = self.is_over = False
        self._pid = os.getpid()
        self._leadership = Leadership(
            delivery.task,
            delivery.name,
            self.held,
            delivery.options.on_lease_lost == "interrupt",
            self._on_lost,
            lambda: _current.set(self),
        )

    def execute(self, body: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Load the state, run the body, save and release; returns what the body returned."""
        token = _current.set(self)
        _active.add(self)
        try:
            self._report.begin(self.entries, self._took_over)
            result, new = self._body(body, args, kwargs)
            self._delivery.earlier.result = result
            self.end(Outcome.SUCCEEDED, new=new, result=keep(self._delivery, result))
            return result
        finally:
            try:
                if self._is_here:
                    self._heartbeat.drop(self.held)
                    if self.held.lost:
                        self._report.lost()
                    self._leadership.end()
            finally:
                _current.reset(token)
                _active.discard(self)
                # A thread of the body can have a copy of the context, and live on.
                self.is_over = True
                self._delivery.place.asked_by = self.held.asked_by
                # Both refer to this run, which would keep it and its state for the collector.
                self.held.forget()
                self._leadership.forget()

    def _body(
        self, body: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Any, NewValue | None]:
        try:
            self._heartbeat.hold(self.held)
            # The result backend can be slow, and the lease run out meanwhile.
            forget_result(self._delivery)
            self._writer.refuse_if_lost()
            starts_anew = self._delivery.options.on_decode_error == "initial"
            self.state.load(self._set_aside if starts_anew else None, self._report.loaded)
            self._leadership.begin()
            result = self._leadership.body.call(body, args, kwargs)
            if self._in_transaction:
                raise RuntimeError(
                    f"{self.name}: the body ended within transaction(), which another thread may "
                    "be in; the body has to wait for it"
                )
            self._writer.refuse_if_undecided()
            return result, self.state.changed()
        except BaseException as error:
            self._end_with(error)
            raise

    def _on_lost(self) -> HeartbeatFailed:
        self._report.lost()
        return self._writer.failure()

    def _set_aside(self, key: str, value: str) -> None:
        def keep() -> bool:
            self._store.set_aside(key, value)
            return True

        self._writer.write("quarantine", keep)

    # -- what the body may do

    def checkpoint(self) -> None:
        """Save the state now, fenced, and prolong the lease."""
        self._refuse_elsewhere("checkpoint()")
        self.state.need("checkpoint()")
        with self._writing:
            self._refuse_ended("checkpoint()")
            saved = self._checkpoint()
        self._hand_over(saved)

    def _checkpoint(self) -> Saved | None:
        if self._in_transaction:
            raise RuntimeError(
                f"{self.name}: checkpoint() within transaction(), whose commit saves the state"
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
        self._report.saved("checkpoint", new)
        return saved

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Within it the body sends what replaces it, and then raises ``Ignore``.

        The state is saved first: the replacement starts from it, on another worker perhaps before
        this run has ended, and nothing is sent where the save fails.
        """
        self._refuse_elsewhere("replace()")
        if self._in_transaction:
            raise RuntimeError(f"{self.name}: replace() within transaction(); call it after that")
        self._writer.refuse_if_lost()
        self.refuse_if_asked()
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
        """A transaction whose commit carries the body's rows and the fenced state, or neither."""
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
        self.refuse_if_asked()

    @contextmanager
    def _committing(self) -> Iterator[Connection]:
        self._writer.refuse_if_lost()
        self._writer.refuse_if_undecided()
        before = self.state.document()
        write = saved = None
        # From the save to the answer to the commit.
        with ExitStack() as writing:
            try:
                with self._store.transaction() as transaction:
                    try:
                        yield transaction.connection
                    except BaseException:
                        if self.held.lost:
                            # A lost run does not wait for the store in order to stop.
                            transaction.abandon()
                        raise
                    self._refuse_elsewhere("transaction()")
                    # Before, too: the run's release can wait for this transaction's locks.
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
                # Without an answer to its save, no COMMIT was sent.
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
            self._note_asked(saved)

    def _committed(self, write: Write, asked_at: float) -> None:
        self.held.renewed(asked_at)
        self.state.stored = write.new
        self._report.saved("transaction", write.new)

    def _not_committed(self, error: StoreError) -> SingletonError:
        """The error of a transaction that was rolled back, or whose outcome is unknown."""
        if self.held.lost:
            return self._writer.failure()
        return not_written(self.name, error)

    def _hand_over(self, saved: Saved | None) -> None:
        """:raises HeartbeatFailed: somebody asked for the lease; the state is saved."""
        self._note_asked(saved)
        self.refuse_if_asked()

    def _note_asked(self, saved: Saved | None) -> None:
        if saved is not None and saved.handoff_to is not None:
            self.held.asked_by = saved.handoff_to

    def refuse_if_asked(self) -> None:
        """:raises HeartbeatFailed: somebody asked for the lease."""
        if self.held.asked_by is not None:
            raise HeartbeatFailed(self.name, asked_by(self.held.asked_by))

    @property
    def headers(self) -> dict[str, Any]:
        """Headers of a retry of the run's message."""
        return self._delivery.resent

    @property
    def _is_here(self) -> bool:
        """Whether this is the run's process, and not a child that the body forked."""
        return self._pid == os.getpid()

    def _refuse_elsewhere(self, what: str) -> None:
        """:raises RuntimeError: this is a forked child."""
        if not self._is_here:
            raise RuntimeError(
                f"{self.name}: {what} in process {os.getpid()}, which the body forked; the run and "
                f"its lease are those of process {self._pid}: hand it what it is to save"
            )

    def _refuse_ended(self, what: str) -> None:
        """:raises RuntimeError: the body has ended, which a thread of it may not know."""
        if self._is_ending:
            raise RuntimeError(
                f"{self.name}: {what} is there only while its body runs: the run has ended"
            )

    # -- its ends

    def end(
        self,
        outcome: Outcome,
        error: BaseException | None = None,
        new: NewValue | None = None,
        result: history.Kept | None = None,
    ) -> None:
        """Release the lease with a note of how the run ended, and with a new value or without.

        :param result: for a copy of the message that comes later.
        :raises HeartbeatFailed: the lease was lost; nothing was written.
        :raises SchemaDecodeFailed: the store cannot hold the new value; the lease is released
            without it.
        :raises StatePersistFailed: the store is out of reach.
        """
        if not self._is_here:
            return  # it is its parent's to end
        text = history.describe(error) if error else None
        entry = self._entry(outcome, text, result)
        self._is_ending = True
        try:
            with self._writing:
                self._release(entry, new)
        except StatePersistFailed as failure:
            if error is None:
                outcome, text = Outcome.FAILED, history.describe(failure)
            self._report.ended(outcome, text, given_back=False)
            raise
        except HeartbeatFailed:
            raise
        except SchemaDecodeFailed as refused:
            if new is None:
                self._report.ended(outcome, text, given_back=False)
                raise
            self._end_without(outcome, error, refused)
            return
        except BaseException as interruption:
            self._find_out_end(entry, new, interruption)
            raise
        self._report.saved("save", new)
        self._report.ended(outcome, text, given_back=True)

    def _end_without(
        self, outcome: Outcome, error: BaseException | None, refused: SchemaDecodeFailed
    ) -> None:
        """Release the lease without a new value that the store cannot hold: the row keeps its own.

        :param error: that ended the run; ``None``: the run fails over the value.
        :raises SchemaDecodeFailed: it does.
        """
        if error is None:
            self.is_final = self.is_final and self._is_for_good(refused)
            self.end(Outcome.FAILED, refused)
            raise refused
        logger.warning("singleton %s: not saved after an error: %s", self.name, refused)
        self.end(outcome, error)

    def _find_out_end(
        self, entry: history.Entry, new: NewValue | None, interruption: BaseException
    ) -> None:
        """Report whether a release took effect that a time limit, for example, interrupted."""
        try:
            self.given_back = self._writer.has_ended(entry)
        except (StoreError, StatePersistFailed):
            self.given_back = False
        if self.given_back:
            grant(self.task.app, self._store, self.held.lease.key, None, self.request.id)
            self._report.saved("save", new)
            self._report.ended(Outcome(entry.outcome), entry.error, given_back=True)
        else:
            self._report.ended(Outcome.FAILED, history.describe(interruption), given_back=False)

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
        goes_on = entry.outcome != Outcome.SUCCEEDED or self.is_replaced
        if goes_on or hold <= entry.finished - entry.started:
            hold = 0.0
        document = history.append(self.entries, entry, limit)
        ended = Ended(entry.outcome, document, hold, self._new_ticks_done(entry))
        write = self._writer.next_write(new) if new else None
        released = self._writer.write(
            "save" if new else "release",
            lambda: self._store.release(lease, ended, write),
            recognised=lambda: self._writer.has_ended(entry),
        )
        self.given_back = True
        grant(self.task.app, self._store, lease.key, released, self.request.id)

    def _new_ticks_done(self, entry: history.Entry) -> str | None:
        """What the row is to know of ticks; ``None`` if the run changes nothing of it.

        The tick of a run that lost its lease has not ended: the beat sends it again. One that was
        asked to hand over to a newer message does not come again.
        """
        tick, outcome = entry.tick, entry.outcome
        was_replaced = self.held.asked_by is not None
        if tick is None or (outcome == Outcome.LOST and not was_replaced):
            return None
        known, before = self._delivery.ticks_of(self._ticks_done)
        if self.is_replaced and self.tick_goes_on and outcome in history.DONE:
            after = before.with_retried(tick.due)
        elif outcome in history.DONE and (entry.final or self.is_replaced):
            after = self._with_done(before, tick)
        elif outcome == Outcome.DUPLICATE:
            return None
        elif entry.final or was_replaced:
            after = before.with_failed(tick.due)
        else:
            after = before.with_retried(tick.due)
        return None if after == before else ticks_done.encode(known, tick, after)

    def _with_done(self, before: EntryTicks, tick: Tick) -> EntryTicks:
        after = before.with_done(tick.due, self._delivery.previous)
        waits = self._delivery.on_conflict in ("wait", "replace")
        kept = after.with_at_most(SPANS_OF_WAITING if waits else SPANS)
        if kept is not after:
            logger.log(
                logging.WARNING if waits else logging.INFO,
                "singleton %s: too many ticks of %s are missing among those that are done; the "
                "oldest missing ones count as done from now on",
                self.name,
                tick.entry,
            )
        return kept

    def refuse_poison(self) -> None:
        """End, without its body, the run of a message whose processes have died too often.

        :raises HeartbeatFailed: they have.
        """
        try:
            refuse_poison(self._delivery, self.entries)
        except HeartbeatFailed as error:
            self.end(Outcome.FAILED, error)
            raise

    def end_as_duplicate(self, done: history.Entry | None) -> None:
        """Release the lease of a message that turned out to be done: nothing hangs on it.

        :param done: the run that did it, if it is known.
        """
        self.is_final = done is not None and done.final
        try:
            self._release(self._entry(Outcome.DUPLICATE, None), None)
        except SingletonError as failure:
            logger.warning("singleton %s: a duplicate was not released: %s", self.name, failure)

    def _end_with(self, error: BaseException) -> None:
        """Release after an error, which is the one to be reported whatever happens here."""
        if self.held.lost or not self._is_here:
            return
        outcome = Outcome.FAILED
        self.is_final = self.is_final and self._is_for_good(error)
        if self._is_replacement(error):
            outcome = Outcome.SUCCEEDED
        elif isinstance(error, Retry):
            outcome = Outcome.RETRIED
        elif isinstance(error, Ignore):
            outcome = Outcome.SKIPPED
        elif self._is_of_lease(error):
            outcome = Outcome.LOST
        try:
            told = None if outcome == Outcome.SUCCEEDED else error
            self.end(outcome, told, self._value_after(error))
        except Exception as failure:
            logger.warning("singleton %s: not released after an error: %s", self.name, failure)

    def _is_for_good(self, error: BaseException) -> bool:
        """Whether the message does not come again after this error."""
        if isinstance(error, Reject):
            return not getattr(error, "requeue", False)
        if isinstance(error, Retry) or not isinstance(error, Exception) or means_to_kill(error):
            return False
        if isinstance(error, SingletonError) and error.singleton == self.name:
            return not isinstance(self._delivery.answer_to(error), RetryAfter)
        return True

    def _is_replacement(self, error: BaseException) -> bool:
        return self.is_replaced and isinstance(error, Ignore)

    def _is_of_lease(self, error: BaseException) -> bool:
        return isinstance(error, HeartbeatFailed) and error.singleton == self.name

    def _value_after(self, error: BaseException) -> NewValue | None:
        wanted = self._delivery.options.persist_on_error or self._is_replacement(error)
        if not wanted or self.state.value is None or not isinstance(error, Exception):
            return None
        if self._is_of_lease(error) or not self._writer.may_write:
            return None
        try:
            return self.state.changed()
        except SchemaDecodeFailed as failure:
            logger.warning("singleton %s: not saved after an error: %s", self.name, failure)
            return None
