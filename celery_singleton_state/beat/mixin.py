"""Let only one of several beats send: a mixin for Celery's scheduler classes.

The leader sends a tick first and records it afterwards. One statement records all ticks that were
sent since the last one, and renews the lease. So a tick is never lost. If a leader dies between the
two steps, the next leader sends the tick again with the same task id, and the singleton ends the
second message as a duplicate.
"""

from __future__ import annotations

import gc
import logging
import sys
from datetime import datetime
from typing import Any

from celery import Celery
from celery.beat import SchedulingError
from celery.exceptions import ImproperlyConfigured
from celery.schedules import schedstate
from celery.utils.time import maybe_make_aware
from kombu.exceptions import OperationalError

from celery_singleton_state.compat import note_changed, put_off, read_schedule_anew
from celery_singleton_state.store.base import StoreError
from celery_singleton_state.text.storable import to_json
from celery_singleton_state.text.visible import logger_of
from celery_singleton_state.ticks import message_of

from .broker import BrokerConnection, BrokerUnavailable
from .celerys_entry import count_from, due_after, state_of
from .entry_state import EntryState, decode_rows, unknown_to
from .leader import STANDBY_POLL, Leader, NotLeading
from .postponed import ALL, Postponed, is_its_own

logger = logger_of(__name__)

#: Errors that end a tick of the scheduler and are handled there: the beat then stands by.
KNOWN = (NotLeading, BrokerUnavailable, StoreError)


