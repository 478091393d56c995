"""What a singleton's row knows of ticks: for each schedule entry which ones are done.

The history forgets a run after 16 others. This record does not: it has the spans of time in which
all ticks that were sent are done. A message names the tick that was sent before its own, so a run
whose tick directly follows a span makes it longer, and ticks that end in order leave one span.
A tick that has not ended leaves a gap between two spans, until it ends.

The only writer is the holder of the lease, in the statement that releases it.
"""

from __future__ import annotations

import msgspec

from .text.storable import from_json, to_json
from .text.visible import logger_of, visible
from .ticks import Tick

logger = logger_of(__name__)

#: Entries in one row at most. The entry whose ticks ended longest ago is forgotten first.
MAX_ENTRIES = 1000
#: Ticks that are kept besides the spans.
MAX_OTHERS = 100
#: Due times differ by no less, in seconds.
RESOLUTION = 1e-6

#: All ticks later than the first moment and not later than the second, in seconds since the epoch.
Span = tuple[float, float]


class EntryTicks(msgspec.Struct, array_like=True, frozen=True):
    """What is known of the ticks of one schedule entry.

    :param done: spans in which all ticks that were sent are done; in order, none touches another.
    :param failed: due times of ticks that ended for good, but did not succeed; the newest last.
    :param retried: due times of ticks whose run asked for a retry that has not ended.
    """

    done: tuple[Span, ...] = ()
    failed: tuple[float, ...] = ()
    retried: tuple[float, ...] = ()

    def is_done(self, due: float) -> bool:
        """Whether a tick is done, or was left out when a later one was sent."""
        return due not in self.retried and any(start < due <= end for start, end in self.done)

    def has_ended(self, due: float) -> bool:
        """Whether a tick is done, or failed for good."""
        return due in self.failed or self.is_done(due)

    def reaches_back_to(self, due: float) -> bool:
        """Whether a tick would be known here if it had been done."""
        return bool(self.done) and due > self.done[0][0]

    def with_done(self, due: float, previous: float | None) -> EntryTicks:
        """A tick is done.

        :param previous: the tick that was sent before; ``None`` if that is not known.
        """
        if previous is None or previous >= due:
            previous = due - RESOLUTION
        return EntryTicks(
            _merged(self.done, (previous, due)),
            _without(self.failed, due),
            _without(self.retried, due),
        )

    def with_failed(self, due: float) -> EntryTicks:
        """A tick ended for good, and did not succeed."""
        failed = (*_without(self.failed, due), due)[-MAX_OTHERS:]
        return EntryTicks(self.done, failed, _without(self.retried, due))

    def with_retried(self, due: float) -> EntryTicks:
        """A tick's run asked for a retry."""
        retried = (*_without(self.retried, due), due)[-MAX_OTHERS:]
        return EntryTicks(self.done, _without(self.failed, due), retried)

    def with_at_most(self, spans: int) -> EntryTicks:
        """The same with no more spans than so many; the oldest gaps count as done."""
        surplus = len(self.done) - spans
        if surplus <= 0:
            return self
        first = (self.done[0][0], self.done[surplus][1])
        return msgspec.structs.replace(self, done=(first, *self.done[surplus + 1 :]))


def _merged(spans: tuple[Span, ...], new: Span) -> tuple[Span, ...]:
    start, end = new
    before = [span for span in spans if span[1] < start]
    after = [span for span in spans if span[0] > end]
    touched = spans[len(before) : len(spans) - len(after)]
    if touched:
        start, end = min(start, touched[0][0]), max(end, touched[-1][1])
    return (*before, (start, end), *after)


def _without(dues: tuple[float, ...], due: float) -> tuple[float, ...]:
    return tuple(other for other in dues if other != due)


#: By the entry's name, after that of its schedule; the one that changed last is the last.
TicksDone = dict[str, EntryTicks]

_decoder = msgspec.json.Decoder(TicksDone)


def decode(raw: str | None, name: str) -> TicksDone:
    """What a row knows of ticks.

    What cannot be read counts as nothing known, with a warning, as with the history.
    """
    if not raw:
        return {}
    try:
        return from_json(raw, _decoder)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        text = "singleton %s: its ticks_done cannot be read and starts anew: %s"
        logger.warning(text, visible(name), error)
        return {}


def encode(known: TicksDone, tick: Tick, ticks: EntryTicks) -> str:
    """The JSON of what is known, with what is new of the entry of a tick."""
    others = {entry: own for entry, own in known.items() if entry != tick.entry}
    for entry in list(others)[: max(0, len(others) + 1 - MAX_ENTRIES)]:
        del others[entry]
    return to_json({**others, tick.entry: ticks})
