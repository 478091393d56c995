"""Leadership for a scheduler class: any number of beats may run, one leads and sends.

A tick is sent first and recorded after, with the renewal of the lease, in one statement for all
that was sent meanwhile. So a tick is never lost; one that a dying leader sent and did not record is
sent again by the next, with the same id, and refused by the singleton that has done it.
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

#: What ends a tick for a reason that is known.
KNOWN = (NotLeading, BrokerUnavailable, StoreError)


class LeaderMixin(BrokerConnection):
    """Lets one of several beats lead, of any scheduler class; the others stand by.

    ::

        class LeadingScheduler(LeaderMixin, DatabaseScheduler):
            pass

    Whichever beat leads goes on with the last run times of the one before. They are kept in the
    store, beside what the class keeps itself, which is believed of entries that the store does not
    know. Each message carries the time that it was due, and an id that follows from it.

    :raises ImproperlyConfigured: the store cannot be used as it is configured, or an entry is not
        allowed; ``SystemExit`` with the same message in the log if Celery's beat makes it.
    """

    def __init__(self, app: Celery, *args: Any, **kwargs: Any) -> None:
        # Within a worker this is a forked process, in which Celery has closed all files and not
        # told the objects that the worker had them in. What is garbage among these would close
        # its file's number later, when that is the store's.
        gc.collect()
        try:
            self._leader = Leader(app)
            self._begin(app, *args, **kwargs)
        except ImproperlyConfigured as error:
            # Celery's beat logs any other error with a traceback, which hides what is to be done.
            if "schedule_filename" not in kwargs:
                raise
            logger.critical("beat ends: %s", error)
            raise SystemExit(1) from error

    def _begin(self, app: Celery, *args: Any, **kwargs: Any) -> None:
        #: The fence under which the schedule was taken over.
        self._fence: int | None = None
        #: What was sent and not recorded yet.
        self._unrecorded: dict[str, EntryState] = {}
        #: What the store has, or will have with the next record.
        self._states: dict[str, EntryState] = {}
        self._reserved: Any = None
        self._postponed = Postponed()
        #: Of the message that is being sent: what went wrong, and whether it was sent.
        self._failure: BaseException | None = None
        self._was_sent = False
        self._closed = self._is_ticking = False
        super().__init__(app, *args, **kwargs)

    # -- what Celery calls

    def setup_schedule(self) -> None:
        super().setup_schedule()
        self._leader.check()

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Lead or stand by; returns the seconds until this is to be called again.

        :raises SystemExit: it was closed. A signal's handler closes it and raises that, which is
            lost in a destructor, say, as that of a result whose message was just sent.
        """
        if self._closed:
            raise SystemExit
        show = sys.unraisablehook
        try:
            # Within, so that no signal can come between this and what takes it back.
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
                # What was sent is recorded before anything else is sent.
                self._leader.say(f"beat waits for the store: {error}", logging.WARNING)
                return STANDBY_POLL
            if isinstance(error, BrokerUnavailable):
                self._leader.say(f"beat waits for the broker: {error}", logging.WARNING)
                self._disconnect()
                self._hand_over("it cannot reach the broker")
                return STANDBY_POLL
            raise

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        """Send an entry for the tick that it is due for.

        What is wrong with its message alone is logged, as Celery does. Over any other error, as of
        a tool that wraps Celery's methods, the entry stays due and is sent later.

        :raises NotLeading: the lease is to be renewed first; nothing was sent.
        :raises BrokerUnavailable: the broker did not take it, as far as one can tell.
        :raises SystemExit: the scheduler was closed while it was sent, see :meth:`tick`.
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
            # The beat that leads next sends it again.
            self._end_if_closed(error)
            self._postpone(entry, due, error)

    def apply_async(self, entry: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().apply_async(entry, *args, **kwargs)
        except Exception as error:
            self._end_if_closed(error)
            # Celery logs it and goes on.
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
        """Put entries that are tried again later behind those that are due before."""
        super().populate_heap(*args, **kwargs)
        if self._postponed:
            put_off(self, self._postponed.wait)

    def _do_sync(self) -> None:
        celerys: Any = super()
        try:
            celerys._do_sync()
        except Exception as error:  # what was just sent is sent nevertheless
            self._end_if_closed(error)
            logger.exception("beat: the scheduler could not store its schedule")

    def sync(self) -> None:
        if self._leader.leads:
            super().sync()

    def close(self) -> None:
        """Record what was sent and hand over. May be called again, and by a signal's handler.

        The handler may have interrupted a transaction, whose locks nobody gives up before the
        handler is over. So within a tick that is left to the tick's end.
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
            # Before the connection, whose end can take long.
            self._hand_over("it stops")
            super().close()
            self._disconnect()

    def _end_if_closed(self, error: Exception) -> None:
        """End the beat over an error that its stop has caused.

        A signal's handler closes the beat, with its connections, and raises ``SystemExit``. The
        code that it interrupts can make another error of that.
        """
        if self._closed:
            raise SystemExit from error

    # -- leading

    def _leads(self) -> bool:
        if self._leader.leads:
            return True
        if not self._leader.may_campaign():
            return False
        # Whoever cannot send should not lead.
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
        # Never long, so that the lease is renewed in time.
        return max(0.0, min(pause, self._leader.renew_in))

    def _try_to_take_over(self) -> float:
        """Take over the schedule; returns the seconds until this is tried again, if it failed."""
        try:
            self._take_over()
        except KNOWN:
            raise
        except Exception as error:  # a class reads its schedule from where it likes
            return self._fail("the schedule could not be taken over, this is tried again", error)
        self._fence = self._leader.fence
        return 0.0

    def _fail(self, what: str, error: Exception) -> float:
        """Log an error of the scheduler as a whole; returns the seconds until it is tried again."""
        self._end_if_closed(error)
        pause = self._postponed.add(ALL)
        logger.error("beat: %s in %.0f s: %r", what, pause, error, exc_info=error)
        return pause

    def _take_over(self) -> None:
        """Go on from what the store has of the schedule."""
        self._states = self._load()
        read_schedule_anew(self)
        self._heap: Any = None
        for entry in self.schedule.values():
            # A row that all beats share can be right. A file of this beat's alone is not.
            self._adopt(entry, believes=hasattr(entry, "model"))

    def _work(self, *args: Any, **kwargs: Any) -> float:
        """Send what is due; returns the seconds until something is."""
        try:
            pause = super().tick(*args, **kwargs)
        except KNOWN:
            raise
        except Exception as error:
            # An entry may be missing in its heap.
            self._fence = None
            return self._fail("the scheduler failed, its next tick is", error)
        self._postponed.remove(ALL)
        return float(pause or 0.0)

    def _send(self, message: Any, producer: Any) -> Exception | None:
        """Send an entry's message as Celery does; returns the error over which it is sent later.

        :raises BrokerUnavailable: the broker did not take it, as far as one can tell.
        """
        self._failure, self._was_sent = None, False
        try:
            # As Celery calls it: tools that wrap it take it apart.
            super().apply_entry(message, producer=producer)
        except KNOWN:
            raise
        except Exception as error:
            if not self._was_sent:
                return error
            self._end_if_closed(error)
            logger.exception("beat: %s was sent, but then its scheduler failed", message.name)
        failure = self._failure
        # Celery makes this of whatever goes wrong with the connection, and only of that.
        if isinstance(failure, OperationalError):
            raise BrokerUnavailable(str(failure)) from failure
        return failure if isinstance(failure, Exception) and not is_its_own(failure) else None

    def _postpone(self, entry: Any, due: datetime, error: Exception) -> None:
        """An entry stays due, because it was not sent."""
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
        """Have the class count an entry as not sent."""
        self._count_back(entry)
        self._heap = None

    def _due(self, entry: Any) -> datetime:
        return due_after(entry.schedule, entry.last_run_at)

    def _message(self, entry: Any, due: datetime) -> Any:
        """An entry as it is sent for a tick."""
        state = self._states.get(entry.name)
        return message_of(entry, self._leader.name, due, state.last_tick if state else None)

    def _sent(self, entry: Any, due: datetime) -> EntryState:
        self._states[entry.name] = state_of(entry, due, self._reserved or entry)
        return self._states[entry.name]

    def _adopt(self, entry: Any, believes: bool = True) -> None:
        """Have an entry count from its last run, which the class may not have stored yet.

        :param believes: whether a later last run that the class has is believed: somebody has
            edited the entry, or made it new. Whoever leads next is to count from there, too.
        """
        state = self._states.get(entry.name)
        known = state.last_run_at if state else None
        own = maybe_make_aware(entry.last_run_at)
        if state is None or known is None or (known < own and believes):
            self._states[entry.name] = self._unrecorded[entry.name] = state_of(entry, None, entry)
        elif known != own:
            count_from(entry, known, state.total_run_count)

    def _requeue(self, entry: Any) -> None:
        """An entry was not sent, and the schedule is taken over anew."""
        self._fence = None
        self._count_back(entry)

    def _count_back(self, entry: Any) -> None:
        """An entry was not sent, and its class has counted it as sent."""
        count_from(entry, entry.last_run_at, entry.total_run_count)
        # Asking for the schedule can load it anew, without an entry that was disabled meanwhile, or
        # with one that was edited.
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
        """What the store has, with what this beat did and could not record before."""
        stored = decode_rows(self._leader.load())
        self._unrecorded = unknown_to(stored, self._unrecorded)
        return stored | self._unrecorded

    def _record(self) -> None:
        """Record what was sent and renew the lease, if there is need.

        :raises NotLeading: somebody else leads.
        :raises StoreError: it is out of reach.
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
            logger.warning("beat: what was sent last could not be recorded: %s", error)
        self._leader.resign(why)


def _hide_lost_exits() -> None:
    """Keep Python from printing a ``SystemExit`` that is lost in a destructor.

    Celery's result has a destructor that talks to the result backend, so that a stop in mid-tick
    often meets it. :meth:`LeaderMixin.tick` raises the exception again.
    """
    show = sys.unraisablehook

    def show_others(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, SystemExit):
            show(lost)

    sys.unraisablehook = show_others
