from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import pytest
from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state import RetryPolicy, SingletonTask, singleton_task
from celery_singleton_state.run.conflict import POLICIES


@dataclass
class Cursor:
    n: int = 0


@dataclass
class NeedsArguments:
    n: int


@dataclass
class Forgetful:
    seen: list[int] = ()  # type: ignore[assignment]  # a mistake that Python accepts


class Typed(TypedDict):
    n: int


@pytest.fixture
def app() -> Celery:
    return Celery("shop", set_as_current=False)


def define(app: Celery, **options: Any) -> Any:
    def run(self: Any, tenant: str = "", limit: int = 1) -> None: ...

    return app.task(bind=True, base=SingletonTask, name="shop.run", shared=False, **options)(run)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("unique_on", "tenant", "names of arguments as a list"),
        ("unique_on", ["tenent"], "names of arguments (tenant, limit)"),
        ("unique_on", [], "names of arguments"),
        ("unique_on", [1], "names of arguments"),
        ("state_schema", dict, "a dataclass"),
        ("state_schema", Cursor(), "a dataclass"),
        ("state_schema", "Cursor", "a dataclass"),
        ("on_conflict", "wait for it", "'skip', 'wait', 'raise', 'replace', 'coalesce'"),
        ("on_decode_error", "ignore", "'fail', 'initial'"),
        ("persist_on_error", "yes", "True or False"),
        ("state_round_trip", "lenient", "True or False"),
        ("deduplicate", 1, "True or False"),
        ("lease_ttl", 0, "from 0.1 to 86400"),
        ("lease_ttl", float("nan"), "from 0.1"),
        ("lease_ttl", float("inf"), "from 0.1"),
        ("lease_ttl", "8", "a number of seconds"),
        ("conflict_timeout", -1, "from 0 to 86400"),
        ("hold_at_least", "1 min", "a number of seconds"),
        ("enqueue_once", 1, "True or False"),
        ("on_lease_lost", "ignore", "'interrupt', 'finish'"),
        ("retry_reasons", "StateLoadFailed", "a list of reasons"),
        ("retry_reasons", ["Tired"], "StateLoadFailed, StatePersistFailed"),
        ("retry_policy", {"Tired": RetryPolicy()}, "StateLoadFailed"),
        ("retry_policy", {"StateLoadFailed": 3}, "RetryPolicy"),
        ("initial_state", Cursor(), "only together with state_schema"),
        ("state_version", 2, "only together with state_schema"),
        ("state_round_trip", False, "only together with state_schema"),
    ],
)
def test_a_wrong_option_is_refused_when_the_task_is_made(
    app: Celery, option: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        define(app, **{option: value}).name  # noqa: B018 - made at first use
    message = str(caught.value)
    assert message.startswith(f"task shop.run: option {option}=")
    assert allowed in message


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"state_version": 0}, "a whole number from 1"),
        ({"state_version": 2**31}, "a whole number from 1 to 2147483647"),
        ({"state_migrations": {0: id}}, "versions, 1 or more"),
        ({"state_migrations": {1: "fn"}}, "to functions"),
        ({"state_migrations": {1: id}}, "versions below state_version=1"),
        ({"initial_state": "nothing"}, "a state of Cursor"),
        ({"initial_state": lambda: 1 / 0}, "ZeroDivisionError"),
        ({"state_schema": NeedsArguments}, "NeedsArguments() makes one"),
        ({"state_schema": Typed}, "Typed() makes one"),
        ({"state_schema": Forgetful}, "Forgetful() makes one: the state would not come back the"),
        ({"state_schema": Forgetful}, "state.seen: tuple comes back as list"),
    ],
)
def test_a_wrong_state_option_is_refused(
    app: Celery, options: dict[str, Any], allowed: str
) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        define(app, **{"state_schema": Cursor} | options).name  # noqa: B018
    assert allowed in str(caught.value)


def test_without_round_trip_a_default_may_come_back_changed(app: Celery) -> None:
    task = define(app, state_schema=Forgetful, state_round_trip=False)
    assert task._codec.encode(task._codec.initial()) == '{"seen":[]}'


def test_the_decorator_checks_options_too(app: Celery) -> None:
    @singleton_task(app, on_conflict="never", shared=False)
    def run(self: SingletonTask) -> None: ...

    with pytest.raises(ImproperlyConfigured, match="option on_conflict='never'"):
        run.name  # noqa: B018


def test_a_misspelled_option_is_refused_with_a_suggestion(app: Celery) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"on_conflit=.* did you mean on_conflict\?"):
        define(app, on_conflit="skip").name  # noqa: B018


def test_attributes_that_are_no_options_are_kept(app: Celery) -> None:
    assert define(app, my_attribute=1, queue_name="x").my_attribute == 1


def test_options_can_come_from_annotations(app: Celery) -> None:
    app.conf.task_annotations = {"shop.run": {"on_conflict": "raise"}}
    assert define(app)._options.on_conflict == "raise"


def test_making_a_task_does_not_bind_celerys_base_class(app: Celery) -> None:
    """Reading ``Task.app`` would bind Celery's own base class to an app, and with it all tasks."""
    define(app).name  # noqa: B018
    assert not Task.__bound__


def test_class_based_and_abstract_bases(app: Celery) -> None:
    class Base(SingletonTask):
        abstract = True
        state_schema = Cursor

    class Import(Base):
        name = "shop.import"
        unique_on = ("tenant",)

        def run(self, tenant: str) -> None: ...

    task = app.register_task(Import())
    assert task._options.unique_on == ("tenant",)
    assert task._options.state_schema is Cursor


@pytest.mark.parametrize("make", [lambda n: {n}, lambda n: frozenset([n]), lambda n: (n,)])
def test_unique_on_takes_any_collection_of_names(app: Celery, make: Callable[[str], Any]) -> None:
    assert define(app, unique_on=make("tenant"))._options.unique_on == ("tenant",)


def test_unique_on_of_a_function_without_self(app: Celery) -> None:
    @app.task(base=SingletonTask, unique_on=["a"], name="shop.static", shared=False)
    def static(a: int, b: int = 0) -> None: ...

    assert list(static._binder.signature.parameters) == ["a", "b"]


def test_each_policy_can_be_chosen_and_no_other(app: Celery) -> None:
    for name in POLICIES:
        singleton_task(app, on_conflict=name, name=name, shared=False)(idle)
    app.finalize()
    with pytest.raises(ImproperlyConfigured, match=", ".join(map(repr, POLICIES))):
        singleton_task(app, on_conflict="hope", shared=False)(idle)


def idle(self: Any) -> None:
    """A body that does nothing."""
