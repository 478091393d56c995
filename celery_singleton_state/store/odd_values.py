"""Convert values in rows that have another type than their column, such as a text in place of a
number.

SQLite stores any value in any column, and Redis stores only texts. A row that a user has edited by
hand may have such values. They must not become an error for a process that reads all rows.
"""

from __future__ import annotations

from typing import Any

#: The schema version of a row whose own schema version is not a number. No schema has this version.
NO_VERSION = -1


def odd_values(row: Any) -> dict[str, Any]:
    """Return converted values for the fields of a row that have a wrong type.

    :param row: a dataclass of :mod:`celery_singleton_state.store.base`.
    :returns: the new values by the fields' names. A field that is ``None`` stays so.
    """
    found: dict[str, Any] = {}
    for kind, names, made in _KINDS:
        for name in names:
            value = getattr(row, name, None)
            if type(value) is not kind and value is not None:
                found[name] = made(value)
    return found


def whole_number(value: Any) -> int:
    """Convert a value to a whole number; 0 if it is not a number or needs more than 64 bits."""
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        return 0
    return found if -(2**63) <= found < 2**63 else 0


def number(value: Any) -> float | None:
    """Convert a value to a float; ``None`` if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def text(value: Any) -> str:
    """Convert a value to a text. Bytes that are not UTF-8 become backslash escapes."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


#: For each type of a field: the type, the names of its fields, and the function that converts a
#: value of another type.
_KINDS: tuple[tuple[type, tuple[str, ...], Any], ...] = (
    (int, ("fence", "run_count", "write", "newest", "queue"), whole_number),
    # A converted number could by chance be an existing version, and the state be decoded by it.
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
