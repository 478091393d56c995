"""The last runs of a singleton, kept in its row as compact JSON.

Its only writer is the holder of the lease, which appends to what it loaded, so keeping it
costs no round trip. It answers three questions: was this message already done, was my
unanswered commit mine, and what ran when.
"""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum

import msgspec

from .text.storable import from_json, to_json
from .text.visible import encodable, logger_of, visible
from .ticks import Tick

logger = logger_of(__name__)

MAX_ERROR_LENGTH = 200
#: How many of the newest runs keep their results, so that the row stays small.
RESULTS = 4
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


class Kept(msgspec.Struct, array_like=True, frozen=True):
    """A result as kombu serialized it.

    :param encoding: of the text; ``base64`` stands for bytes.
    """

    content_type: str
    encoding: str
    text: str


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One past run. Times are seconds since the epoch, by the store's clock at acquisition.

    A task's retries carry its id. Those that its body asked for each count as a new *generation*;
    those that this package sent, to repeat a run, belong to the same.

    :param sent: the value that tells messages with the same id apart, if the message has one.
    :param result: what the body returned, if it was kept.
    :param deaths: of a run whose process died: how many died for its message, one after the other.
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
    sent: str | None = None
    result: Kept | None = None
    deaths: int = 0


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
    except (msgspec.DecodeError, UnicodeError):
        pass  # odd texts take another way
    try:
        return from_json(raw, _decoder)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        text = "singleton %s: its history cannot be read and starts anew: %s"
        logger.warning(text, visible(name), error)
        return ()


def append(entries: tuple[Entry, ...], entry: Entry, limit: int) -> str:
    """The JSON of the newest ``limit`` runs, and of as many duplicates, the new one among them.

    It is ASCII, so that no database refuses it, whatever an error says.

    What was refused as a duplicate must not push out what it is known by. Only the newest
    :data:`RESULTS` results are kept.
    """
    runs = duplicates = results = 0
    kept = []
    for each in reversed((*entries, entry)):
        if each.outcome == Outcome.DUPLICATE:
            duplicates += 1
            if duplicates > limit:
                continue
        else:
            runs += 1
            if runs > limit:
                continue
        if each.result is not None:
            results += 1
            if results > RESULTS:
                each = msgspec.structs.replace(each, result=None)
        kept.append(each)
    kept.reverse()
    with suppress(UnicodeEncodeError):
        text = msgspec.json.encode(kept).decode()
        if text.isascii():
            return text
    return to_json(kept)


def is_duplicate(entry: Entry) -> bool:
    """Whether it is of a message that was done before."""
    return entry.outcome == Outcome.DUPLICATE


def is_run(entry: Entry) -> bool:
    """Whether a body ran."""
    return not is_duplicate(entry)


def done_by(
    entries: tuple[Entry, ...], task_id: str, generation: int, sent: str | None = None
) -> Entry | None:
    """The run that did this work, or a later generation of it, if one is known.

    The run itself is preferred to a duplicate of it, which has no result.

    :param sent: the message's own value. A run of a message that has the same id and another value
        did other work.
    """
    done = [
        entry
        for entry in reversed(_of_message(entries, task_id, sent))
        if entry.outcome in DONE and (entry.final or entry.generation >= generation)
    ]
    return next(filter(is_run, done), next(iter(done), None))


def deaths_of(entries: tuple[Entry, ...], task_id: str | None, sent: str | None) -> int:
    """How many processes have died in runs of this message, one after the other."""
    own = _of_message(entries, task_id, sent)
    return own[-1].deaths if own else 0


def _of_message(entries: tuple[Entry, ...], task_id: str | None, sent: str | None) -> list[Entry]:
    """The runs of a message, in order; most often there are none."""
    return [
        entry
        for entry in entries
        if entry.task_id == task_id and (sent is None or entry.sent == sent)
    ]


def begun_by(
    entries: tuple[Entry, ...], task_id: str, generation: int, sent: str | None = None
) -> Entry | None:
    """The run that began this work, or a later generation of it, however it ended.

    :param sent: the message's own value, as for :func:`done_by`.
    """
    for entry in reversed(_of_message(entries, task_id, sent)):
        if is_run(entry) and entry.generation >= generation:
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
    return encodable(text)
