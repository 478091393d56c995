"""One delivery of a message, or one direct call: its headers, its options and its singleton."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from celery.app.task import Context

from celery_singleton_state import history, ticks_done
from celery_singleton_state.config.options import Options
from celery_singleton_state.config.retry import Fail, RetryAfter, answer_to, policy_of
from celery_singleton_state.errors import SingletonError, StateLoadFailed
from celery_singleton_state.headers import (
    ONE_BY_ONE,
    OWN,
    PAUSE_LEFT,
    RETRIES,
    SENT,
    UNRECORDED,
    WAITED,
    own_headers,
)
from celery_singleton_state.lease.heartbeat import Heartbeat
from celery_singleton_state.runtime import Runtime
from celery_singleton_state.state.codec import Codec
from celery_singleton_state.store.base import Store
from celery_singleton_state.text.visible import encodable
from celery_singleton_state.ticks import Tick, previous_of, tick_in
from celery_singleton_state.ticks_done import EntryTicks, TicksDone

from .place import Place
from .routing import is_copy

#: The reason that logs and events give for refusing a duplicate.
DONE_BEFORE = "was done before"
#: Seconds for which a tick of an entry with ``catch_up="all"`` waits for the lease. After that its
#: task fails, and beat sends the tick again.
ONE_BY_ONE_TIMEOUT = 3600.0

#: The number that one ``self.replace()`` adds to a message's generation. It is larger than any
#: count of retries, so that a replacement has a later generation than all retries of the replaced
#: message.
REPLACEMENT = 1 << 32

#: Seconds in which a run has to end after it has learned that it is asked to hand over.
TIME_TO_STOP = 1.0

#: How often an eager run is repeated at most when the store fails, whatever its retry policy
#: allows. The limit is low because the run is repeated at once, while its caller waits.
EAGER_RETRIES = 3


@dataclass(slots=True)
class Earlier:
    """The failed tries of an eager run. An eager run is repeated within the caller's call.

    :param tries: the number of failed tries.
    :param error: the error of the newest try whose body ran. If no body has run: the error of the
        first try.
    :param result: the result of a body that ended, but whose save the store did not answer.
    """

    tries: int = 0
    error: SingletonError | None = None
    result: Any = None

    def note(self, error: SingletonError) -> None:
        """Record that a try has failed with this error."""
        self.tries += 1
        if self.error is None or not isinstance(error, StateLoadFailed):
            self.error = error


class Delivery:
    """One delivery of a message, or one direct call, together with the singleton that it is for.

    The constructor reads the headers of the message, so that no other module needs to.

    :param task: the task.
    :param request: Celery's request of the delivery or the call.
    :param name: the singleton's name.
    :param key: the key of the singleton's row.
    :param options: the singleton's options.
    :param codec: encodes and decodes the state; ``None`` for a singleton without a state.
    :param runtime: the objects that all singletons of this process share.
    """

    #: How often this package retried the message because the store had failed.
    own_retries = 0
    #: A value that differs between two messages that were sent with the same task id.
    sent: str | None = None
    #: The tick that the message is for; ``None`` if no beat of this package sent the message.
    tick: Tick | None = None
    #: Whether beat waits for the end of this tick before it sends the schedule entry's next tick.
    is_one_by_one = False
    #: Seconds for which the message had waited for the lease before this delivery.
    waited = 0.0
    #: Seconds that are left of the message's delay, because the broker allows no countdown that
    #: covers the whole delay.
    pause_left = 0.0
    #: Whether an earlier delivery requeued the message because the run had just ended, and its
    #: result was not recorded yet.
    is_unrecorded = False

    def __init__(
        self,
        task: Any,
        request: Context,
        name: str,
        key: str,
        options: Options,
        codec: Codec[Any] | None,
        runtime: Runtime,
    ) -> None:
        self.task = task
        self.request = request
        self.name = name
        self.key = key
        self.options = options
        self.codec = codec
        self.runtime = runtime
        #: The store of the singleton's row, and the heartbeat that renews the lease. The code that
        #: handles the delivery sets both.
        self.store: Store
        self.heartbeat: Heartbeat
        #: Emit an event about this singleton. The arguments are a class of
        #: :mod:`celery_singleton_state.hooks.details`, and the fields that this class adds.
        self.emit = partial(runtime.dispatcher.emit, task.name, name, request.id)
        #: The order of this message among the messages of the singleton, for
        #: ``on_conflict="replace"``.
        self.place = Place()
        #: The earlier tries, if this is an eager run.
        self.earlier = Earlier()
        #: Whether this is a message, which can be sent again, and not a direct or eager call.
        self.is_message = is_message(request)
        if request.headers or not OWN.isdisjoint(request.__dict__):
            self._read(own_headers(request))
        #: How often the message was retried: by this package, by a body or by Celery.
        self.retries: int = request.retries or 0
        #: A number that grows with each retry that a body or Celery asked for, and with each
        #: ``self.replace()``. A replacement keeps the task id of the message that it replaces, but
        #: its count of retries starts at 0. So each replacement adds more than any count of
        #: retries.
        self.generation: int = (
            (request.replaced_task_nesting or 0) * REPLACEMENT + self.retries - self.own_retries
        )
        if self.sent is None and request.root_id not in (None, request.id):
            # A part of a chain or chord has no value of its own, so it gets its root id as its
            # value. If a chain is sent twice with the same task ids, only the root ids of its parts
            # differ.
            self.sent = encodable(str(request.root_id))
        #: The conflict policy. A tick whose end beat waits for must not be skipped, so its message
        #: always waits for the lease.
        self.on_conflict = "wait" if self.is_one_by_one else options.on_conflict
        #: The lease's life: seconds until it expires if it is not renewed.
        self.ttl = options.lease_ttl or runtime.lease_ttl
        #: The lease's life, in seconds, that is asked for when the lease is acquired. If the task's
        #: ``lease_ttl`` is longer, the run renews the lease once for ``lease_ttl`` before its body
        #: begins.
        self.first_ttl = min(self.ttl, runtime.lease_ttl)
        #: Whether duplicates are dropped. Without the option ``deduplicate``: true for ticks, and
        #: for singletons with a state.
        self.deduplicates = options.deduplicate
        if self.deduplicates is None:
            self.deduplicates = codec is not None or self.tick is not None

    def _read(self, headers: Mapping[str, Any]) -> None:
        """Set the attributes that come from the headers of the message.

        :param headers: this package's headers of the message, by their names.
        """
        self.own_retries = int(headers.get(RETRIES) or 0)
        self.sent = None if headers.get(SENT) is None else encodable(str(headers[SENT]))
        self.tick = tick_in(headers)
        self.is_one_by_one = bool(int(headers.get(ONE_BY_ONE) or 0))
        self.waited = float(headers.get(WAITED, 0.0))
        self.pause_left = float(headers.get(PAUSE_LEFT, 0.0))
        self.is_unrecorded = bool(headers.get(UNRECORDED))

    @property
    def conflict_timeout(self) -> float:
        """The seconds for which the message waits for the lease, if its conflict policy waits.

        With ``"replace"`` this is at least two heartbeat intervals and some time to stop, because
        the holder learns from its heartbeat that it is asked to hand over.
        """
        if self.is_one_by_one:
            return ONE_BY_ONE_TIMEOUT
        timeout = self.options.conflict_timeout
        if timeout is None:
            timeout = self.runtime.settings.conflict_timeout
        if self.on_conflict != "replace":
            return timeout
        return max(timeout, 2 * self.runtime.settings.heartbeat_interval + TIME_TO_STOP)

    @property
    def resent(self) -> dict[str, Any]:
        """The headers that keep the message's order when it is sent again or retried.

        Empty unless the conflict policy is ``"replace"``.
        """
        return self.place.headers if self.on_conflict == "replace" else {}

    def answer_to(self, error: SingletonError) -> RetryAfter | Fail:
        """Decide whether the message is retried after an error of this singleton, or fails."""
        own, tries = self.options, self.earlier.tries
        if self.request.is_eager and (tries >= EAGER_RETRIES or not error.retryable):
            return Fail()
        usual = policy_of(self.task)
        return answer_to(error, self.retries + tries, own.retry_reasons, own.retry_policy, usual)

    def done_by(self, entries: tuple[history.Entry, ...]) -> history.Entry | None:
        """Return the run that did this message's work already, if it is in the history.

        A tick is recognised by its task id, because every beat derives the same id from a tick. If
        a fanout exchange made copies of the message, a run that has only begun is returned, too.

        :param entries: the history of the singleton, as its row has it.
        :returns: ``None`` if there is no such run, or if duplicates are not dropped.
        """
        task_id = self.request.id
        if task_id and self.is_copy:
            return history.begun_by(entries, task_id, self.generation, self.sent)
        if not task_id or not self.deduplicates:
            return None
        # Celery does not count the replacements of eager runs. So an eager run counts as later than
        # every run in the history that has its task id.
        generation = sys.maxsize if self.request.is_eager else self.generation
        return history.done_by(entries, task_id, generation, self.sent)

    @property
    def previous(self) -> float | None:
        """The due time of the tick that beat sent before this message's tick, in seconds since the
        epoch; ``None`` if it is not known.
        """
        return previous_of(self.request)

    def ticks_of(self, raw: str | None) -> tuple[TicksDone, EntryTicks]:
        """Decode a row's record of ticks.

        :param raw: the column ``ticks_done`` of the row.
        :returns: the whole record, which has the ticks of each schedule entry; and the ticks of
            this message's entry alone, empty if the row has recorded none.
        """
        known = ticks_done.decode(raw, self.name)
        return known, known.get(self.tick.entry if self.tick else "", EntryTicks())

    def passed(self, entries: tuple[history.Entry, ...], raw: str | None) -> str | None:
        """Return why the message's tick is refused, although the history does not show it as done.

        The record of ticks may show that the tick is done or has failed for good. A tick that is
        older than all ticks that the row records is refused, too, because its run may have been
        forgotten. This last rule does not apply to a retry, nor to a message that also names the
        tick that beat sent before the message's own.

        :param entries: the history of the singleton, as its row has it.
        :param raw: the column ``ticks_done`` of the row.
        :returns: the reason as a text; ``None`` if the tick is not refused.
        """
        tick = self.tick
        if tick is None or not self.deduplicates or self.request.replaced_task_nesting:
            return None
        _, own = self.ticks_of(raw)
        if own.is_done(tick.due):
            return DONE_BEFORE
        if self.is_one_by_one and not self.retries and tick.due in own.failed:
            return "has failed for good before"
        if self.retries or self.previous is not None or own.reaches_back_to(tick.due):
            return None
        if history.has_passed(entries, tick, self.runtime.settings.history):
            return "is older than all ticks that its row records, so it may have been done before"
        return None

    @property
    def is_copy(self) -> bool:
        """Whether a fanout exchange made several copies of the message, and this is one of them."""
        return self.is_message and is_copy(self.task.app, self.request)


def is_message(request: Context) -> bool:
    """Whether a request belongs to a message from a broker, and not to a direct or eager call."""
    return bool(request.id) and not request.called_directly and not request.is_eager
