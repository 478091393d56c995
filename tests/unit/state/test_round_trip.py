"""A state is equal when it is loaded again, or it is refused when it is saved."""

from __future__ import annotations

import functools
import math
import random
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, TypedDict
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pydantic
import pytest
from celery.exceptions import SoftTimeLimitExceeded
from hypothesis import given, settings
from hypothesis import strategies as st

from celery_singleton_state.state.codec import Codec, StateError
from celery_singleton_state.state.round_trip import difference
from tests.helpers.any_values import (
    ANYTHING,
    JSON,
    Attrs,
    Colour,
    Dict,
    Level,
    Model,
    MorePart,
    Pair,
    Part,
    Piece,
    Struct,
    Text,
    Typed,
    Untyped,
    Word,
    described,
    states,
)

BERLIN = ZoneInfo("Europe/Berlin")


def saved(state: Any, schema: Any = None) -> Any:
    """Return the state as the next run would load it.

    :raises StateError: the state was refused.
    """
    codec = Codec(schema or type(state))
    return codec.decode(codec.encode(state), codec.version)


def is_kept_or_refused(state: Any, schema: Any) -> None:
    with warnings.catch_warnings():
        # pydantic only warns of a value that does not fit, and writes it.
        warnings.simplefilter("ignore", UserWarning)
        try:
            again = saved(state, schema)
        except StateError:
            return
    assert described(again) == described(state)


@settings(deadline=None, max_examples=200)
@given(st.builds(Untyped, ANYTHING | JSON))
def test_an_untyped_state_is_kept_or_refused(state: Untyped) -> None:
    is_kept_or_refused(state, Untyped)


@pytest.mark.parametrize("schema", [Typed, Struct, Attrs, Model, Dict])
def test_a_typed_state_is_kept_or_refused(schema: Any) -> None:
    @settings(deadline=None, max_examples=100)
    @given(states(schema))
    def check(state: Any) -> None:
        is_kept_or_refused(state, schema)

    check()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({42: "a"}, "state.value[42]: the key 42 (int) comes back as '42' (str)"),
        ({1: "a", "1": "b"}, "state.value[1]: the key 1 (int) does not come back"),
        ({date(2026, 1, 2): 1}, "state.value[2026-01-02]: the key 2026-01-02 (date) comes back"),
        ({"a": [0, {"b": (1,)}]}, "state.value['a'][1]['b']: tuple comes back as list"),
        (datetime(2026, 1, 2), "state.value: datetime comes back as str"),
        (date(2026, 1, 2), "state.value: date comes back as str"),
        (time(12), "state.value: time comes back as str"),
        (timedelta(1), "state.value: timedelta comes back as str"),
        (Decimal("1.0"), "state.value: Decimal comes back as str"),
        (UUID(int=7), "state.value: UUID comes back as str"),
        (b"x", "state.value: bytes comes back as str"),
        ({1, 2}, "state.value: set comes back as list; annotate it as set, or use list"),
        (frozenset({1}), "state.value: frozenset comes back as list"),
        ((1, 2), "state.value: tuple comes back as list"),
        (Pair(1, 2), "state.value: Pair comes back as list"),
        (Colour.RED, "state.value: Colour comes back as str"),
        (Word.YES, "state.value: Word comes back as str"),
        (Level.ONE, "state.value: Level comes back as 1 (int)"),
        (math.nan, "state.value: nan (float) comes back as None; JSON has neither NaN"),
        ([-math.inf], "state.value[0]: -inf (float) comes back as None"),
        (Part(), "state.value: Part comes back as dict"),
        (Piece(), "state.value: Piece comes back as dict"),
        (OrderedDict(a=1), "state.value: OrderedDict comes back as dict; use a plain dict"),
        (defaultdict(int, a=1), "state.value: defaultdict comes back as dict"),
        (Counter("a"), "state.value: Counter comes back as dict"),
        ([*range(99), (1,)], "state.value[99]: tuple comes back as list"),
        (Text("a"), "Text"),
        (object(), "object"),
        ({(1, 2): 3}, "key"),
        ("\ud800", "surrogates"),
    ],
)
def test_a_value_that_an_untyped_state_would_lose_is_named_by_its_path(
    value: Any, expected: str
) -> None:
    with pytest.raises(StateError) as caught:
        saved(Untyped(value))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [None, True, 1, 1.0, -0.0, 2**70, "ä\0", [1, True, 1.5, None], {"a": [{}]}, [[]] * 99],
)
def test_values_of_json_need_no_type(value: Any) -> None:
    assert described(saved(Untyped(value))) == described(Untyped(value))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"seen": [1]}, "state.seen: list comes back as set"),
        ({"row": [1]}, "state.row: list comes back as tuple"),
        (
            {"by_number": {"1": "a"}},
            "state.by_number['1']: the key '1' (str) comes back as 1 (int)",
        ),
        ({"ratio": 2**60}, "state.ratio: 1152921504606846976 (int) comes back as 1.15"),
        ({"ratio": math.nan}, "state.ratio: nan (float) comes back as None; JSON has neither"),
        ({"part": MorePart()}, "state.part: MorePart comes back as Part"),
        ({"part": Part(hidden=(1,))}, "state.part.hidden: tuple comes back as list"),
        ({"pieces": [Piece(), Piece(1, {2})]}, "state.pieces[1].content: set comes back as list"),
        ({"pair": Pair(1, (2,))}, "state.pair.other: tuple comes back as list"),
        ({"at": datetime(2026, 7, 1, tzinfo=BERLIN)}, "state.at: datetime in the time zone Eur"),
        ({"at": datetime(2026, 7, 1, fold=1)}, "state.at: datetime comes back without fold=1"),
        ({"at": datetime(1, 1, 1, tzinfo=timezone(timedelta(seconds=9)))}, "comes back in UTC"),
        ({"hour": time(1, tzinfo=BERLIN)}, "state.hour: time in the time zone Europe/Berlin"),
    ],
)
def test_a_value_that_a_typed_state_would_lose_is_named_by_its_path(
    fields: Any, expected: str
) -> None:
    with pytest.raises(StateError) as caught:
        saved(Typed(**fields))
    assert expected in str(caught.value)


