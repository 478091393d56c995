"""Compare a state with what its JSON is read as, and describe the first difference.

Every save makes this comparison. JSON has few types: if the schema does not say what a value is, a
key 42 is read back as ``"42"``, a set as a list, and NaN as ``None``. A validator of the schema can
change a value as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from math import isfinite
from typing import Any
from uuid import UUID

from .same import LOST, SCALARS, changed_attributes, fields_of, is_as_good, same

#: The most characters of a value that an error shows.
_SHOWN = 40


def difference(value: Any, read: Any, path: str) -> str | None:
    """Describe the first difference between a value and what its JSON is read as.

    :param value: the value that is to be stored.
    :param read: the value that its JSON is read as.
    :param path: the name of the value in the description, such as ``state``.
    :return: a text with the path of the difference, the change, and what to write instead; ``None``
        if the two values are the same.
    """
    return None if same(value, read) else _described(value, read, path)


def not_finite(value: Any, path: str) -> str | None:
    """Describe the first NaN or infinity in a value, because JSON would store either as null.

    :param path: the name of the value in the description.
    :return: the description; ``None`` if the value contains neither.
    """
    if isinstance(value, float):
        return None if isfinite(value) else f"{path}: {_shown(value)} comes back as None; {_NO_NAN}"
    parts = (not_finite(each, path + step) for step, each, _ in _parts(value, value))
    return next((found for found in parts if found), None)


_NO_NAN = "JSON has neither NaN nor infinity, use None"
_BY_SCHEMA = (
    "a validator, converter or serializer of the schema changes it, or the schema excludes it"
)


def _described(one: Any, other: Any, path: str) -> str:
    """Describe where two values first differ, what changes there, and what to write instead."""
    owner, step, is_same = None, "", same
    while (part := _changed_part(one, other, is_same)) is not None:
        owner = one
        step, one, other = part
        path += step
        if step[1:] not in (fields_of(type(owner)) or (step[1:],)):
            is_same = is_as_good
    if isinstance(one, dict) and type(one) is type(other):
        key, its = _changed_key(one, other)
        if key is not LOST:
            return f"{path}[{_text(key)}]: the key {_key_change(key, its)}"
        new = next((key for key in other if key not in one), LOST)
        if new is not LOST:
            return f"{path}[{_text(new)}]: the schema or initial_state adds this key at each load"
    change = f"{path}: {_change(one, other)}"
    if not step.startswith("._"):
        return change
    if hasattr(type(owner), "__attrs_attrs__"):
        return f"{change.partition('; ')[0]}; fields that begin with an underscore are not stored"
    if step[1:] in (getattr(owner, "__private_attributes__", None) or ()):
        return f"{change.partition('; ')[0]}; private attributes are not stored, make it a field"
    return change


def _changed_part(
    one: Any, other: Any, is_same: Callable[[Any, Any], bool]
) -> tuple[str, Any, Any] | None:
    """Return the first part in which a value differs from what is read back from its JSON.

    :returns: the part's path, the part before, and the part after; ``None`` if the two values
        differ as a whole or in their keys, and so in no single part.
    """
    if (
        isinstance(one, dict)
        and type(one) is type(other)
        and _changed_key(one, other)[0] is not LOST
    ):
        return None
    return next((part for part in _parts(one, other) if not is_same(*part[1:])), None)


def _parts(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the parts of a value: the path of each, the part, and what it is read as.

    Parts are fields, items of a dict, and items of a list. A value that is read as another type has
    no parts.
    """
    kind = type(one)
    if kind is not type(other):
        return
    names = fields_of(kind)
    if names is not None:
        for name in names:
            yield f".{name}", getattr(one, name), getattr(other, name)
        for name, mine, its in changed_attributes(one, other, names):
            yield f".{name}", mine, its
    elif isinstance(one, dict):
        for key, value in one.items():
            yield f"[{_text(key)}]", value, other.get(key, LOST)
    elif isinstance(one, list | tuple) and len(one) == len(other):
        names = getattr(kind, "_fields", None)
        for n, (mine, its) in enumerate(zip(one, other, strict=True)):
            yield f".{names[n]}" if names else f"[{n}]", mine, its


def _changed_key(one: dict[Any, Any], other: dict[Any, Any]) -> tuple[Any, Any]:
    """Find the first key in a dict that is not read back, and the key that is read instead.

    Return both keys. ``LOST`` takes the place of a key that does not exist.
    """
    known = {key: key for key in other}
    for n, key in enumerate(one):
        if not same(key, known.get(key, LOST)):
            return key, list(other)[n] if len(one) == len(other) else LOST
    return LOST, LOST


def _key_change(key: Any, read: Any) -> str:
    shown = f"{_text(key)} ({_name(key)})"
    if read is LOST and type(key) is str:
        return f"{shown} does not come back; the schema has no such field"
    as_what = (
        "does not come back" if read is LOST else f"comes back as {_text(read)} ({_name(read)})"
    )
    if type(read) is type(key):
        return f"{shown} {as_what}; {_BY_SCHEMA}"
    return f"{shown} {as_what}; annotate the dict as dict[{_name(key)}, ...], or use str keys"


def _change(one: Any, other: Any) -> str:
    if other is LOST:
        return f"{_shown(one)} does not come back; make it a field of the schema"
    if one is LOST:
        return f"{_shown(other)} is added at each load; {_BY_SCHEMA}"
    if isinstance(one, float) and not isfinite(one):
        return f"{one!r} (float) comes back as {_shown(other)}; {_NO_NAN}"
    if type(one) is not type(other):
        return f"{_shown(one)} comes back as {_shown(other)}; {_instead(one, other)}"
    if isinstance(one, datetime | time) and (one.tzinfo or one.fold):
        return _change_of_time(one, other)
    if isinstance(one, list | tuple | dict | set | frozenset) and len(one) != len(other):
        return f"{len(one)} items come back as {len(other)}; {_BY_SCHEMA}"
    if type(one) in SCALARS:
        return f"{_text(one)} comes back as {_text(other)}; {_BY_SCHEMA}"
    return f"{_name(one)} comes back as another {_name(one)}; {_BY_SCHEMA}"


def _instead(one: Any, other: Any) -> str:
    plain = type(other)
    if plain.__module__ == "builtins" and isinstance(one, plain) and not isinstance(one, Enum):
        return f"use a plain {_name(other)}"
    if other is None:
        return f"annotate it as {_name(one)}"
    return f"annotate it as {_name(one)}, or use {_name(other)}"


def _change_of_time(one: datetime | time, other: datetime | time) -> str:
    if one.tzinfo is None:
        return f"{_name(one)} comes back without fold=1; use an aware {_name(one)}"
    return (
        f"{_name(one)} in the time zone {one.tzinfo} comes back in {other.tzinfo}; "
        "store UTC, .astimezone(timezone.utc), and the zone's name beside it"
    )


def _shown(one: Any) -> str:
    """Return the name of a value's type for an error, with the value only if it is a number.

    Any other value is left out, because a text can be a secret.
    """
    if one is None:
        return "None"
    return f"{_text(one)} ({_name(one)})" if type(one) in (int, float, bool) else _name(one)


def _text(one: Any) -> str:
    if type(one) in (date, datetime, Decimal, UUID):
        return str(one)
    if type(one) not in SCALARS:
        return _name(one)
    text = repr(one)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _name(one: Any) -> str:
    return type(one).__name__
