"""The state of a schedule entry in the store: what it contains, and how it is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated

import msgspec

from celery_singleton_state.text.storable import from_json
from celery_singleton_state.text.visible import logger_of, visible

logger = logger_of(__name__)

#: The time that stands for the last run time of an entry that has never run, in comparisons.
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: The time that stands for the next tick of a schedule that is never due again.
NEVER = datetime.max.replace(tzinfo=UTC)
#: The type of all times here: a datetime with a time zone, because Python cannot compare it with a
#: datetime without a time zone.
Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class EntryState(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of a schedule entry, which the store keeps as JSON in a row of its own.

    :param entry: the name of the entry.
    :param task: the name of the task.
    :param schedule: the schedule as a text.
    :param next_tick: the tick that is due next; ``None`` if the schedule is never due again.
    :param last_tick: the newest tick that was sent.
    :param last_run_at: the time when ``last_tick`` was sent.
    :param total_run_count: how many ticks were sent.
    :param missed_count: how many ticks were not sent, because of the rules for missed ticks.
    :param previous_tick: the tick that was sent before ``last_tick``.
    :param under_way: the key of the singleton's row that will show the end of ``last_tick``;
        ``None`` if ``last_tick`` has ended, or if no beat waits for its end.
    :param since: the time from which a schedule that overrides ``is_due`` counts: its last due
        time, or the time when a beat first saw the entry. For such a schedule, ``next_tick`` is the
        next time at which the beat asks it.
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
        """Whether this state is earlier than another one; false if the schedules differ."""
        if self.schedule != other.schedule:
            return False
        if self.next_tick is None or other.next_tick is None:
            # Compare the last run times, because there is no next tick to compare: a schedule
            # without a next tick is never due again, or cannot tell its next tick.
            return (self.last_run_at or EPOCH) < (other.last_run_at or EPOCH)
        return self.next_tick < other.next_tick


_decoder = msgspec.json.Decoder(EntryState)


def decode_rows(rows: Mapping[str, str]) -> dict[str, EntryState]:
    """Decode the rows of entries. A row that cannot be decoded is left out with a warning.

    :param rows: maps the key of each row to the row's JSON.
    :returns: a dict that maps the name of each entry to the entry's state.
    """
    found = {}
    for key, value in rows.items():
        try:
            state = from_json(value, _decoder)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            name = visible(key)
            logger.warning(
                "beat: the row %s cannot be read, so its entry starts like a new one: %s",
                *(name, error),
            )
        else:
            found[state.entry] = state
    return found


def unknown_to(
    stored: Mapping[str, EntryState], own: Mapping[str, EntryState]
) -> dict[str, EntryState]:
    """Return the unrecorded states of this beat that no later stored state supersedes.

    :param stored: maps the names of entries to their states in the store.
    :param own: maps the names of entries to the states that this beat could not record.
    """
    return {
        name: state
        for name, state in own.items()
        if name not in stored or stored[name].is_before(state)
    }