def test_a_typed_state_is_kept() -> None:
    state = Typed(
        number=2**70,
        ratio=3,
        at=datetime(2026, 7, 1, 1, 2, 3, 4, tzinfo=ZoneInfo("UTC")),
        hour=time(1, 2, 3, 4, tzinfo=UTC),
        took=-timedelta(microseconds=1),
        price=Decimal("1.00"),
        by_number={42: "a"},
        by_day={date(2026, 1, 2): [{"a": 1}]},
        seen={3, 1, 2},
        pair=Pair(1, "b"),
        part=Part(hidden=[None]),
        pieces=[Piece(own_size=1)],
    )
    assert described(saved(state)) == described(state)


def test_an_attribute_that_is_no_field_is_kept_or_refused() -> None:
    @dataclass
    class Cursor:
        n: int = 0

        def __post_init__(self) -> None:
            self.index = {self.n: 1}
            self.lock = threading.Lock()

        @functools.cached_property
        def square(self) -> tuple[int]:
            return (self.n**2,)

    state = Cursor(3)
    # Reading the property stores its value in the object's ``__dict__``.
    assert state.square == (9,)
    assert saved(state).index == {3: 1}
    state.index[3] = 2
    with pytest.raises(StateError, match=r"state\.index\[3\]: 2 comes back as 1"):
        saved(state)
    state.index[3] = 1
    state.seen = [1]  # type: ignore[attr-defined]
    with pytest.raises(StateError, match=r"state\.seen: list does not come back; make it a field"):
        saved(state)


@dataclass
class Node:
    name: Any = ""
    kids: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        for kid in self.kids:
            kid.parent = self  # type: ignore[attr-defined]


def test_attributes_that_post_init_makes_may_be_other_objects() -> None:
    """Back references, locks and events are never equal to those of another object. Data in such
    attributes is compared all the same.
    """
    assert saved(Node("a", [Node("b")])).kids[0].parent.name == "a"
    with pytest.raises(StateError, match=r"state\.kids\[0\]\.name: tuple comes back as list"):
        saved(Node("a", [Node((1,))]))

    @dataclass
    class Waited:
        n: int = 0

        def __post_init__(self) -> None:
            self.changed = threading.Condition()
            self.done = threading.Event()
            self.rng = random.Random()
            self.known: dict[str, Any] = {"lock": threading.Lock(), "at": date(2026, 1, 2)}
            self.circle: list[Any] = [self.n, self.known]
            self.circle.append(self.circle)

    state = Waited()
    state.done.set()
    assert saved(state).circle[0] == 0
    state.known["at"] = date(2026, 1, 3)
    with pytest.raises(StateError, match=r"state\.known\['at'\]: date comes back as another date"):
        saved(state)
    state = Waited()
    state.circle[0] = 7
    with pytest.raises(StateError, match=r"state\.circle\[0\]: 7 comes back as 0"):
        saved(state)
    state = Waited()
    state.known["more"] = object()
    with pytest.raises(StateError, match=r"state\.known\['more'\]: .* does not come back"):
        saved(state)


def test_a_slot_that_is_no_field_is_kept_or_refused() -> None:
    class Base:
        __slots__ = ("cache",)

    @dataclass
    class Cursor(Base):
        __slots__ = ("n",)
        n: int

    @attrs.define
    class Own:
        n: int = 0

        @functools.cached_property
        def square(self) -> tuple[int]:
            return (self.n**2,)

    state = Cursor(3)
    assert saved(state).n == 3
    state.cache = [1]  # type: ignore[attr-defined]
    with pytest.raises(StateError, match=r"state\.cache: list does not come back; make it a field"):
        saved(state)
    computed = Own(3)
    # Reading the property stores its value in a slot of the object.
    assert computed.square == (9,)
    assert saved(computed).n == 3


