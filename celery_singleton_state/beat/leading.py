"""Lead or stand by: what every scheduler of several beats does, whatever entries it has.

The leader sends a tick first and records it afterwards. One statement records all ticks that were
sent since the last record, and renews the lease. So a tick is never lost. If a leader dies between
the two steps, the next leader sends the tick again with the same task id, and the singleton ends
the second message as a duplicate.
"""

from __future__ import annotations

import gc
import logging
import sys
from typing import Any

from celery import Celery
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.store.base import StoreError
from celery_singleton_state.text.storable import to_json
from celery_singleton_state.text.visible import logger_of

from .broker import BrokerConnection, BrokerUnavailable
from .entry_state import EntryState, decode_rows, unknown_to
from .leader import STANDBY_POLL, Leader, NotLeading
from .postponed import ALL, Postponed

logger = logger_of(__name__)

#: Errors that end a tick of the scheduler and are handled there: the beat then stands by.
KNOWN = (NotLeading, BrokerUnavailable, StoreError)


class Leading(BrokerConnection):
    """The part of a scheduler that leads or stands by, and records what the leader has sent.

    A subclass takes over the schedule in ``_take_over``. When it sends an entry, it adds the
    entry's new state to ``_unrecorded``.

    :raises ImproperlyConfigured: the store cannot be used as it is configured, or an entry is not
        allowed.
    :raises SystemExit: instead of ``ImproperlyConfigured``, if Celery's beat creates the scheduler.
        The log has the message of the error.
    """

    def __init__(self, app: Celery, *args: Any, **kwargs: Any) -> None:
        # In a worker with ``-B``, the beat is a forked process in which Celery has closed all file
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
        #: Maps the names of entries to the states that the store does not have yet.
        self._unrecorded: dict[str, EntryState] = {}
        #: Maps the names of entries to the states that the store has or will have after the next
        #: record.
        self._states: dict[str, EntryState] = {}
        self._postponed = Postponed()
        self._closed = self._is_ticking = False
        super().__init__(app, *args, **kwargs)

    def setup_schedule(self) -> None:
        super().setup_schedule()
        self._leader.check()

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Lead or stand by; return the seconds until Celery has to call this method again.

        :raises SystemExit: the scheduler was closed. Celery's signal handler closes the scheduler
            and raises ``SystemExit`` itself, but Python drops this error if the signal arrives
            during a destructor. So this method raises the error again.
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
        """End a closed beat after an error, because the closing may have caused the error.

        Celery's signal handler closes the beat and raises ``SystemExit``. The code that the handler
        interrupts can turn that into another error.

        :raises SystemExit: the scheduler was closed.
        """
        if self._closed:
            raise SystemExit from error

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
        except Exception as error:  # the source of a class's schedule can raise anything
            return self._fail("the schedule could not be taken over, this is tried again", error)
        self._fence = self._leader.fence
        return 0.0

    def _fail(self, what: str, error: Exception) -> float:
        """Log an error of the scheduler class; return the seconds until the next try.

        :param what: the beginning of the log line, to which the seconds are added.
        """
        self._end_if_closed(error)
        pause = self._postponed.add(ALL)
        logger.error("beat: %s in %.0f s: %r", what, pause, error, exc_info=error)
        return pause

    def _take_over(self) -> None:
        """Load the states of all entries from the store, and prepare the entries for sending."""
        raise NotImplementedError

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

    def _load(self) -> dict[str, EntryState]:
        """Return the states of all entries: the stored states, or newer states that this beat could
        not record.
        """
        stored = decode_rows(self._leader.load())
        self._unrecorded = unknown_to(stored, self._unrecorded)
        return stored | self._unrecorded

    def _record(self) -> None:
        """Record the sent ticks and renew the lease, if either is necessary.

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
    arrives in this destructor. :meth:`Leading.tick` raises ``SystemExit`` again.
    """
    show = sys.unraisablehook

    def show_others(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, SystemExit):
            show(lost)

    sys.unraisablehook = show_others