class LeaderMixin(BrokerConnection):
    """A mixin for a scheduler class: one of several beats leads, the others stand by.

    Put it before the scheduler class::

        class LeadingScheduler(LeaderMixin, DatabaseScheduler):
            pass

    The store keeps the last run times of all entries, so a new leader continues where the last one
    was. The scheduler class may keep last run times, too. They are used for entries that the store
    does not know. Each message carries the due time of its tick, and a task id that is derived from
    the entry and the due time.

    :param app: the Celery app.
    :param args: positional arguments of the scheduler class.
    :param kwargs: keyword arguments of the scheduler class.
    :raises ImproperlyConfigured: the store cannot be used as it is configured, or an entry is not
        allowed.
    :raises SystemExit: instead of ``ImproperlyConfigured``, if Celery's beat creates the scheduler.
        The log has the message of the error.
    """

    def __init__(self, app: Celery, *args: Any, **kwargs: Any) -> None:
        # In a worker with ``-B``, this is a forked process in which Celery has closed all file
        # descriptors of the worker. The worker's file objects do not know that. If one of them is
        # garbage, it would close its descriptor's number later, when the store's connection has
        # that number. So collect the garbage before the store is opened.
        gc.collect()
        try:
            self._leader = Leader(app)
            self._begin(app, *args, **kwargs)
        except ImproperlyConfigured as error:
            # Celery's beat logs any other error with a traceback, which hides the message that says
            # what to do. Only Celery's beat passes ``schedule_filename``.
            if "schedule_filename" not in kwargs:
                raise
            logger.critical("beat ends: %s", error)
            raise SystemExit(1) from error

    def _begin(self, app: Celery, *args: Any, **kwargs: Any) -> None:
        #: The fence of the lease with which this beat took over the schedule; ``None`` if the
        #: schedule has to be taken over again.
        self._fence: int | None = None
        #: The states that the store does not have yet, by the names of the entries.
        self._unrecorded: dict[str, EntryState] = {}
        #: The states that the store has or will have after the next record, by the names of the
        #: entries.
        self._states: dict[str, EntryState] = {}
        #: The entry that Celery has made to follow the entry that is being sent.
        self._reserved: Any = None
        self._postponed = Postponed()
        #: For the message that is being sent: the error of its sending, and whether it was sent.
        self._failure: BaseException | None = None
        self._was_sent = False
        self._closed = self._is_ticking = False
        super().__init__(app, *args, **kwargs)

    # -- what Celery calls

    def setup_schedule(self) -> None:
        super().setup_schedule()
        self._leader.check()

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Lead or stand by; return the seconds until Celery has to call this method again.

        :raises SystemExit: the scheduler was closed. Celery's signal handler closes it and raises
            ``SystemExit`` itself, but Python drops that error if the signal arrives during a
            destructor. So this method raises it again.
        """
        if self._closed:
            raise SystemExit
        show = sys.unraisablehook
        try:
            # Set the flag within the ``try``, so that ``finally`` resets it whenever a signal's
            # handler raises.
            self._is_ticking = True
            return self._tick(*args, **kwargs)
        finally:
            self._is_ticking = False
            if self._closed:
                sys.unraisablehook = show
                self._end()

    def _tick(self, *args: Any, **kwargs: Any) -> float:
        try:
            return self._lead(*args, **kwargs) if self._leads() else STANDBY_POLL
        except NotLeading:
            return STANDBY_POLL
        except Exception as error:
            self._end_if_closed(error)
            if isinstance(error, StoreError):
                # The ticks that were sent stay in ``_unrecorded``, and the next tick of the
                # scheduler records them before it sends anything.
                self._leader.say(f"beat waits for the store: {error}", logging.WARNING)
                return STANDBY_POLL
            if isinstance(error, BrokerUnavailable):
                self._leader.say(f"beat waits for the broker: {error}", logging.WARNING)
                self._disconnect()
                self._hand_over("it cannot reach the broker")
                return STANDBY_POLL
            raise

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        """Send an entry for its due tick.

        An error of the entry's own message is logged, as Celery does, and the tick counts as sent.
        After any other error, for example of a tool that wraps Celery's methods, the entry stays
        due and is sent later.

        :raises NotLeading: the lease has to be renewed first. Nothing was sent.
        :raises BrokerUnavailable: the broker has probably not accepted the message.
        :raises SystemExit: the scheduler was closed during the sending; see :meth:`tick`.
        """
        if self._leader.renew_in <= 0:
            self._requeue(entry)
            raise NotLeading
        due = self._due(entry)
        try:
            error = self._send(self._message(entry, due), producer)
        except BrokerUnavailable:
            self._requeue(entry)
            raise
        if error is None:
            self._postponed.remove(entry.name)
            self._unrecorded[entry.name] = self._sent(entry, due)
        else:
            # If the scheduler was closed, the next leader sends the tick.
            self._end_if_closed(error)
            self._postpone(entry, due, error)

    def apply_async(self, entry: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().apply_async(entry, *args, **kwargs)
        except Exception as error:
            self._end_if_closed(error)
            # Celery's caller logs the error and goes on, so keep it for ``_send``.
            within = error.__context__ if isinstance(error, SchedulingError) else None
            self._failure = within or error
            raise
        self._was_sent = True
        return result

    def reserve(self, entry: Any) -> Any:
        self._reserved = super().reserve(entry)
        return self._reserved

    def is_due(self, entry: Any) -> Any:
        if wait := self._postponed.wait(entry.name):
            return schedstate(False, wait)
        self._adopt(entry)
        return super().is_due(entry)

    def populate_heap(self, *args: Any, **kwargs: Any) -> None:
        """Fill Celery's heap of entries, with postponed entries at the time of their next try."""
        super().populate_heap(*args, **kwargs)
        if self._postponed:
            put_off(self, self._postponed.wait)

    def _do_sync(self) -> None:
        celerys: Any = super()
        try:
            celerys._do_sync()
        except Exception as error:  # must not end the tick: its messages have been sent
            self._end_if_closed(error)
            logger.exception("beat: the scheduler could not store its schedule")

    def sync(self) -> None:
        if self._leader.leads:
            super().sync()

    def close(self) -> None:
        """Record the ticks that were sent, and hand over. It can be called more than once.

        Celery's signal handler calls this method, too. The handler may have interrupted a
        transaction of :meth:`tick`, whose locks stay held until the handler returns. So if a tick
        is in progress, this method only marks the scheduler as closed, and the tick does the rest
        at its end.
        """
        if self._is_ticking:
            if not self._closed:
                _hide_lost_exits()
            self._closed = True
            return
        self._closed = True
        self._end()

    def _end(self) -> None:
        try:
            self.sync()
        finally:
            # Hand over before the connection is closed, because closing can take long.
            self._hand_over("it stops")
            super().close()
            self._disconnect()

    def _end_if_closed(self, error: Exception) -> None:
        """End the beat if it was closed, because the closing may have caused this error.

        Celery's signal handler closes the beat and raises ``SystemExit``. The code that the handler
        interrupts can turn that into another error.

        :raises SystemExit: the scheduler was closed.
        """
        if self._closed:
            raise SystemExit from error

    # -- leading

    def _leads(self) -> bool:
        if self._leader.leads:
            return True
        if not self._leader.may_campaign():
            return False
        # A beat that cannot reach the broker must not lead, so connect before the campaign.
        self._connect()
        return self._leader.campaign()

    def _lead(self, *args: Any, **kwargs: Any) -> float:
        pause = self._postponed.wait(ALL)
        if not pause and self._fence != self._leader.fence:
            pause = self._try_to_take_over()
        self._record()
        pause = pause or self._work(*args, **kwargs)
        self._record()
        self._leader.say_leads()
        # Return before the lease has to be renewed.
        return max(0.0, min(pause, self._leader.renew_in))

    def _try_to_take_over(self) -> float:
        """Take over the schedule; return 0, or the seconds until the next try if it failed."""
        try:
            self._take_over()
        except KNOWN:
            raise
        except Exception as error:  # a scheduler class can read its schedule from any source
            return self._fail("the schedule could not be taken over, this is tried again", error)
        self._fence = self._leader.fence
        return 0.0

    def _fail(self, what: str, error: Exception) -> float:
        """Log an error of the scheduler class; return the seconds until it is tried again.

        :param what: the beginning of the log line, to which the seconds are added.
        """
        self._end_if_closed(error)
        pause = self._postponed.add(ALL)
        logger.error("beat: %s in %.0f s: %r", what, pause, error, exc_info=error)
        return pause

    def _take_over(self) -> None:
        """Load the states of all entries from the store, and set the entries' last run times."""
        self._states = self._load()
        read_schedule_anew(self)
        self._heap: Any = None
        for entry in self.schedule.values():
            # An entry with a model comes from a database that all beats share, so a later last run
            # time in it is right. The file of this beat alone is not trusted.
            self._adopt(entry, believes=hasattr(entry, "model"))

    def _work(self, *args: Any, **kwargs: Any) -> float:
        """Send the due entries; return the seconds until the next entry is due."""
        try:
            pause = super().tick(*args, **kwargs)
        except KNOWN:
            raise
        except Exception as error:
            # The error may have left an entry out of Celery's heap. Taking over the schedule again
            # fills the heap anew.
            self._fence = None
            return self._fail("the scheduler failed, its next tick is", error)
        self._postponed.remove(ALL)
        return float(pause or 0.0)

    def _send(self, message: Any, producer: Any) -> Exception | None:
        """Send an entry's message as Celery does.

        :returns: the error because of which the entry has to be sent later; ``None`` if the message
            was sent, or if it can never be sent.
        :raises BrokerUnavailable: the broker has probably not accepted the message.
        """
        self._failure, self._was_sent = None, False
        try:
            # Pass the arguments as Celery does, because tools that wrap this method read them.
            super().apply_entry(message, producer=producer)
        except KNOWN:
            raise
        except Exception as error:
            if not self._was_sent:
                return error
            self._end_if_closed(error)
            logger.exception("beat: %s was sent, but then its scheduler failed", message.name)
        failure = self._failure
        # Celery raises ``OperationalError`` for all errors of the connection, and for no others.
        if isinstance(failure, OperationalError):
            raise BrokerUnavailable(str(failure)) from failure
        return failure if isinstance(failure, Exception) and not is_its_own(failure) else None

    def _postpone(self, entry: Any, due: datetime, error: Exception) -> None:
        """Keep an entry due after an error of its sending, and log the error.

        :param due: the tick that could not be sent.
        """
        pause = self._postponed.add(entry.name)
        logger.error(
            "beat: %s, due at %s, could not be sent, tried again in %.0f s: %r",
            entry.name,
            f"{due:%Y-%m-%d %H:%M:%S} UTC",
            pause,
            error,
            exc_info=error,
        )
        self._not_sent(entry)

    def _not_sent(self, entry: Any) -> None:
        """Undo that the scheduler class has counted an entry as sent."""
        self._count_back(entry)
        self._heap = None

    def _due(self, entry: Any) -> datetime:
        return due_after(entry.schedule, entry.last_run_at)

    def _message(self, entry: Any, due: datetime) -> Any:
        """Return an entry as it is sent for a tick, with the tick's headers and task id."""
        state = self._states.get(entry.name)
        return message_of(entry, self._leader.name, due, state.last_tick if state else None)

    def _sent(self, entry: Any, due: datetime) -> EntryState:
        self._states[entry.name] = state_of(entry, due, self._reserved or entry)
        return self._states[entry.name]

    def _adopt(self, entry: Any, believes: bool = True) -> None:
        """Set the last run time of an entry to the one in the store.

        The scheduler class may have an older time, because it may not have stored its newest one.

        :param believes: whether a later time of the class is right, because a user has edited or
            created the entry. The store then gets the time of the class, so that the next leader
            counts from it, too.
        """
        state = self._states.get(entry.name)
        known = state.last_run_at if state else None
        own = maybe_make_aware(entry.last_run_at)
        if state is None or known is None or (known < own and believes):
            self._states[entry.name] = self._unrecorded[entry.name] = state_of(entry, None, entry)
        elif known != own:
            count_from(entry, known, state.total_run_count)

    def _requeue(self, entry: Any) -> None:
        """Undo the sending of an entry, and have the schedule taken over again."""
        self._fence = None
        self._count_back(entry)

    def _count_back(self, entry: Any) -> None:
        """Reset the last run time and the count of an entry that the class has counted as sent."""
        count_from(entry, entry.last_run_at, entry.total_run_count)
        # Reading ``schedule`` can load it again from the class's source. The entry may be missing
        # there because a user has disabled it, or be a new object because a user has edited it.
        found = self.schedule.get(entry.name)
        if found is None:
            return
        if found is self._reserved:
            self.schedule[entry.name] = entry
        else:
            count_from(found, entry.last_run_at, entry.total_run_count)
        note_changed(self, entry.name)
        self.sync()

    # -- the store

    def _load(self) -> dict[str, EntryState]:
        """Return the states of all entries: the store's, and the newer ones of this beat that it
        could not record.
        """
        stored = decode_rows(self._leader.load())
        self._unrecorded = unknown_to(stored, self._unrecorded)
        return stored | self._unrecorded

    def _record(self) -> None:
        """Record what was sent and renew the lease, if either is necessary.

        :raises NotLeading: another beat leads.
        :raises StoreError: the store is unavailable.
        """
        if self._unrecorded or self._leader.renew_in <= 0:
            self._leader.record({name: to_json(state) for name, state in self._unrecorded.items()})
            self._unrecorded.clear()

    def _hand_over(self, why: str) -> None:
        if self._leader.fence is None:
            return
        try:
            if self._unrecorded:
                self._record()
        except NotLeading:
            return
        except StoreError as error:
            logger.warning("beat: the ticks that were sent last could not be recorded: %s", error)
        self._leader.resign(why)


def _hide_lost_exits() -> None:
    """Keep Python from printing a ``SystemExit`` that it drops because a destructor raised it.

    The destructor of Celery's result talks to the result backend. So a stop during a tick often
    arrives in this destructor. :meth:`LeaderMixin.tick` raises ``SystemExit`` again.
    """
    show = sys.unraisablehook

    def show_others(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, SystemExit):
            show(lost)

    sys.unraisablehook = show_others
