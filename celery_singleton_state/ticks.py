"""Ticks: what a message carries of the schedule entry that it is for, and what a run asks of it.

A tick is one due time of one entry. Its task id follows from both, and so the same tick has the
same id whichever beat sends it, and however often.
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

#: Beat's own headers, which do not make a message a part of a larger work. A tick that must not be
#: skipped is sent in any case, so its own header is not among them.
BEAT_HEADERS = frozenset({ENTRY, DUE, PREVIOUS, "celery_beat_task", "periodic_task_name"})

_NAMESPACE = uuid.UUID("1d7c7bfb-7e5c-4f0e-9f0f-3c6c8f5b6f0a")


class Tick(msgspec.Struct, frozen=True, array_like=True):
    """One due time of one entry.

    :param entry: its name, after that of its schedule.
    :param due: seconds since the epoch.
    """

    entry: str
    due: float

    def __str__(self) -> str:
        return f"{datetime.fromtimestamp(self.due, UTC):%Y-%m-%d %H:%M:%S} of {self.entry}"


def entry_name(schedule: str, entry: str) -> str:
    """An entry's name after that of its schedule, as messages and rows have it."""
    return encodable(f"{schedule}:{entry}")


def task_id_of(schedule: str, entry: str, due: datetime) -> str:
    """The id of a tick's message."""
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
    """An entry as it is sent for one of its ticks, by the schedule of this name.

    :param previous: the tick that was sent before, if there was one.
    :param one_by_one: whether the next tick is sent when this one has ended.
    :param begins_anew: whether the tick's work is done from its start. The message that was to go
        on with it is lost, and the run that sent that message is no reason to refuse this one.
    """
    name, options = str(entry.name), entry.options or {}
    headers: dict[str, Any] = {**(options.get("headers") or {}), **_headers_of(schedule, name, due)}
    if previous is not None:
        headers[PREVIOUS] = previous.astimezone(UTC).isoformat()
    if one_by_one:
        headers[ONE_BY_ONE] = 1
    if begins_anew:
        headers[SENT] = str(uuid.uuid4())
    # Not a copy: Celery's entries leave their app behind when they are copied.
    made: ScheduleEntry = object.__new__(type(entry))
    made.__dict__.update(entry.__dict__)
    made.options = {
        **options,
        "headers": headers,
        "task_id": task_id_of(schedule, name, due),
    }
    return made


def _headers_of(schedule: str, entry: str, due: datetime) -> dict[str, str]:
    """What a tick's message carries of it."""
    return {ENTRY: entry_name(schedule, entry), DUE: due.astimezone(UTC).isoformat()}


def due_of(request: Context) -> datetime | None:
    """The due time that a message is for, in UTC; ``None`` if no beat of ours sent it."""
    text = header(request, DUE)
    return None if text is None else datetime.fromisoformat(text)


def previous_of(request: Context) -> float | None:
    """The tick that was sent before the message's own, in seconds since the epoch, if known."""
    text = header(request, PREVIOUS)
    return None if text is None else datetime.fromisoformat(text).timestamp()


def tick_in(headers: Mapping[str, Any]) -> Tick | None:
    """The tick that a message with these headers of ours is for."""
    due = headers.get(DUE)
    return None if due is None else Tick(headers[ENTRY], datetime.fromisoformat(due).timestamp())
