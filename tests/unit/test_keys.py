import inspect
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_singleton_state.keys import MAX_KEY_LENGTH, Binder, row_key, singleton_name


def run(tenant: str, limit: int = 10, *rest: Any, **more: Any) -> None:
    """The signature under test."""


BINDER = Binder(inspect.signature(run))


def name(unique_on: Any, *args: Any, **kwargs: Any) -> str:
    return singleton_name("shop.run", unique_on, BINDER, args, kwargs)


def test_one_for_the_task() -> None:
    assert name(None, "acme") == name(None, "other") == "shop.run"


def test_positions_names_and_defaults_spell_the_same() -> None:
    spellings = [name(("tenant", "limit"), "a"), name(("tenant", "limit"), tenant="a", limit=10)]
    assert spellings == ['shop.run{"limit":10,"tenant":"a"}'] * 2


def plain(tenant: str, limit: int = 10) -> None:
    """Without anything that only binding can tell."""


def keyword_only(tenant: str, *, limit: int) -> None:
    """With a name that no position has."""


@pytest.mark.parametrize("function", [run, plain, keyword_only])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(("a", 1), {}), (("a",), {}), (("a",), {"limit": 1}), ((), {"limit": 1, "tenant": "a"})],
)
def test_the_short_way_binds_as_python_does(function: Any, args: Any, kwargs: Any) -> None:
    signature = inspect.signature(function)
    try:
        expected = signature.bind(*args, **kwargs)
    except TypeError:
        with pytest.raises(TypeError):
            Binder(signature).bind(args, kwargs)
        return
    expected.apply_defaults()
    assert Binder(signature).bind(args, kwargs) == expected.arguments


def test_all_arguments() -> None:
    assert name("*", "a") != name("*", "a", 11)
    assert name("*", "a", 10, 1, x=2) == name("*", "a", 10, 1, x=2)


def test_a_callable_chooses() -> None:
    assert name(lambda tenant, **_: tenant.lower(), "ACME") == 'shop.run"acme"'


@pytest.mark.parametrize(
    "value",
    [1, 1.5, True, None, "ä", [1], {"b": 1, "a": 2}, datetime(2026, 1, 1, tzinfo=UTC), UUID(int=1)],
)
def test_values_of_json(value: Any) -> None:
    assert name(("tenant",), value).startswith('shop.run{"tenant":')


def test_values_of_different_types_differ() -> None:
    assert len({name(("tenant",), value) for value in (1, "1", 1.0, True)}) == 4


def test_a_value_without_json_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"task shop\.run: unique_on chose .*object"):
        name(("tenant",), object())


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match="tenant"):
        name(("tenant",))


def test_a_short_key_is_as_it_reads() -> None:
    assert row_key("singleton-state:", "shop.run") == "singleton-state:shop.run"


@given(st.text(min_size=240, max_size=400), st.text(min_size=240, max_size=400))
def test_long_keys_fit_and_stay_apart(one: str, other: str) -> None:
    keys = {row_key("singleton-state:", text) for text in (one, other)}
    assert all(len(key) <= MAX_KEY_LENGTH for key in keys)
    assert len(keys) == len({one, other})
