"""Moments and lengths of time as texts, whatever number stands in a row.

PostgreSQL's moments reach from infinity to infinity, and no ``datetime`` holds a year after 9999.
An odd moment is shown as an odd text; it is no error of whoever looks at the rows.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime

#: Seconds of 400 years, after which the calendar repeats itself.
_CYCLE = 146_097 * 86_400
#: No calendar is asked for moments farther from 1970, in seconds: some 30 million years.
_FARTHEST = 1e15


def moment(epoch: float) -> str:
    """For people: UTC, to the second."""
    found = _calendar(epoch)
    return found if isinstance(found, str) else f"{_year(*found)}{found[0]:-%m-%d %H:%M:%S}"


def short_moment(epoch: float, now: float) -> str:
    """The same, without what goes without saying: the day where it is today's."""
    found, today = _calendar(epoch), _calendar(now)
    if isinstance(found, str):
        return found
    at, cycles = found
    if not isinstance(today, str) and (at.date(), cycles) == (today[0].date(), today[1]):
        return f"{at:%H:%M:%S}"
    return f"{_year(at, cycles)}{at:-%m-%d %H:%M}"


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
    found = _calendar(epoch)
    return not isinstance(found, str) and not found[1]


def seconds(length: float) -> str:
    """A length of time in whole seconds."""
    return f"{length:.0f} s" if abs(length) < _FARTHEST else f"{length:g} s"


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
    if not abs(epoch) < _FARTHEST:
        return f"{epoch:g} s since 1970" if math.isfinite(epoch) else "nan"
    cycles = math.floor(epoch / _CYCLE)
    return datetime.fromtimestamp(epoch - cycles * _CYCLE, UTC), cycles


def _year(at: datetime, cycles: int) -> str:
    return f"{at.year + 400 * cycles:04d}"
