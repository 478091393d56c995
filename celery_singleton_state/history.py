"""The last runs of a singleton, kept in its row as compact JSON.

Its only writer is the holder of the lease, which appends to what it loaded, so keeping it
costs no round trip. It answers three questions: was this message already done, was my
unanswered commit mine, and what ran when.
"""

from __future__ import annotations

import logging
from enum import StrEnum

import msgspec

from .ticks import Tick

logger = logging.getLogger(__name__)

MAX_ERROR_LENGTH = 200
#: The error of a run whose process died.
DIED = "its process died"


class Outcome(StrEnum):
    """How a delivery to a singleton ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRIED = "retried"
    LOST = "lost"
    SKIPPED = "skipped"
    DUPLICATE = "duplicate"


DONE = frozenset({Outcome.SUCCEEDED, Outcome.DUPLICATE})


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One past run. Times are seconds since the epoch, by the store's clock at acquisition.

    A task's retries carry its id. Those that its body asked for each count as a new *generation*;
    those that this package sent, to repeat a run, belong to the same.

    :param final: whether the run asked for no retry: if it succeeded, no message with its id is new
        work, of whatever generation. Copies of it are of several where a run asked for a retry and
        its own message came again, as its worker died.
    """

    task_id: str | None
    generation: int
    holder: str
    fence: int
    tick: Tick | None
    outcome: str
    error: str | None
    started: float
    finished: float
    final: bool = False


_decoder = msgspec.json.Decoder(tuple[Entry, ...])


def decode(raw: str | None, name: str) -> tuple[Entry, ...]:
    """The entries, oldest first.

    A history that cannot be read counts as empty, with a warning: it is a record of the runs
    and not their state, and a singleton that stops over it would lose more.
    """
    if not raw:
        return ()
    try:
        return _decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError) as error:
        logger.warning("singleton %s: its history cannot be read and starts anew: %s", name, error)
        return ()


def append(entries: tuple[Entry, ...], entry: Entry, limit: int) -> str:
    """The JSON of the newest ``limit`` runs, and of as many duplicates, the new one among them.

    What was refused as a duplicate must not push out what it is known by.
    """
    found = (*entries, entry)
    runs = [each for each in found if is_run(each)]
    refused = [each for each in found if is_duplicate(each)]
    kept = {id(each) for each in (*runs[-limit:], *refused[-limit:])}
    return msgspec.json.encode([each for each in found if id(each) in kept]).decode()


def is_duplicate(entry: Entry) -> bool:
    """Whether it is of a message that was done before."""
    return entry.outcome == Outcome.DUPLICATE


def is_run(entry: Entry) -> bool:
    """Whether a body ran."""
    return not is_duplicate(entry)


def done_by(entries: tuple[Entry, ...], task_id: str, generation: int) -> Entry | None:
    """The run that did this work, or a later generation of it, if one is known."""
    for entry in reversed(entries):
        is_of_it = entry.task_id == task_id and entry.outcome in DONE
        if is_of_it and (entry.final or entry.generation >= generation):
            return entry
    return None


def has_passed(entries: tuple[Entry, ...], tick: Tick, limit: int) -> bool:
    """Whether a tick is older than all of its schedule entry that a full history still holds.

    For ticks of which ``ticks_done`` cannot tell: one cannot be known to be new then, because what
    was done and is forgotten is older than what is held.
    """
    runs = [run for run in entries if is_run(run)]
    known = [run.tick.due for run in runs if run.tick and run.tick.entry == tick.entry]
    return len(runs) >= limit and bool(known) and tick.due < min(known)


def has_ended(entries: tuple[Entry, ...], own: Entry, run_count: int) -> bool | None:
    """Whether a run's release took effect, whose answer was lost.

    An entry with the run's fence and another outcome is somebody else's: of an operator, say, who
    released the lease.

    :param own: the entry that the release would have left.
    :param run_count: of the row: how many entries there ever were.
    :returns: ``None`` if the history may have dropped the entry since.
    """
    ended = (own.fence, own.holder, own.outcome)
    if any((entry.fence, entry.holder, entry.outcome) == ended for entry in entries):
        return True
    kept = [entry for entry in entries if is_duplicate(entry) == is_duplicate(own)]
    reaches_back = any(entry.fence <= own.fence for entry in kept)
    return False if reaches_back or len(entries) >= run_count else None


def describe(error: BaseException) -> str:
    """An error in one short line."""
    try:
        message = str(error)
    except Exception:  # a user's error may not even have a text
        message = "(its text cannot be made)"
    text = " ".join(f"{type(error).__name__}: {message}".split())[:MAX_ERROR_LENGTH]
    # Half an emoji cannot be encoded, and the end of a run must be recorded all the same.
    return text.encode("utf-8", "backslashreplace").decode()
