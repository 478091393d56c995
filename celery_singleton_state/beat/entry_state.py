"""What the store keeps of a schedule's entry."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated

import msgspec

from celery_singleton_state.text.storable import from_json
from celery_singleton_state.text.visible import logger_of, visible

logger = logger_of(__name__)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: The next tick of a schedule that is never due again.
NEVER = datetime.max.replace(tzinfo=UTC)
#: A time without a zone could not be compared with any other.
Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class EntryState(msgspec.Struct, frozen=True, omit_defaults=True):
    """An entry's row, as JSON.

    :param entry: its name.
    :param schedule: its schedule as a text.
    :param next_tick: which is due next; ``None`` for a schedule that is never due again.
    :param last_tick: the newest that was sent, ``last_run_at`` when that was.
    :param missed_count: ticks that were not sent, as the entry's rules for missed ones say.
    :param previous_tick: the one that was sent before ``last_tick``.
    :param under_way: the key of the row that is to say when ``last_tick`` has ended; ``None`` if it
        has said so, or if nobody waits for it.
    :param since: what a schedule with an ``is_due`` of its own counts from: its last due time, or
        when a beat first saw it. ``next_tick`` is then when the schedule is to be asked.
    """

    entry: str
    task: str
    schedule: str
    next_tick: Moment | None = None
    last_tick: Moment | None = None
    last_run_at: Moment | None = None
    total_run_count: int = 0
    missed_count: int = 0
    previous_tick: Moment | None = None
    under_way: str | None = None
    since: Moment | None = None

    def is_before(self, other: EntryState) -> bool:
        """Whether the other is what has become of it later."""
        if self.schedule != other.schedule:
            return False
        if self.next_tick is None or other.next_tick is None:
            # A schedule that is never due again, or cannot tell when it is.
            return (self.last_run_at or EPOCH) < (other.last_run_at or EPOCH)
        return self.next_tick < other.next_tick


_decoder = msgspec.json.Decoder(EntryState)


def decode_rows(rows: Mapping[str, str]) -> dict[str, EntryState]:
    """The entries of rows by key, by their names; with a warning for one that cannot be read."""
    found = {}
    for key, value in rows.items():
        try:
            state = from_json(value, _decoder)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            name = visible(key)
            logger.warning("beat: %s cannot be read and starts anew: %s", name, error)
        else:
            found[state.entry] = state
    return found


def unknown_to(
    stored: Mapping[str, EntryState], own: Mapping[str, EntryState]
) -> dict[str, EntryState]:
    """Of what this beat did and could not record, that after which nobody did more."""
    return {
        name: state
        for name, state in own.items()
        if name not in stored or stored[name].is_before(state)
    }
