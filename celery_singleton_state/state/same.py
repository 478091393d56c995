"""Whether two values have the same type and value, throughout.

``==`` alone is not enough: it takes ``True`` for ``1`` and ``-0.0`` for ``0.0``, and is whatever a
class makes of it. Three judgements:

- An ``int`` in a field annotated ``float`` is read as a float. The annotation allows it (PEP 484),
  so both are the same, as long as a float is exact.
- A time in a zone with daylight saving time is read with a fixed offset. That is not the same:
  one day later it is another hour.
- An attribute that is no field must be the same too: ``__post_init__`` may make it. What
  ``cached_property`` or another descriptor keeps on the object need not be: it is computed again.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator
from datetime import datetime, time, tzinfo
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from math import copysign
from operator import attrgetter
from typing import Any

import msgspec

from celery_singleton_state.errors import FROM_OUTSIDE

#: Types whose ``==`` is exact among values of the same type.
_ATOMS = frozenset({str, int, bool, type(None), bytes})
#: Beside them floats, of which only -0.0 and NaN need a second look.
SCALARS = _ATOMS | {float}
#: From this length on a list is worth a look in C first.
_MANY = 16
#: Up to here each int is a float.
_EXACT_AS_FLOAT = 2**53
#: Stands for a part that one value has and the other lacks.
LOST = object()


def same(one: Any, other: Any) -> bool:
    """Whether a value and what it is read as are the same."""
    kind = type(one)
    if kind is not type(other):
        is_promoted = kind is int and type(other) is float and abs(one) <= _EXACT_AS_FLOAT
        return is_promoted and one == other
    if kind in _ATOMS:
        return one == other  # type: ignore[no-any-return]
    return _comparer(kind)(one, other)  # type: ignore[arg-type]  # mypy: a type has no hash


@lru_cache(1024)
def _comparer(kind: Any) -> Callable[[Any, Any], bool]:
    """The comparison of two values that both are of this type."""
    names = fields_of(kind)
    if names is not None:
        return _comparer_of_fields(kind, names)
    for base, compare in _COMPARERS:
        if issubclass(kind, base):
            return compare
    return _same_objects


def fields_of(kind: type) -> tuple[str, ...] | None:
    """The fields of a dataclass, Struct, attrs class or pydantic model; ``None`` for others."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    if hasattr(kind, "__attrs_attrs__"):
        return tuple(attribute.name for attribute in kind.__attrs_attrs__)
    if _is_pydantic(kind):
        return tuple(kind.model_fields)  # type: ignore[attr-defined]  # looked for above
    return None


def _is_pydantic(kind: type) -> bool:
    return hasattr(kind, "model_validate_json")


def _comparer_of_fields(kind: type, names: tuple[str, ...]) -> Callable[[Any, Any], bool]:
    """The comparison of fields, whether or not the class's own ``==`` looks at them."""
    known = frozenset(names)
    get = _getter(names)
    has_dict = kind.__dictoffset__ != 0
    is_pydantic = _is_pydantic(kind)

    def compare(one: Any, other: Any) -> bool:
        if not _same_items(get(one), get(other)):
            return False
        has_others = has_dict and not (
            one.__dict__.keys() <= known and other.__dict__.keys() <= known
        )
        if is_pydantic and not has_others:
            has_others = _has_more(one) or _has_more(other)
        return not has_others or all(
            same_other(mine, its) for _, mine, its in other_attributes(one, other, known)
        )

    return compare


def _has_more(model: Any) -> bool:
    return bool(model.__pydantic_private__ or model.__pydantic_extra__)


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """What reads all these attributes at once."""
    if not names:
        return lambda _: ()
    get = attrgetter(*names)
    # Of one name it returns the value alone.
    return get if len(names) > 1 else lambda one: (get(one),)


def other_attributes(
    one: Any, other: Any, known: Collection[str]
) -> Iterator[tuple[str, Any, Any]]:
    """The attributes that are no fields: of both objects, ``LOST`` where one has none."""
    mine, its = _attributes(one), _attributes(other)
    for name in mine | its:
        if name not in known and not _is_computed(type(one), name):
            yield name, mine.get(name, LOST), its.get(name, LOST)


