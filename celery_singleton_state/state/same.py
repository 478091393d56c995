"""Compare two values in depth: a state and the state that its JSON is read as.

Two values are the same if they have the same type and value, and so have all their parts. ``==``
alone is not enough: it takes ``True`` for ``1`` and ``-0.0`` for ``0.0``, and a class can define
``==`` as it likes. Three cases need a rule:

- An ``int`` in a field annotated ``float`` is read as a float. The annotation allows an ``int``
  (PEP 484). So the two values count as the same, if the float is exact.
- A time in a zone with daylight saving time is read with a fixed offset. The two times do not count
  as the same, because one day later they can be different hours.
- An attribute that is not a field is not stored, but ``__post_init__`` may make it again. If its
  value is data, the two values must be equal. If its value is any other object, such as a lock or a
  reference to a parent, the two objects only need the same type. An attribute that
  ``cached_property`` or another descriptor keeps is ignored, because it is computed again.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import deque
from collections.abc import Callable, Collection, Iterator
from datetime import date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from math import copysign
from operator import attrgetter
from types import MemberDescriptorType
from typing import Any
from uuid import UUID

import msgspec

from celery_singleton_state.errors import FROM_OUTSIDE

#: Types for which ``==`` between two values of the type means that the values are the same.
_ATOMS = frozenset({str, int, bool, type(None), bytes})
#: The types in ``_ATOMS``, and ``float``, for which ``==`` decides wrongly only at -0.0 and NaN.
SCALARS = _ATOMS | {float}
#: The fewest items in a list for which the quick comparison in C is tried first.
_MANY = 16
#: The number up to which a float can hold every int exactly.
_EXACT_AS_FLOAT = 2**53
#: Types of data. When the two values of an attribute that is not a field are compared, values of
#: these types must be equal. Two values of any other type only need the same type.
_DATA = (str, int, float, bytes, type(None), date, time, timedelta, Decimal, UUID, Enum)
#: Types of containers. When the two values of an attribute that is not a field are compared, the
#: items of these containers are compared one by one.
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
#: A marker in place of a part that only one of two compared values has.
LOST = object()


def same(one: Any, other: Any) -> bool:
    """Whether a value and the value that its JSON is read as are the same, in depth.

    :param one: the original value.
    :param other: the value that was read.
    """
    kind = type(one)
    if kind is not type(other):
        is_promoted = kind is int and type(other) is float and abs(one) <= _EXACT_AS_FLOAT
        return is_promoted and one == other
    if kind in _ATOMS:
        return one == other  # type: ignore[no-any-return]
    return _comparer(kind)(one, other)  # type: ignore[arg-type]  # mypy: a type has no hash


@lru_cache(1024)
def _comparer(kind: Any) -> Callable[[Any, Any], bool]:
    """Return the function that compares two values of a type."""
    names = fields_of(kind)
    if names is not None:
        return _comparer_of_fields(kind, names)
    for base, compare in _COMPARERS:
        if issubclass(kind, base):
            return compare
    return _same_objects


def fields_of(kind: type) -> tuple[str, ...] | None:
    """Return the field names of a dataclass, Struct, attrs class or pydantic model.

    ``None`` for any other class.
    """
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    if hasattr(kind, "__attrs_attrs__"):
        return tuple(attribute.name for attribute in kind.__attrs_attrs__)
    if _is_pydantic(kind):
        return tuple(kind.model_fields)  # type: ignore[attr-defined]  # _is_pydantic() has checked it
    return None


def _is_pydantic(kind: type) -> bool:
    return hasattr(kind, "model_validate_json")


def _comparer_of_fields(kind: type, names: tuple[str, ...]) -> Callable[[Any, Any], bool]:
    """Return a function that compares two objects of a class: their fields and other attributes.

    The class's own ``==`` is not used, because that can leave fields out.
    """
    known = frozenset(names)
    get = _getter(names)
    has_dict = kind.__dictoffset__ != 0
    has_slots = not known.issuperset(_slots(kind))
    is_pydantic = _is_pydantic(kind)

    def compare(one: Any, other: Any) -> bool:
        if not _same_items(get(one), get(other)):
            return False
        has_others = has_slots or (
            has_dict and not (one.__dict__.keys() <= known and other.__dict__.keys() <= known)
        )
        if is_pydantic and not has_others:
            has_others = _has_more(one) or _has_more(other)
        return not has_others or not any(changed_attributes(one, other, known))

    return compare


def _has_more(model: Any) -> bool:
    return bool(model.__pydantic_private__ or model.__pydantic_extra__)


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function that reads the named attributes of an object at once, as a tuple."""
    if not names:
        return lambda _: ()
    get = attrgetter(*names)
    # With one name, attrgetter returns the value itself and not a tuple.
    return get if len(names) > 1 else lambda one: (get(one),)


