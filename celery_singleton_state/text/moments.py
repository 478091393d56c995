"""Format timestamps and durations as texts, whatever number a row may contain.

A timestamp is a number of seconds since 1970, in UTC. PostgreSQL has infinite timestamps, and a
``datetime`` has no years after 9999. Such a timestamp gets an unusual text here, and never raises
an error, so that users can still list and show the row.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime

#: The number of seconds in 400 years, after which the calendar repeats itself.
_CYCLE = 146_097 * 86_400
#: The beginning of the year 1 and the end of the year 9999, in seconds since 1970: the limits of a
#: ``datetime``.
_FIRST, _END = -62_135_596_800, 253_402_300_800
#: The limit in seconds (some 30 million years) from which a timestamp is shown as a number and not
#: as a date, and a duration in seconds and not in days.
FARTHEST = 1e15


def moment(epoch: float) -> str:
    """Format a timestamp for people: date and time in UTC, to the second."""
    found = _calendar(epoch)
    return found if isinstance(found, str) else _to_the_second(*found)


def short_moment(epoch: float, now: float) -> str:
    """Format a timestamp for people in a short form: today's timestamps as a time alone.

    Timestamps of other days become a date and a time without seconds.

    :param now: the present time, in seconds since 1970.
    """
    found, today = _calendar(epoch), _calendar(now)
    if isinstance(found, str):
        return found
    whole = _to_the_second(*found)
    day, _, time = whole.partition(" ")
    is_today = not isinstance(today, str) and day == _to_the_second(*today).partition(" ")[0]
    return time if is_today else whole[:-3]


def iso(epoch: float) -> str:
    """Format a timestamp for programs, by ISO 8601.

    Years outside 1 to 9999 have a sign and at least six digits. A timestamp that is infinite, NaN
    or farther away than :data:`FARTHEST` has no date: it becomes ``infinity``, ``-infinity``,
    ``nan`` or a number of seconds since 1970.
    """
    found = _calendar(epoch)
    if isinstance(found, str):
        return found
    at, cycles = found
    text = at.isoformat()
    return f"{at.year + 400 * cycles:+07d}{text[4:]}" if cycles else text


def is_usual(epoch: float) -> bool:
    """Return whether a timestamp is in the years 1 to 9999, which a ``datetime`` can hold."""
    return _FIRST <= epoch < _END


def seconds(length: float) -> str:
    """Format a duration in whole seconds."""
    return f"{length:.0f} s" if abs(length) < FARTHEST else f"{length:g} s"


def span(length: float) -> str:
    """Format a duration for people, with one unit and about two digits.

    With more digits, the durations on a page that refreshes would change too often to be read.
    """
    if not abs(length) < FARTHEST:
        return seconds(length)
    length = max(0.0, length)
    for unit, size, most in (("s", 1, 120), ("min", 60, 120 * 60), ("h", 3600, 48 * 3600)):
        if length < most:
            return f"{length / size:.0f} {unit}"
    return f"{length / 86400:,.0f} d"


def took(length: float) -> str:
    """Format a run's duration for people, with two digits even below one second: ``0.25 s``."""
    return f"{max(0.0, length):.2g} s" if length < 9.5 else span(length)


def ago(then: float, now: float) -> str:
    """Format for people how long ago a timestamp was: ``just now``, ``5 min ago``."""
    return "just now" if now - then < 1 else f"{span(now - then)} ago"


def _calendar(epoch: float) -> tuple[datetime, int] | str:
    """Convert a timestamp to a ``datetime`` and a number of 400-year cycles to add to it.

    The cycles are 0 for the years 1 to 9999. A timestamp that is infinite, NaN or farther away than
    :data:`FARTHEST` becomes a text instead.
    """
    try:
        return datetime.fromtimestamp(epoch, UTC), 0
    except (ValueError, OverflowError, OSError):
        pass
    if math.isinf(epoch):
        return "infinity" if epoch > 0 else "-infinity"
    if not abs(epoch) < FARTHEST:
        return f"{epoch:g} s since 1970" if math.isfinite(epoch) else "nan"
    cycles = math.floor(epoch / _CYCLE)
    return datetime.fromtimestamp(epoch - cycles * _CYCLE, UTC), cycles


def _to_the_second(at: datetime, cycles: int) -> str:
    # isoformat is several times as fast as strftime, and a page shows thousands of timestamps.
    return _year(at, cycles) + at.isoformat(" ", "seconds")[4:19]


def _year(at: datetime, cycles: int) -> str:
    return f"{at.year + 400 * cycles:04d}"
