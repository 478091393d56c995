"""Ticks: a tick is one due time of one schedule entry.

This module writes a tick into the headers of its message and reads it back. The message's task id
is computed from the entry's name and the due time. So all messages of a tick have the same task id,
whichever beat sends them.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from celery.app.task import Context
from celery.beat import ScheduleEntry

from .headers import DUE, ENTRY, ONE_BY_ONE, PREVIOUS, SENT, header
from .text.visible import encodable

#: The names of headers that beat adds. ``enqueue_once`` applies to a message with these headers,
#: but not to a message with other headers of its sender. ``singleton_one_by_one`` is left out,
#: because a tick with that header must be sent in any case.
BEAT_HEADERS = frozenset({ENTRY, DUE, PREVIOUS, "celery_beat_task", "periodic_task_name"})

#: The namespace of the version 5 UUIDs that are the task ids of ticks. It is a random constant.
_NAMESPACE = uuid.UUID("1d7c7bfb-7e5c-4f0e-9f0f-3c6c8f5b6f0a")


class Tick(msgspec.Struct, frozen=True, array_like=True):
    """One due time of one schedule entry.

    :param entry: ``schedule:entry``, the names of the schedule and of the entry.
    :param due: the due time in seconds since the epoch.
    """

    entry: str
    due: float

    def __str__(self) -> str:
        return f"{datetime.fromtimestamp(self.due, UTC):%Y-%m-%d %H:%M:%S} of {self.entry}"


def entry_name(schedule: str, entry: str) -> str:
    """Return the name of a schedule entry in messages and rows: ``schedule:entry``."""
    return encodable(f"{schedule}:{entry}")


def task_id_of(schedule: str, entry: str, due: datetime) -> str:
    """Return the task id of a tick's message, which is the same in every beat."""
    name = f"{entry_name(schedule, entry)}:{due.astimezone(UTC).isoformat()}"
    return str(uuid.uuid5(_NAMESPACE, name))


def message_of(
    entry: ScheduleEntry,
    schedule: str,
    due: datetime,
    previous: datetime | None = None,
    one_by_one: bool = False,
    begins_anew: bool = False,
) -> ScheduleEntry:
    """Return a copy of a schedule entry whose message carries one tick in its headers and task id.

    :param entry: the entry; it is not changed.
    :param schedule: the schedule's name.
    :param due: the tick's due time.
    :param previous: the due time of the tick that beat sent before this one; ``None`` if there was
        none.
    :param one_by_one: whether beat sends the entry's next tick only when this tick has ended.
    :param begins_anew: whether the tick's work starts from its beginning, because the message that
        was to continue it is lost. The message then gets a new value of ``singleton_sent``, so that
        it is not refused as a duplicate of the run that sent the lost message.
    """
    name, options = str(entry.name), entry.options or {}
    headers: dict[str, Any] = {**(options.get("headers") or {}), **_headers_of(schedule, name, due)}
    if previous is not None:
        headers[PREVIOUS] = previous.astimezone(UTC).isoformat()
    if one_by_one:
        headers[ONE_BY_ONE] = 1
    if begins_anew:
        headers[SENT] = str(uuid.uuid4())
    # copy.copy() cannot be used: Celery's entries lose their app when they are copied or pickled.
    made: ScheduleEntry = object.__new__(type(entry))
    made.__dict__.update(entry.__dict__)
    made.options = {
        **options,
        "headers": headers,
        "task_id": task_id_of(schedule, name, due),
    }
    return made


def _headers_of(schedule: str, entry: str, due: datetime) -> dict[str, str]:
    """Return the headers that identify the tick of a message."""
    return {ENTRY: entry_name(schedule, entry), DUE: due.astimezone(UTC).isoformat()}


def due_of(request: Context) -> datetime | None:
    """Return the due time of a message's tick, in UTC; ``None`` if the message is for no tick."""
    text = header(request, DUE)
    return None if text is None else datetime.fromisoformat(text)


def previous_of(request: Context) -> float | None:
    """Return the due time of the tick that beat sent before a message's tick.

    :returns: seconds since the epoch; ``None`` if the message does not name the earlier tick.
    """
    text = header(request, PREVIOUS)
    return None if text is None else datetime.fromisoformat(text).timestamp()


def tick_in(headers: Mapping[str, Any]) -> Tick | None:
    """Return the tick that a message is for; ``None`` if it is for no tick.

    :param headers: this package's headers of the message.
    """
    due = headers.get(DUE)
    return None if due is None else Tick(headers[ENTRY], datetime.fromisoformat(due).timestamp())