def changed_attributes(
    one: Any, other: Any, known: Collection[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the attributes that are not fields and whose values differ in a way that matters.

    Each item is the attribute's name, its original value and the value that was read. ``LOST``
    stands for a missing value.

    :param known: the names of the fields.
    """
    mine, its = _attributes(one), _attributes(other)
    # A pydantic model's extra fields are stored, so they must be the same, like fields.
    extra = getattr(one, "__pydantic_extra__", None) or {}
    for name in mine | its:
        if name in known or _is_computed(type(one), name):
            continue
        pair = mine.get(name, LOST), its.get(name, LOST)
        if not (same(*pair) if name in extra else is_as_good(*pair)):
            yield name, *pair


def _attributes(one: Any) -> dict[str, Any]:
    """Return the attributes in an object's dict and slots: a dict from names to values.

    The private attributes and the extra fields of a pydantic model are included.
    """
    found: dict[str, Any] = dict(getattr(one, "__dict__", {}))
    kind: Any = type(one)
    for name in _slots(kind):
        value = getattr(one, name, LOST)
        if value is not LOST:
            found[name] = value
    for name in ("__pydantic_private__", "__pydantic_extra__"):
        found |= getattr(one, name, None) or {}
    return found


@lru_cache(1024)
def _slots(kind: Any) -> tuple[str, ...]:
    """Return the names in the ``__slots__`` of a class and its bases.

    Attrs classes are left out: their slots are generated, for fields and cached properties.
    """
    return tuple(
        name
        for base in kind.__mro__
        if "__slots__" in vars(base) and "__attrs_attrs__" not in vars(base)
        for name, found in vars(base).items()
        if isinstance(found, MemberDescriptorType) and not name.startswith("__")
    )


def _is_computed(kind: type, name: str) -> bool:
    of_class = inspect.getattr_static(kind, name, None)
    is_slot = isinstance(of_class, MemberDescriptorType)
    return name.startswith("__") or (hasattr(type(of_class), "__get__") and not is_slot)


def is_as_good(one: Any, other: Any) -> bool:
    """Whether an attribute that is not a field has a good enough value after the state was read.

    Data must be equal to the original. Any other object only needs the type of the original.

    :param one: the original value of the attribute.
    :param other: the value of the attribute after the state was read.
    """
    return _is_as_good(one, other, set())


def _is_as_good(one: Any, other: Any, seen: set[int]) -> bool:
    """Do the work of :func:`is_as_good`, also for containers that contain themselves.

    :param seen: the ids of the containers whose comparison has begun. They are not compared again.
    """
    if type(one) is not type(other):
        return False
    if not isinstance(one, _CONTAINERS):
        return not isinstance(one, _DATA) or same(one, other)
    if id(one) in seen:
        return True
    seen.add(id(one))
    if len(one) != len(other):
        return False
    if isinstance(one, dict) and _same_sets(one, other):
        return all(_is_as_good(value, other[key], seen) for key, value in one.items())
    if isinstance(one, set | frozenset):
        return _same_sets(one, other) or not all(isinstance(each, _DATA) for each in one)
    parts = (one.items(), other.items()) if isinstance(one, dict) else (one, other)
    return all(_is_as_good(mine, its, seen) for mine, its in zip(*parts, strict=True))


def _is_opaque(one: Any) -> bool:
    """Whether the content of an object cannot be read, as with a lock or a file."""
    return not (_has_equality(one) or hasattr(one, "__dict__") or object.__getstate__(one))


def _has_equality(one: Any) -> bool:
    equality: Any = type(one).__eq__
    return equality is not object.__eq__


def _same_items(one: Any, other: Any) -> bool:
    """Whether two lists, tuples or deques have the same items in the same order."""
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
    """Whether two lists of scalars are surely the same. False means that this is not sure.

    This comparison decides for most long lists. It runs in C, ten times as fast as a loop.
    """
    kinds = list(map(type, one))
    found = set(kinds)
    return (
        found <= SCALARS
        and one == other
        and kinds == list(map(type, other))
        and not (float in found and 0.0 in one)
    )


def _same_dicts(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    # Two defaultdicts with different default factories behave differently: they are not the same.
    if getattr(one, "default_factory", None) is not getattr(other, "default_factory", None):
        return False
    if _same_items(list(one), list(other)):
        return _same_items(list(one.values()), list(other.values()))
    return _same_sets(one, other) and all(same(value, other[key]) for key, value in one.items())


def _same_sets(one: Collection[Any], other: Collection[Any]) -> bool:
    """Whether two sets, or the keys of two dicts, have the same members in any order."""
    if len(one) != len(other):
        return False
    known = {each: each for each in other}
    return all(each in known and same(each, known[each]) for each in one)


def _same_floats(one: float, other: float) -> bool:
    if one == other:
        return copysign(1.0, one) == copysign(1.0, other)
    return one != one and other != other  # both are NaN: a schema's serializer can write NaN


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
    # utcoffset(None) is an offset only for a zone with a fixed offset. Two such zones are the same,
    # because the caller has compared the offsets.
    return other is not None and None not in (one.utcoffset(None), other.utcoffset(None))


def _same_members(one: Enum, other: Enum) -> bool:
    return one is other


def _same_objects(one: Any, other: Any) -> bool:
    """Whether two objects of an unknown class are the same.

    If the class defines ``==``, that decides. Otherwise the objects' pickled states must be the
    same (``__getstate__``).
    """
    if one is other:
        return True
    try:
        if _has_equality(one):
            return bool(one == other)
        return not _is_opaque(one) and same(object.__getstate__(one), object.__getstate__(other))
    except FROM_OUTSIDE:
        raise
    except Exception:  # bool() of an array's == fails, and a user's == can raise anything
        return False


_COMPARERS: tuple[tuple[Any, Callable[[Any, Any], bool]], ...] = (
    (Enum, _same_members),
    (dict, _same_dicts),
    ((list, tuple, deque), _same_items),
    ((set, frozenset), _same_sets),
    (float, _same_floats),
    ((datetime, time), _same_times),
    (Decimal, _same_decimals),
)
