import math
from dataclasses import dataclass, field
from typing import Any, TypedDict

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_singleton_state.state.codec import Codec, StateError, is_schema


@dataclass
class Data:
    n: int = 0
    name: str = "new"
    seen: list[int] = field(default_factory=list)


class Struct(msgspec.Struct):
    n: int = 0
    name: str = "new"
    seen: list[int] = msgspec.field(default_factory=list)


@attrs.define
class Attrs:
    n: int = 0
    name: str = "new"
    seen: list[int] = attrs.field(factory=list)


class Dict(TypedDict):
    n: int
    name: str
    seen: list[int]


class Model(pydantic.BaseModel):
    n: int = 0
    name: str = "new"
    seen: list[int] = []


def codec(schema: Any, **options: Any) -> Codec[Any]:
    if schema is Dict:
        options.setdefault("initial", {"n": 0, "name": "new", "seen": []})
    return Codec(schema, **options)


def plain(state: Any) -> Any:
    """Return the state's JSON document as Python values, decoded without a schema."""
    schema = Dict if isinstance(state, dict) else type(state)
    return msgspec.json.decode(codec(schema).encode(state))


every_schema = pytest.mark.parametrize("schema", [Data, Struct, Attrs, Dict, Model])


@every_schema
def test_a_decoded_state_equals_the_encoded_state(schema: Any) -> None:
    values = {"n": 7, "name": "ä😀\0", "seen": [1, 2]}
    state = schema(**values)
    again = codec(schema).decode(codec(schema).encode(state), 1)
    assert type(again) is type(state)
    assert plain(again) == values


@every_schema
def test_the_default_initial_state_has_the_schemas_defaults(schema: Any) -> None:
    assert plain(codec(schema).initial()) == {"n": 0, "name": "new", "seen": []}


@every_schema
def test_initial_states_are_not_shared(schema: Any) -> None:
    made = codec(schema, initial=schema(n=1, name="x", seen=[]))
    one, other = made.initial(), made.initial()
    (one["seen"] if schema is Dict else one.seen).append(1)
    assert plain(other)["seen"] == []


def test_the_initial_state_can_be_a_function() -> None:
    assert Codec(Data, initial=lambda: Data(5)).initial() == Data(5)


@every_schema
def test_unknown_fields_are_dropped_and_missing_fields_get_defaults(schema: Any) -> None:
    state = codec(schema).decode('{"n": 3, "gone": true}', 1)
    assert plain(state) == {"n": 3, "name": "new", "seen": []}


@dataclass
class Part:
    size: int = 7


@dataclass
class Whole:
    part: Part = field(default_factory=Part)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    number: int = 5


@dataclass
class MoreData(Data):
    more: int = 1


def test_defaults_of_nested_dataclasses_are_written() -> None:
    """If a document left out a default, the field would get another value as soon as a later
    release changes the default.
    """
    state = codec(Whole).decode('{"part": {}, "parts": {"a": [{}]}}', 1)
    part = {"size": 7}
    assert plain(state) == {"part": part, "parts": {"a": [part]}, "number": 5}


def test_a_subclass_is_refused_because_it_would_be_decoded_as_the_schema() -> None:
    with pytest.raises(StateError, match="state: MoreData comes back as Data"):
        codec(Data).encode(MoreData(n=2))


@every_schema
@pytest.mark.parametrize("raw", ["", "{", "[]", "7", '{"n": "many"}', '{"n": null}', "\x00"])
def test_a_stored_value_that_does_not_fit_is_refused(schema: Any, raw: str) -> None:
    with pytest.raises(StateError, match="the stored value of version 1 cannot be read"):
        codec(schema).decode(raw, 1)


@every_schema
def test_a_state_that_does_not_fit_is_refused(schema: Any) -> None:
    made = codec(schema)
    state = made.initial()
    if schema is Dict:
        state["n"] = "many"
    else:
        state.n = "many"
    with pytest.raises(StateError, match=f"the state does not fit {schema.__name__}"):
        made.encode(state)


@every_schema
@pytest.mark.parametrize("state", [None, 7, object(), [], "x"])
def test_a_state_of_another_type_is_refused(schema: Any, state: Any) -> None:
    with pytest.raises(StateError):
        codec(schema).encode(state)


def test_nan_is_refused() -> None:
    @dataclass
    class Measured:
        value: float = 0.0

    with pytest.raises(StateError):
        Codec(Measured).encode(Measured(math.nan))


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(StateError):
        Codec(Data).encode(Data(name="\ud800"))


def rename(value: dict[str, Any]) -> dict[str, Any]:
    return {"n": value["number"]}


def double(value: dict[str, Any]) -> dict[str, Any]:
    return value | {"n": value["n"] * 2}


@every_schema
def test_migrations_are_applied_one_version_at_a_time(schema: Any) -> None:
    made = codec(schema, version=3, migrations={1: rename, 2: double})
    assert plain(made.decode('{"number": 4}', 1))["n"] == 8
    assert plain(made.decode('{"n": 4}', 2))["n"] == 8
    assert plain(made.decode('{"n": 4}', 3))["n"] == 4


def test_a_state_without_a_version_has_version_1() -> None:
    assert Codec(Data, version=2, migrations={1: rename}).decode('{"number": 4}', None).n == 4


def test_a_version_without_a_migration_is_read_as_the_next_version() -> None:
    made = Codec(Data, version=3, migrations={2: double})
    assert made.decode('{"n": 4}', 1).n == 8


def test_an_older_version_that_does_not_fit_is_refused() -> None:
    with pytest.raises(StateError, match="version 1"):
        Codec(Data, version=2).decode('{"n": "four"}', 1)


def test_a_newer_version_is_refused() -> None:
    with pytest.raises(StateError, match="has version 3, newer than this code's 2"):
        Codec(Data, version=2).decode('{"n": 4}', 3)


def test_the_error_of_a_migration_is_reported() -> None:
    with pytest.raises(StateError, match="KeyError: 'number'"):
        Codec(Data, version=2, migrations={1: rename}).decode('{"n": 4}', 1)


def test_a_model_with_aliases_is_decoded() -> None:
    class Aliased(pydantic.BaseModel):
        n: int = pydantic.Field(default=0, alias="number")

    made = Codec(Aliased)
    assert made.decode(made.encode(Aliased(number=4)), 1).n == 4


def test_is_schema_accepts_classes_with_typed_fields() -> None:
    assert all(map(is_schema, (Data, Struct, Attrs, Dict, Model)))
    assert not any(map(is_schema, (dict, int, Data(), None, "Data", dict[str, int])))


@given(st.builds(Data, n=st.integers(), name=st.text(), seen=st.lists(st.integers())))
def test_any_decoded_state_equals_the_encoded_state(state: Data) -> None:
    made = Codec(Data)
    assert made.decode(made.encode(state), 1) == state
