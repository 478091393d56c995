"""Values in rows that are not of the kind that their columns are for.

SQLite keeps any value in any column, and Redis keeps texts alone. A row that somebody wrote by hand
is one odd row among the others; it is no error of whoever reads them all.
"""

from __future__ import annotations

from typing import Any

#: Stands for the version of a state's schema in a row that has none that is a number.
NO_VERSION = -1


def odd_values(row: Any) -> dict[str, Any]:
    """The values of a row's fields that are not of their kinds, nor ``None``, made so."""
    found: dict[str, Any] = {}
    for kind, names, made in _KINDS:
        for name in names:
            value = getattr(row, name, None)
            if type(value) is not kind and value is not None:
                found[name] = made(value)
    return found


def whole_number(value: Any) -> int:
    """A number from whatever stands in its place; 0 if that is none, or is beyond 64 bits."""
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        return 0
    return found if -(2**63) <= found < 2**63 else 0


def number(value: Any) -> float | None:
    """A number from whatever stands in its place; ``None`` if that is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def text(value: Any) -> str:
    """A text from whatever stands in its place."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


_KINDS: tuple[tuple[type, tuple[str, ...], Any], ...] = (
    (int, ("fence", "run_count", "write", "newest", "queue"), whole_number),
    # It is no version by chance: nobody knows how to read that state.
    (int, ("schema_version",), lambda _: NO_VERSION),
    (
        float,
        ("updated_at", "acquired_at", "expires_in", "last_finished_at", "queued_in"),
        number,
    ),
    (
        str,
        (
            *("holder", "task_id", "last_outcome", "history", "value", "wanted", "handoff_to"),
            *("newest_sent", "ticks_done", "queued_task_id", "task"),
        ),
        text,
    ),
)
