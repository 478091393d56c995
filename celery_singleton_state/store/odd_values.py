"""Convert values of a wrong type in a row, such as a text where a number belongs.

SQLite stores any value in any column, and Redis stores only texts. So a row that a user has edited
by hand may have values of a wrong type. A process that reads all rows must not fail on this row.
"""

from __future__ import annotations

from typing import Any

#: The version that replaces a schema version that is not a number. No schema has this version, so
#: the row's state is not decoded by a wrong schema.
NO_VERSION = -1


def odd_values(row: Any) -> dict[str, Any]:
    """Return converted values for the fields of a row that have a wrong type.

    :param row: a dataclass of :mod:`celery_singleton_state.store.base`.
    :returns: the converted values, as a dict by field name. A field that is ``None`` is left out.
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


#: The types that fields of a row must have. Each item has a type, the names of the fields that must
#: have this type, and the function that converts a value of another type to this type.
_KINDS: tuple[tuple[type, tuple[str, ...], Any], ...] = (
    (int, ("fence", "run_count", "write", "newest", "queue"), whole_number),
    # Do not convert a schema version. The result could by chance be the version of another schema,
    # and the state would be decoded with that schema.
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
