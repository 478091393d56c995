"""Moments and lengths of time as texts, whatever number stands in a row.

PostgreSQL's moments reach from infinity to infinity, and no ``datetime`` holds a year after 9999.
An odd moment is shown as an odd text; it is no error of whoever looks at the rows.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime

#: Seconds of 400 years, after which the calendar repeats itself.
_CYCLE = 146_097 * 86_400
#: The years 1 to 9999, which a ``datetime`` can hold.
_FIRST, _END = -62_135_596_800, 253_402_300_800
#: Seconds, some 30 million years: no calendar is asked for moments farther from 1970, and longer
#: times are not counted in days.
FARTHEST = 1e15


def moment(epoch: float) -> str:
    """For people: UTC, to the second."""
    found = _calendar(epoch)
    return found if isinstance(found, str) else _to_the_second(*found)


def short_moment(epoch: float, now: float) -> str:
    """The same, without what goes without saying: the day where it is today's."""
    found, today = _calendar(epoch), _calendar(now)
    if isinstance(found, str):
        return found
    whole = _to_the_second(*found)
    day, _, time = whole.partition(" ")
    is_today = not isinstance(today, str) and day == _to_the_second(*today).partition(" ")[0]
    return time if is_today else whole[:-3]


def iso(epoch: float) -> str:
    """For programs: ISO 8601, whose years have a sign and six digits or more beyond 9999; else
    ``infinity``, ``-infinity`` or ``nan``.
    """
    found = _calendar(epoch)
    if isinstance(found, str):
        return found
    at, cycles = found
    text = at.isoformat()
    return f"{at.year + 400 * cycles:+07d}{text[4:]}" if cycles else text


def is_usual(epoch: float) -> bool:
    """Whether a moment is in the years 1 to 9999."""
    return _FIRST <= epoch < _END


def seconds(length: float) -> str:
    """A length of time in whole seconds."""
    return f"{length:.0f} s" if abs(length) < FARTHEST else f"{length:g} s"


def span(length: float) -> str:
    """A length of time for people: one unit and about two digits, because a page that refreshes
    would flicker with more.
    """
    if not abs(length) < FARTHEST:
        return seconds(length)
    length = max(0.0, length)
    for unit, size, most in (("s", 1, 120), ("min", 60, 120 * 60), ("h", 3600, 48 * 3600)):
        if length < most:
            return f"{length / size:.0f} {unit}"
    return f"{length / 86400:,.0f} d"


def took(length: float) -> str:
    """How long a run took, which is often less than a second."""
    return f"{max(0.0, length):.2g} s" if length < 9.5 else span(length)


def ago(then: float, now: float) -> str:
    """How long ago a moment was."""
    return "just now" if now - then < 1 else f"{span(now - then)} ago"


def _calendar(epoch: float) -> tuple[datetime, int] | str:
    """A moment as the same one within the years 1 to 9999, and by how many cycles it was moved; as
    a text, if it is none.
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
    # Not strftime, which takes several times as long: a page shows thousands of moments.
    return _year(at, cycles) + at.isoformat(" ", "seconds")[4:19]


def _year(at: datetime, cycles: int) -> str:
    return f"{at.year + 400 * cycles:04d}"
