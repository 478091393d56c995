"""What an entry of ``beat_schedule`` may hold: a bad value is refused when the beat starts.

Otherwise Celery would find it at each tick, or the beat would end over it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Any

from celery.beat import ScheduleEntry
from celery.exceptions import ImproperlyConfigured
from celery.utils.time import maybe_iso8601

RULES = ("skip_if_older_than", "catch_up", "next_from")
#: What Celery's entries take, and what ours take besides.
FIELDS = (
    *("task", "schedule", "args", "kwargs", "options", "relative", *RULES),
    *("name", "app", "last_run_at", "total_run_count"),
)
#: Longer times lead out of the calendar.
LONGEST = timedelta(days=36525).total_seconds()


def fields_of(entries: Any) -> dict[str, Any]:
    """The fields of all entries of a ``beat_schedule``, by name.

    :raises ImproperlyConfigured: it is no schedule, or one of its entries is no entry.
    """
    if not entries:
        return {}
    if not isinstance(entries, Mapping):
        raise ImproperlyConfigured(
            f"beat_schedule={entries!r} is not allowed; it takes a dict of entries by their names"
        )
    return {name: _fields(name, entry) for name, entry in entries.items()}


def _fields(name: Any, entry: Any) -> dict[str, Any]:
    if isinstance(entry, ScheduleEntry):
        return {field: value for field, value in vars(entry).items() if field in FIELDS}
    if isinstance(entry, Mapping):
        return dict(entry)
    raise ImproperlyConfigured(
        f"schedule entry {name!r}: {entry!r} is no entry; it takes a dict with at least 'task' and"
        " 'schedule'"
    )


def check(name: Any, task: Any, options: Any, fields: Mapping[str, Any]) -> None:
    """See that the values of an entry can be sent.

    :raises ImproperlyConfigured: names the entry, the field and its value, and what is allowed.
    """
    _refuse_unless(_is_text(name), name, "name", name, "a text, which is not empty")
    unknown = [field for field in fields if field not in FIELDS]
    if unknown:
        raise ImproperlyConfigured(
            f"schedule entry {name!r}: {', '.join(map(repr, unknown))} is not known; an entry"
            f" takes {', '.join(FIELDS[:9])}"
        )
    _refuse_unless(_is_text(task), name, "task", task, "the name of a task")
    checks: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
        ("args", fields.get("args"), _is_args, "a list or a tuple, as ('a',)"),
        ("kwargs", fields.get("kwargs"), _is_dict, "a dict by the arguments' names"),
        ("options", options, _is_dict, "a dict of the message's options"),
        ("last_run_at", fields.get("last_run_at"), _is_moment, "a datetime"),
        ("total_run_count", fields.get("total_run_count"), _is_int, "a whole number"),
    )
    for field, value, is_allowed, allowed in checks:
        _refuse_unless(not value or is_allowed(value), name, field, value, allowed)
    for option, (is_allowed, allowed) in OPTIONS.items():
        value = (options or {}).get(option)
        known = f"options[{option!r}]"
        _refuse_unless(value is None or is_allowed(value), name, known, value, allowed)


def _refuse_unless(is_allowed: bool, entry: Any, field: str, value: Any, allowed: str) -> None:
    if not is_allowed:
        raise ImproperlyConfigured(
            f"schedule entry {entry!r}: {field}={value!r} is not allowed; it takes {allowed}"
        )


def _is_text(value: Any) -> bool:
    """Whether a value is a text that a database can store."""
    try:
        return isinstance(value, str) and bool(value) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _is_args(value: Any) -> bool:
    # A text would be sent as one argument for each of its letters.
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int)


def _is_seconds(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and math.isfinite(value)
    return is_number and abs(value) <= LONGEST


def _is_moment(value: Any) -> bool:
    return isinstance(value, datetime)


def _is_moment_or_text(value: Any) -> bool:
    if not isinstance(value, str):
        return _is_moment(value)
    try:
        maybe_iso8601(value)
    except ValueError:
        return False
    return True


#: The message's options that a beat or Celery reads itself.
OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "expires": (
        lambda value: _is_seconds(value) or _is_moment_or_text(value),
        "a number of seconds, a datetime, or a text in ISO 8601",
    ),
    "eta": (_is_moment_or_text, "a datetime, or a text in ISO 8601"),
    "countdown": (_is_seconds, "a number of seconds"),
    "headers": (_is_dict, "a dict by the headers' names"),
    "priority": (_is_int, "a whole number"),
    "time_limit": (_is_seconds, "a number of seconds"),
    "soft_time_limit": (_is_seconds, "a number of seconds"),
}
