"""Order the messages of a singleton by age, for ``on_conflict="replace"``.

Messages get *ranks*. Ranks and the row's fences are numbers of the same scale. A message that
conflicts takes a rank above all fences and ranks in the row, and the request for a handoff writes
this rank to the row. The rank of a message that acquires the lease is its fence, which is also
above all these numbers. If a larger fence or rank has come into the row since a message got its
rank, another message is newer. The older message gives up: it requests no handoff, and the store
refuses it the lease. A message keeps its rank when it is sent again and when it is retried.

A message that waits in a queue has no rank. Messages that arrive at the same time can overtake each
other, for example on their way from the worker's process to its children. So each message carries
the time of its sending, by the clock of the sending host. If the sender noted no time, the worker
notes the time of the message's arrival. Two such times are compared only if both come from the same
host since its last start. Otherwise the message that arrives first counts as older. A message
without a rank also gives up if it was sent before the newest message in the row.
"""

from __future__ import annotations

import os
import secrets
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery.app.task import Context

from celery_singleton_state import history
from celery_singleton_state.config.options import options_of
from celery_singleton_state.headers import RANK, SENT_AT, header
from celery_singleton_state.lease.lease import CLOCK
from celery_singleton_state.store.base import Row

if TYPE_CHECKING:
    from .delivery import Delivery


def _clocks_name() -> str:
    """Return a name for this host's clock that changes when the host starts anew.

    If the system has no boot id, the name is random, so that no times are compared.
    """
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return str(uuid.uuid4())


_CLOCKS_NAME = _clocks_name()
_DIRECT_CALL = "a direct call"


@dataclass(slots=True)
class Place:
    """The position of a message in the order of its singleton's messages.

    :param rank: the rank of the message; ``None`` until it has conflicted or run.
    :param sent: the time of its sending, as :func:`moment` returns it; ``None`` if not known.
    :param handoff_to: the message that asked this message's run to hand over the lease; ``None`` if
        no message did.
    :param is_known: whether :func:`find_place` has set ``rank`` and ``sent``.
    """

    rank: int | None = None
    sent: str | None = None
    handoff_to: str | None = None
    is_known: bool = False

    @property
    def headers(self) -> dict[str, Any]:
        """The headers that keep the position when the message is sent again or retried."""
        found = {RANK: self.rank, SENT_AT: self.sent}
        return {name: value for name, value in found.items() if value is not None}

    def is_below(self, row: Row) -> bool:
        """Whether a newer message is in the row, so that the store refuses this message the lease.

        The store refuses the lease even if it is free.
        """
        if self.rank is None:
            return is_before(self.sent, row.newest_sent)
        return row.rank > self.rank


def moment() -> str:
    """Return the current time with the name of this host's clock, as a text that sorts by time."""
    return f"{_CLOCKS_NAME}:{time.clock_gettime_ns(CLOCK):020d}"


def is_before(one: str | None, other: str | None) -> bool:
    """Whether one time of :func:`moment` is before another one.

    False if a time is missing, or if the times come from different clocks.
    """
    clock, _, seen = (one or "").rpartition(":")
    others_clock, _, others_seen = (other or "").rpartition(":")
    return bool(clock) and clock == others_clock and int(seen) < int(others_seen)


def note_sending(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a message, with the current time in a header as its time of sending.

    A message with an ``eta`` or ``countdown`` gets no such header, because its age counts from the
    time at which it is due, and not from its sending.
    """
    headers = options.get("headers") or {}
    is_delayed = options.get("eta") is not None or options.get("countdown") is not None
    if is_delayed or SENT_AT in headers:
        return options
    return {**options, "headers": {**headers, SENT_AT: moment()}}


def note_arrival(sender: Any, request: Any, **_: Any) -> None:
    """Note when a worker received a message that carries no time of sending.

    Celery's signal ``task_received`` calls this function.
    """
    options = options_of(request.task)
    message: dict[str, Any] = request.request_dict
    if options is None or options.on_conflict != "replace" or message.get("eta") is not None:
        return
    if header(Context(message), SENT_AT) is None:
        message[SENT_AT] = moment()


def find_place(delivery: Delivery) -> None:
    """Set the position of a delivery's message, from its headers.

    If a message may have been delivered before, its rank can be lost with the earlier worker. Then
    the rank is read from the row.

    :raises StoreError: the row cannot be read.
    """
    place, request = delivery.place, delivery.request
    if place.is_known:
        return
    place.sent = header(request, SENT_AT)
    place.rank = header(request, RANK)
    if place.rank is None and _came_before(request):
        row = delivery.store.peek(delivery.key)
        if row is not None:
            place.rank = _rank_in(row, request.id, history.decode(row.history, delivery.name))
    place.is_known = True


def is_older(delivery: Delivery, row: Row) -> bool:
    """Whether the row names a newer message than the one of this delivery.

    An acquisition of the lease that led to no run does not count, for example the acquisition of a
    duplicate.
    """
    place = delivery.place
    if place.rank is None:
        return is_before(place.sent, row.newest_sent)
    entries = history.decode(row.history, delivery.name)
    fences = [entry.fence for entry in entries if history.is_run(entry)]
    if row.holder is not None and not _is_done(row.task_id, entries):
        fences.append(row.fence)
    return max([row.newest, *fences]) > place.rank


def a_direct_call() -> str:
    """Return a unique name for a direct call, which has no task id."""
    return f"{_DIRECT_CALL} in process {os.getpid()} ({secrets.token_hex(4)})"


def newest_in(row: Row) -> str:
    """Return the name of the newest message in the row, for an error message or a log line."""
    name = row.handoff_to if row.newest > row.fence else row.task_id
    if not name:
        return "a later run"
    return name if name.startswith(_DIRECT_CALL) else f"task {name}"


def _came_before(request: Context) -> bool:
    """Whether a message may have been delivered before: it is marked as redelivered, or retried."""
    info: Any = request.delivery_info or {}
    return bool(request.id) and bool(info.get("redelivered") or request.retries)


def _rank_in(row: Row, task_id: str | None, entries: Iterable[history.Entry]) -> int | None:
    """Return the rank that a message got in an earlier delivery, as far as the row shows it.

    :returns: ``None`` if the row does not name the message.
    """
    ranks = [entry.fence for entry in entries if entry.task_id == task_id and history.is_run(entry)]
    if row.holder is not None and row.task_id == task_id:
        ranks.append(row.fence)
    if row.handoff_to == task_id and row.newest > row.fence:
        ranks.append(row.newest)
    return max(ranks, default=None)


def _is_done(task_id: str | None, entries: tuple[history.Entry, ...]) -> bool:
    done = (entry.task_id for entry in entries if entry.outcome in history.DONE)
    return task_id is not None and task_id in done
