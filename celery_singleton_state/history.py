"""The last runs of a singleton, kept in its row as compact JSON.

Its only writer is the holder of the lease, which appends to what it loaded, so keeping it
costs no round trip. It answers three questions: was this message already done, was my
unanswered commit mine, and what ran when.
"""

from __future__ import annotations

import logging
from enum import StrEnum

import msgspec

logger = logging.getLogger(__name__)

MAX_ERROR_LENGTH = 200


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

    A task's retries carry its id. Those that its body asked for are new work, and each counts
    as a new *generation*; those that this package sent, to repeat a run, belong to the same.
    """

    task_id: str | None
    generation: int
    holder: str
    fence: int
    tick: float | None
    outcome: str
    error: str | None
    started: float
    finished: float


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
    """The JSON of the newest ``limit`` entries, the new one among them."""
    return msgspec.json.encode((*entries, entry)[-limit:]).decode()


def is_done(entries: tuple[Entry, ...], task_id: str, generation: int) -> bool:
    """Whether this work, or a later generation of it, is known to have been done."""
    return any(
        entry.task_id == task_id and entry.generation >= generation and entry.outcome in DONE
        for entry in entries
    )


def written_by(entries: tuple[Entry, ...], fence: int, holder: str) -> bool:
    """Whether the holder of this lease has already ended its run here."""
    return any(entry.fence == fence and entry.holder == holder for entry in entries)


def describe(error: BaseException) -> str:
    """An error in one short line."""
    try:
        message = str(error)
    except Exception:  # a user's error may not even have a text
        message = "(its text cannot be made)"
    text = " ".join(f"{type(error).__name__}: {message}".split())
    return text[:MAX_ERROR_LENGTH]
