"""Freeing what dead processes of this host held."""

from __future__ import annotations

import math

from . import history
from .history import Outcome
from .lease.holder_files import HolderRecord, file_of
from .message.coalesce import send_pending_run
from .runtime import Runtime
from .store.base import Ended, Lease, Leases, Row, StoreError
from .text.visible import logger_of

logger = logger_of(__name__)


def free_holder(runtime: Runtime, holder: str | None) -> bool:
    """Free what this holder's process held, if it was of this host and is dead.

    :returns: whether it was.
    """
    name = file_of(holder) if holder else None
    return name is not None and free_dead(runtime, name) > 0


def free_own(runtime: Runtime, row: Row, store: Leases) -> bool:
    """Give back a lease that this process holds without a run: its release failed, or its
    acquisition was carried out late.

    :param store: that has the row.
    :returns: whether the lease may be free now.
    :raises StoreError: the store is unavailable.
    """
    if row.holder is None or not runtime.holds_without_run(row.holder):
        return False
    released = store.give_back(row.key, row.holder)
    if released is not None:
        logger.info("%s is free: %s gave it back", row.key, row.holder)
        send_pending_run(runtime.app, store, row.key, released)
    return True


def free_dead(runtime: Runtime, files: str = "*") -> int:
    """Free what all dead processes held whose files have such a name.

    Where the store is out of reach their files are left to whoever comes next.

    :returns: how many processes were found dead.
    """
    found = 0
    try:
        for holder_files in runtime.holder_files.of_dead_processes(files):
            found += 1
            for holder_record in holder_files:
                _free(runtime, holder_record)
    except StoreError as error:
        logger.warning("singletons: what a dead process held could not be freed: %s", error)
    return found


def _free(runtime: Runtime, holder_record: HolderRecord) -> None:
    """Release a lease in its dead holder's name; if it has ended, nothing happens."""
    # Which store it is in follows from the task, and this app may not have that task any more.
    for store in runtime.stores:
        row = store.peek(holder_record.key)
        if row is None or row.holder != holder_record.holder:
            continue
        if end_for(runtime, row, holder_record.generation, history.DIED, store, holder_record.sent):
            logger.warning(
                "%s is free: its holder %s died", holder_record.key, holder_record.holder
            )


def end_for(
    runtime: Runtime,
    row: Row,
    generation: int,
    why: str,
    store: Leases | None = None,
    sent: str | None = None,
) -> bool:
    """Release a lease in the name of the holder that was seen, or end the hold period that was
    seen; false if that is over.

    :param generation: of the message that it runs.
    :param why: for the history.
    :param store: that has the row; left out: the one where states are.
    :param sent: the value that tells the message from others with the same id.
    :raises StoreError: the store is out of reach.
    """
    store = store or runtime.store
    if row.holder is None:
        # The lease is in its hold period after a run, which has its entry.
        return store.requests.release_early(row)
    started = row.acquired_at
    if started is None or not math.isfinite(started):
        # JSON has no infinity, and the whole history could not be read with it.
        started = row.read_at
    entries = history.decode(row.history, row.key)
    entry = history.Entry(
        task_id=row.task_id,
        generation=generation,
        holder=row.holder,
        fence=row.fence,
        tick=None,
        outcome=Outcome.LOST,
        error=why,
        started=started,
        finished=row.read_at,
        sent=sent,
        deaths=history.deaths_of(entries, row.task_id, sent) + (why == history.DIED),
    )
    document = history.append(entries, entry, runtime.settings.history)
    lease = Lease(row.key, row.holder, row.fence, 0)
    released = store.release(lease, Ended(Outcome.LOST, document))
    if released is None:
        return False
    send_pending_run(runtime.app, store, row.key, released)
    return True
