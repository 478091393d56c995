"""Values of all kinds that a state can hold, and a comparison of such values, for tests of round
trips.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter, OrderedDict, defaultdict
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, NamedTuple, TypedDict
from uuid import UUID

import attrs
import msgspec
import pydantic
from hypothesis import strategies as st


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Word(enum.StrEnum):
    YES = "yes"


class Level(enum.IntEnum):
    ONE = 1


class Text(str):
    """A subclass of str, like the markup class of a template engine."""


class Pair(NamedTuple):
    one: Any
    other: Any


@dataclasses.dataclass(eq=False)
class Part:
    """A dataclass without ``==``: comparing two instances says nothing about their fields."""

    size: int = 7
    hidden: Any = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(eq=False)
class MorePart(Part):
    more: int = 1


class Piece(msgspec.Struct, omit_defaults=True, rename="camel"):
    own_size: int = 7
    content: Any = None


class Dict(TypedDict, total=False):
    n: int
    any: Any


@dataclasses.dataclass
class Untyped:
    value: Any = None


@dataclasses.dataclass
class Typed:
    number: int = 0
    ratio: float = 0
    text: str = ""
    raw: bytes = b""
    at: datetime | None = None
    day: date | None = None
    hour: time | None = None
    took: timedelta | None = None
    price: Decimal | None = None
    who: UUID | None = None
    colour: Colour | None = None
    by_number: dict[int, str] = dataclasses.field(default_factory=dict)
    by_day: dict[date, list[Any]] = dataclasses.field(default_factory=dict)
    seen: set[int] = dataclasses.field(default_factory=set)
    kept: frozenset[str] = frozenset()
    row: tuple[int, ...] = ()
    pair: Pair | None = None
    part: Part = dataclasses.field(default_factory=Part)
    pieces: list[Piece] = dataclasses.field(default_factory=list)


class Struct(msgspec.Struct, dict=True, tag=True, omit_defaults=True, rename="camel"):
    my_number: int = 0
    ratio: float = 0
    at: datetime | None = None
    by_number: dict[int, Any] = {}
    seen: set[int] = set()
    part: Part | None = None
    either: Piece | int | str | None = None


@attrs.define(on_setattr=[])
class Attrs:
    number: int = 0
    _own: int = 1
    made: int = attrs.field(default=2, init=False)
    text: str = attrs.field(default="A", converter=str.upper)
    rows: list[tuple[int, str]] = attrs.field(factory=list)


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", populate_by_name=True)

    number: int = pydantic.Field(default=0, alias="theNumber")
    ratio: float = 0
    text: str = "A"
    secret: pydantic.SecretStr | None = None
    left_out: int = pydantic.Field(default=0, exclude=True)
    at: datetime | None = None
    by_number: dict[int, Any] = {}
    seen: set[int] = set()
    either: int | float | str | bool | None = None
    any: Any = None
    _own: Any = pydantic.PrivateAttr(default=None)

    @pydantic.field_validator("text", mode="before")
    @classmethod
    def upper(cls, text: Any) -> Any:
        return text.upper() if isinstance(text, str) else text

    @pydantic.computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def double(self) -> Any:
        return self.number * 2


_FLOATS = st.floats()
_KEYS = st.one_of(
    st.text(max_size=3),
    st.integers(-3, 3),
    st.booleans(),
    st.none(),
    _FLOATS,
    st.dates(),
    st.uuids(),
    st.binary(max_size=2),
    st.sampled_from([Colour.RED, Word.YES, Level.ONE, Text("a"), "1", "true"]),
)
_LEAVES = st.one_of(
    _KEYS,
    st.integers(),
    st.datetimes(),
    st.datetimes(timezones=st.timezones()),
    st.times(),
    st.timedeltas(),
    st.decimals(),
    st.just(bytearray(b"ab")),
    st.just("\ud800"),
    st.builds(Part),
    st.builds(Piece),
)


def _holding(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(_KEYS, parts, max_size=3)
    return st.one_of(
        st.lists(parts, max_size=20),
        st.lists(parts, max_size=3).map(tuple),
        dicts,
        dicts.map(OrderedDict),
        dicts.map(lambda found: defaultdict(int, found)),
        st.sets(_KEYS, max_size=3),
        st.frozensets(_KEYS, max_size=3),
        st.lists(_KEYS, max_size=3).map(Counter),
        st.builds(Pair, parts, parts),
        st.builds(Part, hidden=parts),
        st.builds(Piece, content=parts),
    )


ANYTHING = st.recursive(_LEAVES, _holding, max_leaves=8)
#: Values that come back unchanged whatever the schema is, so that hypothesis rejects few examples.
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda parts: st.lists(parts, max_size=20) | st.dictionaries(st.text(), parts, max_size=3),
    max_leaves=8,
)
_ONE = st.integers(-5, 5) | st.integers()
_TIMES = st.datetimes() | st.datetimes(timezones=st.timezones())

#: Maps the name of each field to a strategy for values that fit the field's type.
FITTING: dict[str, st.SearchStrategy[Any]] = {
    "number": _ONE,
    "my_number": _ONE,
    "_own": _ONE,
    "made": _ONE,
    "left_out": st.integers(0, 1),
    "ratio": _FLOATS | st.integers(),
    "text": st.text(),
    "raw": st.binary(),
    "at": _TIMES,
    "day": st.dates(),
    "hour": st.times(),
    "took": st.timedeltas(),
    "price": st.decimals(),
    "who": st.uuids(),
    "colour": st.sampled_from(Colour),
    "by_number": st.dictionaries(st.integers(), st.text(), max_size=3),
    "by_day": st.dictionaries(st.dates(), st.lists(JSON, max_size=3), max_size=3),
    "seen": st.sets(st.integers(), max_size=20),
    "kept": st.frozensets(st.text(), max_size=3),
    "row": st.lists(st.integers(), max_size=20).map(tuple),
    "rows": st.lists(st.tuples(st.integers(), st.text()), max_size=3),
    "pair": st.builds(Pair, JSON, JSON),
    "part": st.builds(Part, size=_ONE, hidden=JSON),
    "pieces": st.lists(st.builds(Piece, _ONE, JSON), max_size=3),
    "either": st.one_of(st.integers(), st.text(), st.builds(Piece)),
    "secret": st.builds(pydantic.SecretStr, st.text()),
    "any": JSON,
    "n": _ONE,
    "value": JSON,
}
FIELDS: dict[Any, tuple[str, ...]] = {
    Untyped: ("value",),
    Typed: tuple(field.name for field in dataclasses.fields(Typed)),
    Struct: Struct.__struct_fields__,
    Attrs: tuple(field.name for field in attrs.fields(Attrs)),
    Model: (*Model.model_fields, "_own"),
    Dict: ("n", "any"),
}


@st.composite
def states(draw: st.DrawFn, schema: Any) -> Any:
    """Draw a state of a schema. Up to three fields are set: two in three of them to a value that
    fits.
    """
    state = {} if schema is Dict else schema()
    names = draw(st.lists(st.sampled_from(FIELDS[schema]), unique=True, max_size=3))
    for name in names:
        fits = draw(st.integers(0, 2)) > 0
        _put(state, name, draw(FITTING[name] if fits else ANYTHING))
    if draw(st.integers(0, 9)) == 0 and schema is not Attrs:  # because attrs classes have slots
        _put(state, "no_field", draw(JSON))
    return state


def _put(state: Any, name: str, value: Any) -> None:
    if isinstance(state, dict):
        state[name] = value
    else:
        setattr(state, name, value)


def described(value: Any) -> Any:
    """Return a description of a value and of the types of all its parts: equal values have equal
    ones.

    This function shares no code with the package, because it checks the package.
    """
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, enum.Enum):
        return name, value.name
    if isinstance(value, dict):
        return name, frozenset((described(key), described(each)) for key, each in value.items())
    if isinstance(value, set | frozenset):
        return name, frozenset(map(described, value))
    if isinstance(value, list | tuple):
        return name, tuple(map(described, value))
    if isinstance(value, datetime | time):
        return name, value.replace(tzinfo=None, fold=0).isoformat(), _zone(value)
    if isinstance(value, pydantic.SecretStr):
        return name, value.get_secret_value()
    held = _held(value)
    return (name, repr(value)) if held is None else (name, *held)


#: The middle of January and July in five years: the offsets of a time zone on these dates identify
#: the zone well enough.
_HALF_YEARS = [datetime(year, month, 15) for year in range(2000, 2050, 10) for month in (1, 7)]


def _zone(at: datetime | time) -> Any:
    zone = at.tzinfo
    if zone is None:
        return "naive", at.fold
    if isinstance(at, time):
        return at.utcoffset()
    return at.utcoffset(), tuple(zone.utcoffset(each) for each in _HALF_YEARS)


def _held(value: Any) -> list[Any] | None:
    """Return the attributes of a value whose class is a schema or part of this module, or else
    None.
    """
    names = FIELDS.get(type(value))
    if names is None and isinstance(value, Part | Piece):
        names = ("size", "hidden") if isinstance(value, Part) else ("own_size", "content")
    if names is None:
        return None
    others = {
        **getattr(value, "__dict__", {}),
        **(getattr(value, "__pydantic_extra__", None) or {}),
    }
    found = {name: described(getattr(value, name)) for name in {*names, *others}}
    if isinstance(found.get("ratio"), tuple) and type(value.ratio) is int:
        # For a type checker an int is a float, so an int in a float's field may come back as a
        # float.
        found["ratio"] = described(float(value.ratio)), int(float(value.ratio)) - value.ratio
    elif "ratio" in found:
        found["ratio"] = found["ratio"], 0
    return sorted(found.items(), key=lambda item: item[0])
