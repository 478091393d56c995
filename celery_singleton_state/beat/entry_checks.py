"""Check the entries of ``beat_schedule`` when the beat starts.

Without the checks, a bad value would cause an error at each tick, or end the beat later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any

from celery.beat import ScheduleEntry
from celery.exceptions import ImproperlyConfigured
from celery.utils.time import maybe_iso8601, maybe_make_aware

from celery_singleton_state.config.checks import (
    Check,
    checked,
    choice,
    duration,
    either,
    moment,
    named,
    nothing,
    refused,
    seconds,
    text,
    whole,
)
from celery_singleton_state.schedules.due import Schedule
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)

#: The longest time that an entry may name: 100 years, in seconds. Longer times lead beyond the
#: last date of Python's calendar.
LONGEST = timedelta(days=36525).total_seconds()
#: Seconds by which two clocks may differ before a schedule is reported as using another clock.
CLOCKS_DIFFER = 60


def _task(value: Any) -> str:
    with suppress(ValueError):
        return text(value)
    raise ValueError("the name of a task")


def _args(value: Any) -> Collection[Any]:
    # Refuse a text, although it is a collection: Celery would send each of its letters as one
    # argument.
    if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping):
        raise ValueError("a list or a tuple, for example ('a',)")
    return value


def _iso_moment(value: Any) -> str:
    if isinstance(value, str):
        maybe_iso8601(value)
        return value
    raise ValueError("a text in ISO 8601")


_any_seconds = seconds(-LONGEST, LONGEST)

#: Maps each rule for missed ticks, which this package adds to Celery's entries, to the check of its
#: value.
_RULES: dict[str, Check[Any]] = {
    "skip_if_older_than": either(duration(seconds(0, inf)), nothing),
    "catch_up": choice("latest", "all", "none"),
    "next_from": choice("schedule", "last_run"),
}
#: Maps some of Celery's own fields to the checks of their values. A field is checked only if it is
#: set.
_FIELDS: dict[str, Check[Any]] = {
    "args": _args,
    "kwargs": named("arguments"),
    "options": named("options of the message"),
    "last_run_at": moment,
    "total_run_count": whole(),
}
#: Maps the message options that a beat or Celery reads itself to the checks of their values.
_OPTIONS: dict[str, Check[Any]] = {
    "expires": either(_any_seconds, moment, _iso_moment),
    "eta": either(moment, _iso_moment),
    "countdown": _any_seconds,
    "headers": named("headers"),
    "priority": whole(),
    "time_limit": _any_seconds,
    "soft_time_limit": _any_seconds,
}
#: The names of the rules for missed ticks.
RULES = tuple(_RULES)
#: The names of all fields that an entry may have. The fields that a user may set come first.
FIELDS = (
    *("task", "schedule", "args", "kwargs", "options", "relative", *RULES),
    *("name", "app", "last_run_at", "total_run_count"),
)


def fields_of(entries: Any) -> dict[str, Any]:
    """Return a dict that maps the name of each entry of a ``beat_schedule`` to the entry's fields.

    :raises ImproperlyConfigured: the schedule is not a dict, or one of its entries is neither a
        dict nor a ``ScheduleEntry``.
    """
    if not entries:
        return {}
    if not isinstance(entries, Mapping):
        raise refused("beat", "beat_schedule", repr(entries), "a dict of entries by their names")
    return {name: _fields(name, entry) for name, entry in entries.items()}


def _fields(name: Any, entry: Any) -> dict[str, Any]:
    if isinstance(entry, ScheduleEntry):
        return {field: value for field, value in vars(entry).items() if field in FIELDS}
    if isinstance(entry, Mapping):
        return dict(entry)
    raise ImproperlyConfigured(
        f"schedule entry {name!r}: {entry!r} is not allowed; an entry is a dict with at least"
        " 'task' and 'schedule'"
    )


def check(name: Any, task: Any, options: Any, fields: Mapping[str, Any]) -> None:
    """Check the fields of an entry, and the options of its messages.

    :param name: the name of the entry.
    :param task: the name of the task.
    :param options: the options of the messages; ``None``: none.
    :param fields: the entry's other fields.
    :raises ImproperlyConfigured: a value is not allowed. The error names the entry, the field, its
        value and what is allowed.
    """
    entry = f"schedule entry {name!r}"
    checked(entry, "name", name, text)
    unknown = [field for field in fields if field not in FIELDS]
    if unknown:
        raise ImproperlyConfigured(
            f"{entry}: {', '.join(map(repr, unknown))} is not known; an entry"
            f" takes {', '.join(FIELDS[:9])}"
        )
    checked(entry, "task", task, _task)
    given = {**fields, "options": options}
    for field, allowed in _FIELDS.items():
        if given.get(field):
            checked(entry, field, given[field], allowed)
    for option, allowed in _OPTIONS.items():
        value = (options or {}).get(option)
        if value is not None:
            checked(entry, f"options[{option!r}]", value, allowed)


def checked_rule(name: Any, option: str, value: Any) -> Any:
    """Return the checked value of an entry's rule for missed ticks; a time becomes seconds.

    :param name: the name of the entry.
    :param option: the name of the rule.
    :raises ImproperlyConfigured: the value is not allowed. The error names the entry, the rule, its
        value and what is allowed.
    """
    return checked(f"schedule entry {name!r}", option, value, _RULES[option])


def warn_of_another_clock(name: str, schedule: Schedule) -> None:
    """Warn if the ``nowfun`` of a schedule differs from the clock, because beats ignore ``nowfun``.

    :param name: the name of the entry.
    :raises TypeError: the schedule's ``now()`` does not return a ``datetime``.
    """
    shows = schedule.now()
    if not isinstance(shows, datetime):
        raise TypeError(f"its now() returns {shows!r}, which is not a datetime")
    if getattr(schedule, "nowfun", None) is None:
        return
    off = (maybe_make_aware(shows) - datetime.now(UTC)).total_seconds()
    if abs(off) > CLOCKS_DIFFER:
        logger.warning(
            "beat: the nowfun of %s is %d s off the clock, and is not used, because beats use the"
            " database's clock. A time without a time zone counts as UTC. To shift the ticks,"
            " change the schedule itself.",
            name,
            off,
        )
