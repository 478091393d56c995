"""Recovery: release the leases of dead processes of this host before the leases expire."""

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
    """Release all leases of a holder's process if that process ran on this host and is dead.

    :param holder: a lease's holder, as the row names it; ``None``: nothing happens.
    :returns: whether the process was found dead.
    """
    name = file_of(holder) if holder else None
    return name is not None and free_dead(runtime, name) > 0


def free_own(runtime: Runtime, row: Row, store: Leases) -> bool:
    """Release a lease that this process holds without a run.

    A process can hold a lease without a run if a release has failed, or if the store has carried
    out an acquisition whose answer was lost.

    :param row: the singleton's row. Nothing happens if another process or a run holds the lease.
    :param store: the store that has the row.
    :returns: whether the lease may be free now.
    :raises StoreError: the store is unavailable.
    """
    if row.holder is None or not runtime.holds_without_run(row.holder):
        return False
    released = store.give_back(row.key, row.holder)
    if released is not None:
        logger.info("%s is free: %s released it", row.key, row.holder)
        send_pending_run(runtime.app, store, row.key, released)
    return True


def free_dead(runtime: Runtime, files: str = "*") -> int:
    """Release all leases of the dead processes of this host.

    If the store is unavailable, the holder files of the dead processes stay, and the next process
    that calls this function releases the leases.

    :param files: a glob pattern for the names of holder files. Default: all files.
    :returns: how many processes were found dead.
    """
    found = 0
    try:
        for holder_files in runtime.holder_files.of_dead_processes(files):
            found += 1
            for holder_record in holder_files:
                _free(runtime, holder_record)
    except StoreError as error:
        logger.warning("singletons: the leases of a dead process could not be released: %s", error)
    return found


def _free(runtime: Runtime, holder_record: HolderRecord) -> None:
    """Release the lease of a dead holder, unless the lease has another holder by now."""
    # The task decides which store has the lease, but this app may not have the task any more. So
    # ask all stores.
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
    """Release a lease in place of its holder, or end a hold period early.

    The history gets an entry for the run that loses its lease, and a pending run is sent.

    :param row: the row as it was read. If the holder or the hold period has changed since, nothing
        happens.
    :param generation: the generation of the message that the holder runs; see
        :class:`~celery_singleton_state.history.Entry`.
    :param why: the error text of the run in the history.
    :param store: the store that has the row. Default: the app's main store.
    :param sent: the value that tells the holder's message from others with the same task id;
        ``None`` if the message has none.
    :returns: whether the lease was released or the hold period ended.
    :raises StoreError: the store is unavailable.
    """
    store = store or runtime.store
    if row.holder is None:
        # During a hold period the run has already ended, and its entry is in the history.
        return store.requests.release_early(row)
    lease = Lease(row.key, row.holder, row.fence, 0)
    document = _history_with_loss(row, lease, generation, why, sent, runtime.settings.history)
    released = store.release(lease, Ended(Outcome.LOST, document))
    if released is None:
        return False
    send_pending_run(runtime.app, store, row.key, released)
    return True


def _history_with_loss(
    row: Row, lease: Lease, generation: int, why: str, sent: str | None, limit: int
) -> str:
    """Return the history of a row as JSON, with an entry for the run that loses its lease.

    :param lease: the lease of that run.
    :param generation, why, sent: as in :func:`end_for`.
    :param limit: the number of runs that the history keeps.
    """
    started = row.acquired_at
    if started is None or not math.isfinite(started):
        # The database can hold a time of infinity, which JSON cannot. One such time would make the
        # whole history unreadable, so take the time at which the row was read instead.
        started = row.read_at
    entries = history.decode(row.history, row.key)
    entry = history.Entry(
        task_id=row.task_id,
        generation=generation,
        holder=lease.holder,
        fence=lease.fence,
        tick=None,
        outcome=Outcome.LOST,
        error=why,
        started=started,
        finished=row.read_at,
        sent=sent,
        deaths=history.deaths_of(entries, row.task_id, sent) + (why == history.DIED),
    )
    return history.append(entries, entry, limit)
