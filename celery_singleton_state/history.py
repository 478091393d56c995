"""The history: the last runs of a singleton, kept in its row as compact JSON.

The holder of the lease is the only writer. It loads the history together with the state and appends
its own run when it releases the lease, so the history costs no request of its own. The history
answers three questions:

- Is this message a duplicate, because its work is already done?
- If the answer to a commit was lost: did the commit take effect?
- What ran when?
"""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum

import msgspec

from .text.storable import from_json, to_json
from .text.visible import encodable, logger_of, visible
from .ticks import Tick

logger = logger_of(__name__)

#: The longest error text of a run, in characters.
MAX_ERROR_LENGTH = 200
#: How many runs in a history keep their results: the newest runs. The number is small, so that the
#: row stays small.
RESULTS = 4
#: The error text of a run whose process died.
DIED = "its process died"


class Outcome(StrEnum):
    """How a delivery of a singleton's message ended, as the history and the events name it."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRIED = "retried"
    LOST = "lost"
    SKIPPED = "skipped"
    DUPLICATE = "duplicate"


#: The outcomes of an entry that mean that the work of the message is done.
DONE = frozenset({Outcome.SUCCEEDED, Outcome.DUPLICATE})


class Kept(msgspec.Struct, array_like=True, frozen=True):
    """A body's result, serialized by kombu.

    :param content_type: the content type that kombu's serializer has given.
    :param encoding: the text's encoding, as kombu names it; ``base64`` if kombu made bytes.
    :param text: the serialized result.
    """

    content_type: str
    encoding: str
    text: str


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One past run, or one message that was refused as a duplicate.

    All retries of a message have its task id. A retry that the body asked for begins a new
    *generation* of the message. A retry that this package sent, to repeat a failed run, belongs to
    the generation of that run.

    :param started: seconds since the epoch, by the store's clock. ``finished`` likewise.
    :param sent: the value that tells the message from others with the same task id; ``None`` if the
        message has none.
    :param result: what the body returned, if the result was kept.
    :param deaths: how many processes have died in runs of this message since the last run that
        ended by itself; 0 if this run ended by itself.
    :param final: true if the body sent no further message with the run's task id: no retry and no
        replacement. If a final run succeeded, every later message with this task id is a duplicate,
        whatever the generation of the later message.
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
    """Return the entries of a history, the oldest first.

    A history that cannot be read counts as empty, and a warning is logged. The singleton goes on,
    because the history is only a record of its runs, and stopping would do more harm.

    :param raw: the history as JSON; ``None`` if the row has none.
    :param name: the singleton's name or key, for the warning.
    """
    if not raw:
        return ()
    try:
        return _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeError):
        pass  # try from_json(): it is slower, but also reads texts that are not well-formed Unicode
    try:
        return from_json(raw, _decoder)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        text = "singleton %s: its history cannot be read, and begins again empty: %s"
        logger.warning(text, visible(name), error)
        return ()


def append(entries: tuple[Entry, ...], entry: Entry, limit: int) -> str:
    """Return a history with one more entry, as JSON.

    The newest ``limit`` runs and the newest ``limit`` duplicates are kept. The two kinds are
    counted separately, so that duplicates never evict the entry of the run that did their work:
    later duplicates are recognised by this entry. Only the newest
    :data:`RESULTS` results are kept.

    The JSON is ASCII, so that a database of any encoding can hold the text of an error.
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
    """Whether an entry stands for a message that was refused as a duplicate."""
    return entry.outcome == Outcome.DUPLICATE


def is_run(entry: Entry) -> bool:
    """Whether an entry stands for a run of a body, and not for a duplicate."""
    return not is_duplicate(entry)


def done_by(
    entries: tuple[Entry, ...], task_id: str, generation: int, sent: str | None = None
) -> Entry | None:
    """Return the entry of the run that did a message's work, or the work of a later retry of it.

    If no such run is in the history any more, return the entry of a delivery that ended as a
    duplicate of the message. It also proves that the work is done, but it has no result.

    :param generation: the message's generation, see :class:`Entry`.
    :param sent: the value that tells messages with the same task id apart. A run with the same id
        and another value did other work. ``None``: the id alone is compared.
    :returns: ``None`` if the history does not show that the work is done.
    """
    done = [
        entry
        for entry in reversed(_of_message(entries, task_id, sent))
        if entry.outcome in DONE and (entry.final or entry.generation >= generation)
    ]
    return next(filter(is_run, done), next(iter(done), None))


def deaths_of(entries: tuple[Entry, ...], task_id: str | None, sent: str | None) -> int:
    """Return how many processes have died in runs of a message.

    Only runs after the message's last run that ended by itself count.
    """
    own = _of_message(entries, task_id, sent)
    return own[-1].deaths if own else 0


def _of_message(entries: tuple[Entry, ...], task_id: str | None, sent: str | None) -> list[Entry]:
    """Return the entries of a message, the oldest first.

    :param sent: as in :func:`done_by`.
    """
    return [
        entry
        for entry in entries
        if entry.task_id == task_id and (sent is None or entry.sent == sent)
    ]


def begun_by(
    entries: tuple[Entry, ...], task_id: str, generation: int, sent: str | None = None
) -> Entry | None:
    """Return the newest run of a message or of a later generation of it, however the run ended.

    :param sent: the value that tells messages with the same task id apart, as in :func:`done_by`.
    :returns: ``None`` if the history has no such run.
    """
    for entry in reversed(_of_message(entries, task_id, sent)):
        if is_run(entry) and entry.generation >= generation:
            return entry
    return None


def has_passed(entries: tuple[Entry, ...], tick: Tick, limit: int) -> bool:
    """Whether a tick is older than all ticks of its schedule entry in a full history.

    Such a tick may have been done, and the history may have dropped its run. So the tick must not
    run. The caller asks only if the row's ``ticks_done`` cannot tell whether the tick is done.

    :param limit: the number of runs that the history keeps.
    """
    runs = [run for run in entries if is_run(run)]
    known = [run.tick.due for run in runs if run.tick and run.tick.entry == tick.entry]
    return len(runs) >= limit and bool(known) and tick.due < min(known)


def has_ended(entries: tuple[Entry, ...], own: Entry, run_count: int) -> bool | None:
    """Find out whether a release of the lease took effect if the store's answer was lost.

    An entry with the run's fence but another outcome does not come from the run: an operator, for
    example, has released the lease.

    :param entries: the row's present history.
    :param own: the entry that the release would have added to the history.
    :param run_count: how many entries were ever added to the row's history.
    :returns: ``None`` if the outcome is unknown: the entry may have been added and dropped since.
    """
    ended = (own.fence, own.holder, own.outcome)
    if any((entry.fence, entry.holder, entry.outcome) == ended for entry in entries):
        return True
    kept = [entry for entry in entries if is_duplicate(entry) == is_duplicate(own)]
    reaches_back = any(entry.fence <= own.fence for entry in kept)
    return False if reaches_back or len(entries) >= run_count else None


def describe(error: BaseException) -> str:
    """Describe an error in one line of at most :data:`MAX_ERROR_LENGTH` characters."""
    try:
        message = str(error)
    except Exception:  # the error is of a user's class, whose __str__ can raise anything
        message = "(its text cannot be made)"
    text = " ".join(f"{type(error).__name__}: {message}".split())[:MAX_ERROR_LENGTH]
    # The text can contain an unpaired surrogate, which no database accepts. But the end of the run
    # must be recorded, so the surrogate is escaped.
    return encodable(text)
