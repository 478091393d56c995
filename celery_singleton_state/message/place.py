"""Which of several messages of a singleton is the newest, for ``on_conflict="replace"``.

Messages get *ranks*, on one line with the fences of the row. A message that conflicts takes a rank
above all fences and ranks that are in the row, and the request that asks the holder to stop notes
it there. A message that acquires the lease has its fence as its rank, which is above all of them,
too. So a message is older than another one if a larger fence or rank came into the row since its
own. It then gives up: it does not ask, and the store refuses it the lease. Its rank travels with
it, when it is sent again and when it is retried.

A message that waits in a queue has no rank. Several that come at the same time can overtake each
other on their way, from the worker's process to its children, say. So each notes when it was sent:
by the clock of the sending host, or of the worker that received it if the sender noted nothing. Two
such times are compared only if both are of the same host since it was started; otherwise the first
to come is the older one. A message without a rank that was sent before the newest one in the row
gives up, too.
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
    """A name for this host's clock since it was started; another one where none is known."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return str(uuid.uuid4())


_CLOCKS_NAME = _clocks_name()
_DIRECT_CALL = "a direct call"


@dataclass(slots=True)
class Place:
    """Where a message stands among all messages of its singleton.

    :param rank: ``None`` until it has conflicted or run.
    :param sent: when it was sent, as :func:`moment` tells it, if that is known.
    :param asked_by: who asked its run to hand over the lease, if anybody did.
    """

    rank: int | None = None
    sent: str | None = None
    handoff_to: str | None = None
    is_known: bool = False

    @property
    def headers(self) -> dict[str, Any]:
        """What the message takes along when it is sent again or retried."""
        found = {RANK: self.rank, SENT_AT: self.sent}
        return {name: value for name, value in found.items() if value is not None}

    def is_below(self, row: Row) -> bool:
        """Whether the store refuses the message the lease, also if it is free."""
        if self.rank is None:
            return is_before(self.sent, row.newest_sent)
        return row.rank > self.rank


def moment() -> str:
    """The time now, by this host's clock."""
    return f"{_CLOCKS_NAME}:{time.clock_gettime_ns(CLOCK):020d}"


def is_before(one: str | None, other: str | None) -> bool:
    """Whether a moment was before another one; false also if they cannot be compared."""
    clock, _, seen = (one or "").rpartition(":")
    others_clock, _, others_seen = (other or "").rpartition(":")
    return bool(clock) and clock == others_clock and int(seen) < int(others_seen)


def note_sending(options: dict[str, Any]) -> dict[str, Any]:
    """The options with which a message is sent, with the moment of the sending.

    A message that is to come later is as new as the moment at which it comes.
    """
    headers = options.get("headers") or {}
    is_delayed = options.get("eta") is not None or options.get("countdown") is not None
    if is_delayed or SENT_AT in headers:
        return options
    return {**options, "headers": {**headers, SENT_AT: moment()}}


def note_arrival(sender: Any, request: Any, **_: Any) -> None:
    """Note when a worker received a message. Celery's signal ``task_received`` calls it."""
    options = options_of(request.task)
    message: dict[str, Any] = request.request_dict
    if options is None or options.on_conflict != "replace" or message.get("eta") is not None:
        return
    if header(Context(message), SENT_AT) is None:
        message[SENT_AT] = moment()


def find_place(delivery: Delivery) -> None:
    """Find where a message stands, from what it carries, or from the row if it was here before.

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
    """Whether a newer message is in the row.

    An acquisition without a run is none: of a message that was done before, or for nobody.
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
    """A name for a call that is no message, and so has no id."""
    return f"{_DIRECT_CALL} in process {os.getpid()} ({secrets.token_hex(4)})"


def newest_in(row: Row) -> str:
    """The newest message that is in the row, for people."""
    name = row.handoff_to if row.newest > row.fence else row.task_id
    if not name:
        return "a later run"
    return name if name.startswith(_DIRECT_CALL) else f"task {name}"


def _came_before(request: Context) -> bool:
    """Whether a message may have been delivered before, and lost its rank with its worker."""
    info: Any = request.delivery_info or {}
    return bool(request.id) and bool(info.get("redelivered") or request.retries)


def _rank_in(row: Row, task_id: str | None, entries: Iterable[history.Entry]) -> int | None:
    """The rank that a message got when it was here before; ``None`` if the row does not tell."""
    ranks = [entry.fence for entry in entries if entry.task_id == task_id and history.is_run(entry)]
    if row.holder is not None and row.task_id == task_id:
        ranks.append(row.fence)
    if row.handoff_to == task_id and row.newest > row.fence:
        ranks.append(row.newest)
    return max(ranks, default=None)


def _is_done(task_id: str | None, entries: tuple[history.Entry, ...]) -> bool:
    done = (entry.task_id for entry in entries if entry.outcome in history.DONE)
    return task_id is not None and task_id in done
