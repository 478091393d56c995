"""Let only one of several beats send: a mixin for Celery's scheduler classes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery.beat import SchedulingError
from celery.schedules import schedstate
from celery.utils.time import maybe_make_aware
from kombu.exceptions import OperationalError

from celery_singleton_state.compat import note_changed, put_off, read_schedule_anew
from celery_singleton_state.text.visible import logger_of
from celery_singleton_state.ticks import message_of

from .broker import BrokerUnavailable
from .celerys_entry import count_from, due_after, state_of
from .entry_state import EntryState
from .leader import NotLeading
from .leading import KNOWN, Leading
from .postponed import is_its_own

logger = logger_of(__name__)


class LeaderMixin(Leading):
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

    #: The new entry object that Celery has put in place of the entry that is being sent.
    _reserved: Any = None
    #: The error of the sending of the current message; ``None`` if there was none.
    _failure: BaseException | None = None
    #: Whether the current message was sent, even if an error came after the sending.
    _was_sent = False

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        """Send an entry for its due tick.

        If the entry's own message causes an error, the error is logged, as Celery does, and the
        tick counts as sent. After any other error, for example of a tool that wraps Celery's
        methods, the entry stays due and is sent later.

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
        except Exception as error:  # only logged, because the tick's messages have been sent
            self._end_if_closed(error)
            logger.exception("beat: the scheduler could not store its schedule")

    def _take_over(self) -> None:
        """Load the states of all entries from the store, and set the entries' last run times."""
        self._states = self._load()
        read_schedule_anew(self)
        self._heap: Any = None
        for entry in self.schedule.values():
            # An entry with a model comes from a database that all beats share, so a later last run
            # time in the model is right. A last run time in this beat's own file is not trusted.
            self._adopt(entry, trusts_class=hasattr(entry, "model"))

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

    def _adopt(self, entry: Any, trusts_class: bool = True) -> None:
        """Set the last run time of an entry to the one in the store.

        The scheduler class may have an older time, because it may not have stored its newest time.

        :param trusts_class: whether a later time of the class is right, because a user has edited
            or created the entry. The store then gets the time of the class, so that the next leader
            counts from it, too.
        """
        state = self._states.get(entry.name)
        known = state.last_run_at if state else None
        own = maybe_make_aware(entry.last_run_at)
        if state is None or known is None or (known < own and trusts_class):
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
        # Take the entry from ``schedule``, whose reading can load it again from the class's source.
        # The entry may be missing there because a user has disabled it, or be a new object because
        # a user has edited it.
        found = self.schedule.get(entry.name)
        if found is None:
            return
        if found is self._reserved:
            self.schedule[entry.name] = entry
        else:
            count_from(found, entry.last_run_at, entry.total_run_count)
        note_changed(self, entry.name)
        self.sync()
