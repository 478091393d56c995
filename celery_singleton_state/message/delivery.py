"""One delivery of a singleton's message: what it is, and for which singleton."""

from __future__ import annotations

import sys
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

#: Why a message is refused whose work is done.
DONE_BEFORE = "was done before"
#: Seconds that a tick which must not be skipped waits for the lease. After that it fails, and beat
#: sends it again.
ONE_BY_ONE_TIMEOUT = 3600.0

#: A replacement is of a later generation than all retries of what it replaces.
REPLACEMENT = 1 << 32

#: Seconds that a run has to end after it heard that it is asked to stop.
TIME_TO_STOP = 1.0

#: How often an eager run is repeated over the store, whatever its policy allows: it is repeated at
#: once, and its caller waits.
EAGER_RETRIES = 3


@dataclass(slots=True)
class Earlier:
    """The earlier tries of an eager run, which is repeated within its call.

    :param tries: how many there were.
    :param error: of the last try whose body ran, or of the last one.
    :param result: of the body whose save was not answered.
    """

    tries: int = 0
    error: SingletonError | None = None
    result: Any = None

    def note(self, error: SingletonError) -> None:
        """Note that a try has failed."""
        self.tries += 1
        if self.error is None or not isinstance(error, StateLoadFailed):
            self.error = error


class Delivery:
    """A message, or a direct call, and the singleton that it is for.

    What the message says is read once, here.

    :param name: the singleton's name; ``key`` is its row's.
    :param codec: of the state; ``None`` for a singleton without one.
    """

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
        #: Where the singleton's row is, and what renews its lease: set when it is delivered.
        self.store: Store
        self.heartbeat: Heartbeat
        #: Tell those who look on that something happened to the singleton: a kind of details, and
        #: their further fields by name.
        self.emit = partial(runtime.dispatcher.emit, task.name, name, request.id)
        #: Where the message stands among those that replace each other.
        self.place = Place()
        #: What came of it before, if it is an eager run.
        self.earlier = Earlier()
        #: Whether it is a message that can be sent again, and no call.
        self.is_message = is_message(request)
        has_any = request.headers or not OWN.isdisjoint(request.__dict__)
        headers = own_headers(request) if has_any else {}
        #: How often the message was retried, whoever asked for it.
        self.retries: int = request.retries or 0
        #: How often this package asked for it, to repeat a run that failed over the store.
        self.own_retries = int(headers.get(RETRIES) or 0)
        #: How often bodies asked for it: to replace themselves, and since then to be retried.
        #: A replacement keeps the id of what it replaces, and counts its retries anew.
        self.generation: int = (
            (request.replaced_task_nesting or 0) * REPLACEMENT + self.retries - self.own_retries
        )
        sent = headers.get(SENT)
        if sent is None and request.root_id != request.id:
            # A part of a chain or chord has no value of its own. Its root tells it from the same
            # part of another chain that was sent with the same id.
            sent = request.root_id
        #: The value that tells the message from others that were sent with the same id.
        self.sent = None if sent is None else encodable(str(sent))
        #: The tick that the message is for, if a beat of ours sent it.
        self.tick: Tick | None = tick_in(headers) if headers else None
        #: Whether the next tick of the message's entry is sent when this one has ended.
        self.is_one_by_one = bool(int(headers.get(ONE_BY_ONE) or 0))
        #: The policy for a lease that is taken. A tick that must not be skipped waits.
        self.on_conflict = "wait" if self.is_one_by_one else options.on_conflict
        #: Seconds that the message has waited for the lease before it came here.
        self.waited = float(headers.get(WAITED, 0.0))
        #: Seconds that the message has still to wait, because no delay is as long.
        self.pause_left = float(headers.get(PAUSE_LEFT, 0.0))
        #: Whether it comes again because its run had ended a moment before.
        self.is_unrecorded = bool(headers.get(UNRECORDED))
        #: Seconds that the lease lives without a renewal.
        self.ttl = options.lease_ttl or runtime.lease_ttl
        #: Seconds that an acquisition takes the lease for; the run then confirms a longer life.
        self.first_ttl = min(self.ttl, runtime.lease_ttl)
        #: Whether what was done is not done again: as told, else for ticks or if there is state.
        self.deduplicates = options.deduplicate
        if self.deduplicates is None:
            self.deduplicates = codec is not None or self.tick is not None

    @property
    def conflict_timeout(self) -> float:
        """Seconds that it waits for the lease, if its policy waits at all.

        With ``"replace"`` they are at least two heartbeats, because the holder hears of the request
        by its heartbeat.
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
        """Headers of the message that is sent in place of this one."""
        return self.place.headers if self.on_conflict == "replace" else {}

    def answer_to(self, error: SingletonError) -> RetryAfter | Fail:
        """How the message goes on after an error of this singleton."""
        own, tries = self.options, self.earlier.tries
        if self.request.is_eager and (tries >= EAGER_RETRIES or not error.retryable):
            return Fail()
        usual = policy_of(self.task)
        return answer_to(error, self.retries + tries, own.retry_reasons, own.retry_policy, usual)

    def done_by(self, entries: tuple[history.Entry, ...]) -> history.Entry | None:
        """The run that did what this message asks for, if the history knows one.

        A tick is known again by its task's id, which every beat makes the same.
        """
        task_id = self.request.id
        if task_id and self.is_copy:
            return history.begun_by(entries, task_id, self.generation, self.sent)
        if not task_id or not self.deduplicates:
            return None
        # An eager replacement has its predecessor's id, and no count: it is later than any of it.
        generation = sys.maxsize if self.request.is_eager else self.generation
        return history.done_by(entries, task_id, generation, self.sent)

    @property
    def previous(self) -> float | None:
        """The tick that was sent before the message's own, if it is known."""
        return previous_of(self.request)

    def ticks_of(self, raw: str | None) -> tuple[TicksDone, EntryTicks]:
        """What a row knows of ticks, and of those of the message's own entry.

        :param raw: the row's ``ticks_done``.
        """
        known = ticks_done.decode(raw, self.name)
        return known, known.get(self.tick.entry if self.tick else "", EntryTicks())

    def passed(self, entries: tuple[history.Entry, ...], raw: str | None) -> str | None:
        """Why the message's tick is refused though the history does not know it as done, if it is.

        Only a message that does not name the tick before its own, and that is no retry, can be for
        a tick which nobody can tell from one that was done and forgotten.

        :param raw: the row's ``ticks_done``.
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
            return "is older than all that its row remembers, so it may have been done before"
        return None

    @property
    def is_copy(self) -> bool:
        """Whether the message is one of several copies that a fanout exchange made of it."""
        return self.is_message and is_copy(self.task.app, self.request)


def is_message(request: Context) -> bool:
    """Whether a request is one of a message, which can be sent again."""
    return bool(request.id) and not request.called_directly and not request.is_eager