def test_a_changed_field_that_is_never_stored_is_refused() -> None:
    @attrs.define
    class Private:
        _n: int = 0

    class Kept(pydantic.BaseModel):
        _n: int = 0

    for state, expected in (
        (Private(3), "fields that begin with an underscore"),
        (Kept(), "private attributes"),
    ):
        saved(type(state)())
        state._n = 3
        with pytest.raises(StateError, match=rf"state\._n: 3 comes back as 0; {expected} are not"):
            saved(state)


def test_a_model_that_would_write_nan_is_refused() -> None:
    class Measured(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(ser_json_inf_nan="constants")
        mean: float = 0.0
        text: str = ""

    assert saved(Measured(text="NaN, Infinity")).text == "NaN, Infinity"
    for mean in (math.nan, -math.inf):
        with pytest.raises(StateError, match="JSON has neither NaN nor infinity"):
            saved(Measured(mean=mean))


class Changing(Codec[Any]):
    """A codec whose state changes while it is saved, as if a thread of the body changed it.

    :param live: the state that is changed.
    :param times: how often the state is changed: each time just after it was written.
    :param change: changes the state.
    """

    def __init__(self, live: Any, times: float, change: Callable[[Any], None]) -> None:
        super().__init__(type(live))
        dump, self.left = self._dump, times

        def dump_and_change(state: Any) -> bytes:
            document = dump(state)
            if self.left > 0:
                self.left -= 1
                change(live)
            return document

        self._dump = dump_and_change


def count(state: Any) -> None:
    state.number += 1
    state.by_number[state.number] = ""


@pytest.mark.parametrize("times", [1, 2, math.inf])
def test_a_state_that_a_thread_changes_while_it_is_saved_is_saved(times: float) -> None:
    """The body saves its state while a thread of the body counts in it.

    The state is written. The thread counts. The document is read back and compared with the
    state.
    """
    state = Typed()
    codec = Changing(state, times, count)
    # The saved number and the saved keys are from the same time: neither is ahead of the other.
    again = codec.decode(codec.encode(state), 1)
    assert list(again.by_number) == list(range(1, again.number + 1))


def test_a_state_that_always_changes_and_cannot_be_copied_is_saved() -> None:
    @dataclass
    class Locked:
        number: int = 0
        by_number: dict[int, str] = field(default_factory=dict)

        def __post_init__(self) -> None:
            self.lock = threading.Lock()

    state = Locked()
    codec = Changing(state, math.inf, count)
    assert codec.decode(codec.encode(state), 1).number > 0


def test_a_changing_state_is_refused_for_a_value_that_is_always_wrong() -> None:
    def change(state: Any) -> None:
        state.value["count"] += 1

    state = Untyped({"count": 0, 42: "a"})
    codec = Changing(state, math.inf, change)
    with pytest.raises(StateError, match=r"state\.value\[42\]: the key 42 \(int\) comes back as"):
        codec.encode(state)


def test_a_state_whose_dict_grows_while_it_is_written_is_saved() -> None:
    """A thread adds a key each time that the codec reads the dict, to write or to compare it."""

    @dataclass
    class Growing:
        parts: dict[str, Part] = field(default_factory=dict)
        left: int = 0

        def __getattribute__(self, name: str) -> Any:
            parts = object.__getattribute__(self, "parts")
            if name == "parts" and self.left > 0:
                self.left -= 1
                parts[str(len(parts))] = Part()
            return object.__getattribute__(self, name)

    state = Growing({"a": Part()}, 2)
    assert saved(state).parts.keys() >= {"a"}


def test_a_value_that_the_schemas_code_changes_is_refused() -> None:
    @dataclass
    class Upper:
        text: str = "A"

        def __post_init__(self) -> None:
            self.text = self.text.upper()

    class UpperStruct(msgspec.Struct):
        text: str = "A"

        def __post_init__(self) -> None:
            self.text = self.text.upper()

    class Written(pydantic.BaseModel):
        text: str = "A"

        @pydantic.field_serializer("text")
        def lower(self, text: str) -> str:
            return text.upper()

    for schema in (Upper, UpperStruct, Written, Model):
        state: Any = schema()
        assert saved(state).text == "A"
        state.text = "b"
        with pytest.raises(StateError, match=r"state\.text: 'b' comes back as 'B'; a validator"):
            saved(state)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("left_out", 3, "state.left_out: 3 comes back as 0"),
        ("_own", 3, "state._own: 3 (int) comes back as None"),
        ("secret", pydantic.SecretStr("a"), "state.secret: SecretStr comes back as another"),
        ("number", True, "state.number: True (bool) comes back as 1 (int)"),
        ("more", (1,), "state.more: tuple comes back as list"),
        ("at", datetime(2026, 7, 1, tzinfo=BERLIN), "state.at: datetime in the time zone"),
    ],
)
def test_a_value_that_a_model_does_not_write_is_refused(
    name: str, value: Any, expected: str
) -> None:
    state = Model()
    saved(state)
    setattr(state, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(StateError) as caught:
            saved(state)
    assert expected in str(caught.value)


def test_nan_is_kept_if_the_schema_writes_it_as_a_string() -> None:
    class Measured(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(ser_json_inf_nan="strings")
        mean: float = 0.0

    assert math.isnan(saved(Measured(mean=math.nan)).mean)


def test_computed_fields_are_not_loaded_as_extra_fields() -> None:
    state = saved(Model(theNumber=4))
    assert (state.double, state.model_extra) == (8, {})


def test_a_key_that_a_typed_dict_drops_or_adds_is_refused() -> None:
    class Strict(TypedDict):
        n: int

    with pytest.raises(StateError, match=r"state\['more'\]: the key 'more' \(str\) does not come"):
        saved({"n": 1, "more": 2}, Strict)
    with pytest.raises(StateError, match=r"state\['any'\]: the schema or initial_state adds"):
        Codec(Dict, initial={"n": 1, "any": 2}).encode({"n": 5})


def test_initial_state_is_called_only_for_missing_keys() -> None:
    class Cursor(TypedDict, total=False):
        n: int
        seen: dict[str, int]
        note: str

    asked: list[int] = []

    def initial() -> Cursor:
        asked.append(1)
        if len(asked) > 2:
            raise ConnectionError("the server of the settings is away")
        return {"n": 0, "seen": {}}

    codec = Codec(Cursor, initial)
    for n in range(3):
        # A key that the initial state does not have, such as "note", may be missing.
        assert codec.decode(codec.encode({"n": n, "seen": {}}), 1) == {"n": n, "seen": {}}
    assert asked == [1]
    assert codec.decode('{"n":2}', 1) == {"n": 2, "seen": {}}
    assert asked == [1, 1]
    with pytest.raises(StateError, match="ConnectionError: the server of the settings"):
        codec.decode('{"n":2}', 1)
    codec.encode({"n": 2, "seen": {}})


def test_fields_are_compared_even_if_the_class_has_its_own_eq() -> None:
    @attrs.define
    class Equal:
        n: Any = attrs.field(default=0, eq=False)
        many: list[Any] = attrs.field(factory=list)

        def __eq__(self, other: object) -> bool:
            return True

    assert saved(Equal(3)).n == 3
    with pytest.raises(StateError, match=r"state\.n: tuple comes back as list"):
        saved(Equal((3,)))


class Awkward:
    """An object whose ``==`` raises, or returns an object that has no truth value, as arrays do."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __eq__(self, other: object) -> Any:
        if isinstance(self.answer, type):
            raise self.answer
        return self.answer

    __hash__ = None  # type: ignore[assignment]


class Array:
    def __bool__(self) -> bool:
        raise ValueError("the truth value of an array is ambiguous")


@pytest.mark.parametrize("answer", [Array(), ZeroDivisionError, RecursionError, False])
def test_an_object_that_cannot_be_compared_counts_as_different(answer: Any) -> None:
    assert difference([Awkward(answer)], [Awkward(answer)], "state") is not None
    assert difference([Awkward(True)], [Awkward(True)], "state") is None


def test_a_time_limit_during_a_comparison_is_raised() -> None:
    with pytest.raises(SoftTimeLimitExceeded):
        difference(Awkward(SoftTimeLimitExceeded), Awkward(True), "state")


@pytest.mark.parametrize("schema", [Untyped, Model])
def test_a_circular_or_very_deep_state_is_refused(schema: Any) -> None:
    name = "value" if schema is Untyped else "any"
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in (circle, deep):
        with pytest.raises(StateError):
            saved(schema(**{name: value}))


def test_without_round_trip_a_state_that_fits_is_stored() -> None:
    codec = Codec(Untyped, round_trip=False)
    assert codec.decode(codec.encode(Untyped({42: (1,)})), 1) == Untyped({"42": [1]})
    with pytest.raises(StateError, match="does not fit Typed"):
        Codec(Typed, round_trip=False).encode(Typed(number="many"))  # type: ignore[arg-type]


def test_a_default_that_would_be_lost_is_refused() -> None:
    @dataclass
    class Cursor:
        seen: list[int] = field(default_factory=tuple)  # type: ignore[assignment]

    with pytest.raises(StateError, match=r"state\.seen: tuple comes back as list"):
        saved(Cursor())
