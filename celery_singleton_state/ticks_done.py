"""The row's column ``ticks_done``: for each schedule entry, which of its ticks are done.

The history keeps the last 16 runs only, by default. This record keeps all ticks, in little space:
for each entry it has *spans* of time in which every tick that was sent is done. A tick's message
names the tick that was sent before it, so a tick that directly follows a span extends that span.
Ticks that end in order leave a single span. A tick that has not ended leaves a gap between two
spans until it ends.

Only the holder of the lease writes the record, in the statement that releases the lease.
"""

from __future__ import annotations

import msgspec

from .text.storable import from_json, to_json
from .text.visible import logger_of, visible
from .ticks import Tick

logger = logger_of(__name__)

#: The largest number of schedule entries in one row. If there are more, the schedule entry whose
#: ticks ended longest ago is removed.
MAX_ENTRIES = 1000
#: The largest number of failed ticks, and also of retried ticks, that a schedule entry keeps.
MAX_OTHERS = 100
#: The smallest difference between two due times, in seconds: the resolution of a ``datetime``.
RESOLUTION = 1e-6

#: A span of time, from a first time (excluded) to a second time (included), both in seconds since
#: the epoch.
Span = tuple[float, float]


class EntryTicks(msgspec.Struct, array_like=True, frozen=True):
    """Which ticks of one schedule entry are done, have failed or are being retried.

    :param done: the spans in which all ticks that were sent are done, in order of time. There is a
        gap between any two of them.
    :param failed: due times of ticks that failed and are not retried; the newest last.
    :param retried: due times of ticks whose run asked for a retry that has not ended yet.
    """

    done: tuple[Span, ...] = ()
    failed: tuple[float, ...] = ()
    retried: tuple[float, ...] = ()

    def is_done(self, due: float) -> bool:
        """Whether a tick is done, or beat has skipped the tick and sent a later one."""
        return due not in self.retried and any(start < due <= end for start, end in self.done)

    def has_ended(self, due: float) -> bool:
        """Whether a tick is done, or has failed and is not retried."""
        return due in self.failed or self.is_done(due)

    def reaches_back_to(self, due: float) -> bool:
        """Whether the record covers a tick's due time, and so would show that the tick is done."""
        return bool(self.done) and due > self.done[0][0]

    def with_done(self, due: float, previous: float | None) -> EntryTicks:
        """Return the record with one more tick done.

        :param previous: the due time of the tick that beat sent before this one; ``None`` if it is
            unknown.
        """
        if previous is None or previous >= due:
            previous = due - RESOLUTION
        return EntryTicks(
            _merged(self.done, (previous, due)),
            _without(self.failed, due),
            _without(self.retried, due),
        )

    def with_failed(self, due: float) -> EntryTicks:
        """Return the record with one more tick that failed and is not retried."""
        failed = (*_without(self.failed, due), due)[-MAX_OTHERS:]
        return EntryTicks(self.done, failed, _without(self.retried, due))

    def with_retried(self, due: float) -> EntryTicks:
        """Return the record with one more tick whose run asked for a retry."""
        retried = (*_without(self.retried, due), due)[-MAX_OTHERS:]
        return EntryTicks(self.done, _without(self.failed, due), retried)

    def with_at_most(self, spans: int) -> EntryTicks:
        """Return the record with at most this many spans.

        The oldest spans are joined, so ticks in the gaps between them count as done.
        """
        surplus = len(self.done) - spans
        if surplus <= 0:
            return self
        first = (self.done[0][0], self.done[surplus][1])
        return msgspec.structs.replace(self, done=(first, *self.done[surplus + 1 :]))


def _merged(spans: tuple[Span, ...], new: Span) -> tuple[Span, ...]:
    """Return the spans with a new span, after joining the new span with every span it touches."""
    start, end = new
    before = [span for span in spans if span[1] < start]
    after = [span for span in spans if span[0] > end]
    touched = spans[len(before) : len(spans) - len(after)]
    if touched:
        start, end = min(start, touched[0][0]), max(end, touched[-1][1])
    return (*before, (start, end), *after)


def _without(dues: tuple[float, ...], due: float) -> tuple[float, ...]:
    return tuple(other for other in dues if other != due)


#: The record of a whole row. It maps the name of each schedule entry (``schedule:entry``) to which
#: of the entry's ticks are done. The schedule entry that changed last comes last.
TicksDone = dict[str, EntryTicks]

_decoder = msgspec.json.Decoder(TicksDone)


def decode(raw: str | None, name: str) -> TicksDone:
    """Return the record in a row's column ``ticks_done``.

    A record that cannot be read counts as empty, and a warning is logged.

    :param raw: the record as JSON; ``None`` if the row has none.
    :param name: the singleton's name, for the warning.
    """
    if not raw:
        return {}
    try:
        return from_json(raw, _decoder)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        text = "singleton %s: its ticks_done cannot be read, and begins again empty: %s"
        logger.warning(text, visible(name), error)
        return {}


def encode(known: TicksDone, tick: Tick, ticks: EntryTicks) -> str:
    """Return the record as JSON, with a new value for one schedule entry.

    :param known: the record that was loaded.
    :param tick: a tick of the schedule entry, which names the entry.
    :param ticks: the new value.
    """
    others = {entry: own for entry, own in known.items() if entry != tick.entry}
    for entry in list(others)[: max(0, len(others) + 1 - MAX_ENTRIES)]:
        del others[entry]
    return to_json({**others, tick.entry: ticks})