def _attributes(one: Any) -> dict[str, Any]:
    """What an object's dict holds, and what a pydantic model keeps beside it."""
    found: dict[str, Any] = dict(getattr(one, "__dict__", {}))
    for name in ("__pydantic_private__", "__pydantic_extra__"):
        found |= getattr(one, name, None) or {}
    return found


def _is_computed(kind: type, name: str) -> bool:
    of_class = inspect.getattr_static(kind, name, None)
    return name.startswith("__") or hasattr(type(of_class), "__get__")


def same_other(one: Any, other: Any) -> bool:
    """Whether an attribute that is no field is the same; a new lock is as good as the old."""
    return (type(one) is type(other) and _is_opaque(one)) or same(one, other)


def _is_opaque(one: Any) -> bool:
    """Whether nothing tells what an object holds: a lock, a file."""
    return not (_has_equality(one) or hasattr(one, "__dict__") or object.__getstate__(one))


def _has_equality(one: Any) -> bool:
    equality: Any = type(one).__eq__
    return equality is not object.__eq__


def _same_items(one: Any, other: Any) -> bool:
    """Lists, or tuples."""
    if len(one) != len(other):
        return False
    if len(one) >= _MANY and _are_equal_scalars(one, other):
        return True
    for mine, its in zip(one, other, strict=True):
        kind = type(mine)
        if kind in SCALARS and kind is type(its) and mine == its and (mine or kind is not float):
            continue
        if not same(mine, its):
            return False
    return True


def _are_equal_scalars(one: Any, other: Any) -> bool:
    """Whether a look in C is enough: it is for most long lists, and ten times as fast."""
    kinds = list(map(type, one))
    found = set(kinds)
    return (
        found <= SCALARS
        and one == other
        and kinds == list(map(type, other))
        and not (float in found and 0.0 in one)
    )


def _same_dicts(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    # Another default is another dict.
    if getattr(one, "default_factory", None) is not getattr(other, "default_factory", None):
        return False
    if _same_items(list(one), list(other)):
        return _same_items(list(one.values()), list(other.values()))
    return _same_sets(one, other) and all(same(value, other[key]) for key, value in one.items())


def _same_sets(one: Collection[Any], other: Collection[Any]) -> bool:
    """Sets, or the keys of dicts, in any order."""
    if len(one) != len(other):
        return False
    known = {each: each for each in other}
    return all(each in known and same(each, known[each]) for each in one)


def _same_floats(one: float, other: float) -> bool:
    if one == other:
        return copysign(1.0, one) == copysign(1.0, other)
    return one != one and other != other  # NaN, from a serializer that can write it


def _same_decimals(one: Decimal, other: Decimal) -> bool:
    return one.as_tuple() == other.as_tuple()


def _same_times(one: datetime | time, other: datetime | time) -> bool:
    if one.tzinfo is None:
        return one == other and one.fold == other.fold
    return (
        one == other
        and one.utcoffset() == other.utcoffset()
        and _same_zones(one.tzinfo, other.tzinfo)
    )


def _same_zones(one: tzinfo, other: tzinfo | None) -> bool:
    if one is other:
        return True
    # A zone whose offset is always the same tells it without a date.
    return other is not None and None not in (one.utcoffset(None), other.utcoffset(None))


def _same_members(one: Enum, other: Enum) -> bool:
    return one is other


def _same_objects(one: Any, other: Any) -> bool:
    """Objects of another library, or of the user's: by their ``==`` if they have one."""
    if one is other:
        return True
    try:
        if _has_equality(one):
            return bool(one == other)
        return not _is_opaque(one) and same(object.__getstate__(one), object.__getstate__(other))
    except FROM_OUTSIDE:
        raise
    except Exception:  # an array has no truth, and a class's own == can do anything
        return False


_COMPARERS: tuple[tuple[Any, Callable[[Any, Any], bool]], ...] = (
    (Enum, _same_members),
    (dict, _same_dicts),
    ((list, tuple), _same_items),
    ((set, frozenset), _same_sets),
    (float, _same_floats),
    ((datetime, time), _same_times),
    (Decimal, _same_decimals),
)
