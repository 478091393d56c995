import inspect
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.serialization import dumps, loads

from celery_singleton_state.keys import (
    MAX_KEY_LENGTH,
    Binder,
    row_key,
    singleton_name,
)


def run(tenant: str, limit: int = 10, *rest: Any, **more: Any) -> None:
    """A task's body. The keys in these tests are made from its signature."""


BINDER = Binder(inspect.signature(run))


def name(unique_on: Any, *args: Any, **kwargs: Any) -> str:
    return singleton_name("shop.run", unique_on, BINDER, args, kwargs)


def test_without_unique_on_a_task_is_one_singleton() -> None:
    assert name(None, "acme") == name(None, "other") == "shop.run"


def test_positional_named_and_default_arguments_make_the_same_key() -> None:
    spellings = [name(("tenant", "limit"), "a"), name(("tenant", "limit"), tenant="a", limit=10)]
    assert spellings == ['shop.run{"limit":10,"tenant":"a"}'] * 2


def plain(tenant: str, limit: int = 10) -> None:
    """Have only arguments that the fast way of binding can handle."""


def keyword_only(tenant: str, *, limit: int) -> None:
    """Have an argument that can only be given by name."""


@pytest.mark.parametrize("function", [run, plain, keyword_only])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(("a", 1), {}), (("a",), {}), (("a",), {"limit": 1}), ((), {"limit": 1, "tenant": "a"})],
)
def test_the_fast_way_binds_arguments_as_python_does(function: Any, args: Any, kwargs: Any) -> None:
    signature = inspect.signature(function)
    try:
        expected = signature.bind(*args, **kwargs)
    except TypeError:
        with pytest.raises(TypeError):
            Binder(signature).bind(args, kwargs)
        return
    expected.apply_defaults()
    assert Binder(signature).bind(args, kwargs) == expected.arguments


def test_a_star_takes_all_arguments() -> None:
    assert name("*", "a") != name("*", "a", 11)
    assert name("*", "a", 10, 1, x=2) == name("*", "a", 10, 1, x=2)


def test_a_callable_chooses_the_key() -> None:
    assert name(lambda tenant, **_: tenant.lower(), "ACME") == 'shop.run"acme"'


@pytest.mark.parametrize(
    "value",
    [1, 1.5, True, None, "ä", [1], {"b": 1, "a": 2}, datetime(2026, 1, 1, tzinfo=UTC), UUID(int=1)],
)
def test_json_values_can_be_part_of_a_key(value: Any) -> None:
    assert name(("tenant",), value).startswith('shop.run{"tenant":')


def test_values_of_different_types_make_different_keys() -> None:
    assert len({name(("tenant",), value) for value in (1, "1", 1.0, True)}) == 4


def test_a_value_without_json_is_refused() -> None:
    with pytest.raises(TypeError, match=r"task shop\.run: unique_on chose .*object"):
        name(("tenant",), object())


def test_arguments_that_do_not_fit_the_signature_are_refused() -> None:
    with pytest.raises(TypeError, match="tenant"):
        name(("tenant",))


def test_a_short_key_is_prefix_and_name() -> None:
    assert row_key("singleton-state:", "shop.run") == "singleton-state:shop.run"


@given(st.text(min_size=240, max_size=400), st.text(min_size=240, max_size=400))
def test_long_names_make_different_keys_that_fit(one: str, other: str) -> None:
    keys = {row_key("singleton-state:", text) for text in (one, other)}
    assert all(len(key) <= MAX_KEY_LENGTH for key in keys)
    assert len(keys) == len({one, other})


class Text(str):
    """A subclass of ``str``, such as Django's ``SafeString``."""


class Level(IntEnum):
    HIGH = 3


class Colour(StrEnum):
    RED = "red"


class Coloured(str, Enum):  # noqa: UP042  # unlike with StrEnum, str() is not its value
    RED = "red"


class Point(NamedTuple):
    x: int
    y: int


class Money:
    """A class with its own conversion to JSON."""

    def __json__(self) -> Any:
        return {"amount": Decimal("1.50"), 7: "EUR"}


class Promise:
    """A text that is made only when it is needed, such as Django's lazy translations."""

    def __str__(self) -> str:
        return "lazy"


#: Arguments that Celery can send as JSON, among them values that are not JSON by themselves.
SENT = [
    Text("a"),
    {1: "a", 2.5: "b", None: "c", Text("t"): "d"},
    {True: "a"},
    {1: "first", "1": "last"},
    Level.HIGH,
    Colour.RED,
    Coloured.RED,
    {Level.HIGH: Colour.RED},
    Decimal("1.50"),
    datetime(2026, 1, 1, 12, tzinfo=ZoneInfo("Europe/Berlin")),
    datetime(2026, 1, 1),
    date(2026, 1, 1),
    time(12, 30),
    UUID(int=1),
    b"\xff\x00",
    (1, (2, [3])),
    Point(1, 2),
    2**70,
    float("nan"),
    float("inf"),
    "a\udc80b",
    "\x00",
    OrderedDict(b=1, a=2),
    Money(),
    Promise(),
]


@pytest.mark.parametrize(
    "value", SENT, ids=[f"{type(value).__name__}-{number}" for number, value in enumerate(SENT)]
)
def test_the_sender_and_the_body_have_the_same_key(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON changes some values. The sender makes the key from the value as it was before this
    change, and the worker makes the key from the changed value.

    Both keys must be equal.
    """
    monkeypatch.setattr("kombu.utils.json.textual_types", (Promise,))
    content_type, encoding, sent = dumps([value], "json")
    (received,) = loads(sent, content_type, encoding)
    assert name(("tenant",), value) == name(("tenant",), received)
    assert name(lambda tenant: tenant, value) == name(lambda tenant: tenant, received)
    name(("tenant",), value).encode()


@pytest.mark.parametrize("value", [{1: (2, {3})}, frozenset({"a", 1}), Level.HIGH, Colour, 1.0])
def test_the_sender_and_the_body_have_the_same_key_with_pickle(value: Any) -> None:
    if value is Colour:
        value = {"plain": PlainEnum.ONE, "made of parts": Made(Text("x"), {1: Decimal(1)})}
    content_type, encoding, sent = dumps(value, "pickle")
    received = loads(sent, content_type, encoding, accept={content_type})
    assert name(("tenant",), value) == name(("tenant",), received)


class PlainEnum(Enum):
    ONE = 1


@dataclass(frozen=True)
class Made:
    text: str
    parts: dict[int, Decimal]
