"""The checks of options, settings and entries, and the one form that their errors have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from enum import Enum
from fractions import Fraction
from math import inf, nan
from typing import Any

import pytest
from celery import Celery, Task
from celery.app.task import extract_exec_options
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state import RetryPolicy, singleton_task
from celery_singleton_state.beat import SingletonEntry
from celery_singleton_state.config.options import NAMES
from celery_singleton_state.config.settings import Settings
from celery_singleton_state.config.task_options import CeleryOptions, TaskOptions


@pytest.fixture
def app() -> Celery:
    return Celery("shop", set_as_current=False)


def task_with(app: Celery, name: str, value: Any) -> Any:
    options: Any = {name: value, "name": "shop.run", "shared": False}
    return singleton_task(app, **options)(idle)._options


def idle(self: Any) -> None:
    """A body that does nothing."""


def settings_with(app: Celery, name: str, value: Any) -> Any:
    app.conf[name] = value
    return Settings.from_app(app)


def policy_with(_app: Celery, name: str, value: Any) -> Any:
    return RetryPolicy(**{name: value})


def entry_with(app: Celery, name: str, value: Any) -> Any:
    return SingletonEntry(name="e", task="t", schedule=60.0, app=app, **{name: value})


@pytest.mark.parametrize(
    ("make", "owner", "name", "value", "allowed"),
    [
        (
            task_with,
            "task shop.run: option",
            "lease_ttl",
            -1,
            "a number of seconds from 0.1 to 86400",
        ),
        (task_with, "task shop.run: option", "persist_on_error", 1, "True or False"),
        pytest.param(
            *(settings_with, "app 'shop': setting", "singleton_heartbeat_interval", 10**400),
            "a number of seconds, 0.1 or more",
            id="too large for a float",
        ),
        (
            settings_with,
            "app 'shop': setting",
            "singleton_history",
            "0",
            "a whole number, 1 or more",
        ),
        (policy_with, "RetryPolicy:", "backoff", inf, "a number of seconds, 0 or more"),
        (policy_with, "RetryPolicy:", "max_retries", 1.5, "a whole number, 0 or more, or None"),
        (policy_with, "RetryPolicy:", "jitter", "no", "True or False"),
        (
            *(entry_with, "schedule entry 'e':", "skip_if_older_than", nan),
            "a timedelta or a number of seconds, 0 or more, or None",
        ),
        (entry_with, "schedule entry 'e':", "catch_up", "no", "'latest', 'all', 'none'"),
        (entry_with, "schedule entry 'e':", "total_run_count", "9", "a whole number"),
    ],
)
def test_each_refusal_names_the_owner_the_value_and_what_is_allowed(
    app: Celery, make: Callable[..., Any], owner: str, name: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        make(app, name, value)
    expected = f"{owner} {name}={value!r} is not allowed; it takes {allowed}"
    assert str(caught.value) == expected


class Conflicts(str, Enum):  # noqa: UP042 - projects older than StrEnum have such enums
    """An enum of a user's project. Its members are strings, but ``str()`` does not return their
    value.
    """

    WAIT = "wait"


@pytest.mark.parametrize(
    ("make", "name", "value", "expected"),
    [
        (task_with, "on_conflict", Conflicts.WAIT, "wait"),
        (task_with, "hold_at_least", Fraction(1, 2), 0.5),
        (task_with, "expected_interval", timedelta(minutes=1), 60.0),
        (settings_with, "singleton_history", "20", 20),
        (settings_with, "singleton_auto_migrate", 0, False),
        (policy_with, "max_retries", None, None),
        (policy_with, "backoff", 2, 2.0),
        (entry_with, "skip_if_older_than", 1e300, inf),
    ],
)
def test_an_accepted_value_is_converted(
    app: Celery, make: Callable[..., Any], name: str, value: Any, expected: Any
) -> None:
    found = getattr(make(app, name, value), name.removeprefix("singleton_"))
    assert (found, type(found)) == (expected, type(expected))


def test_a_set_of_names_and_other_values_is_refused(app: Celery) -> None:
    with pytest.raises(ImproperlyConfigured, match="option unique_on="):
        task_with(app, "unique_on", {"tenant", 1})


def test_each_option_that_is_checked_is_typed() -> None:
    own = TaskOptions.__annotations__.keys() - CeleryOptions.__annotations__.keys()
    assert own == {*NAMES, "on_become_leader", "on_lose_leadership"}


def test_each_option_of_celery_is_typed() -> None:
    """The options are arguments of ``app.task``, attributes of tasks, and options of messages."""
    found = set(inspect.signature(Celery._task_from_fun).parameters)
    found |= set(extract_exec_options(Task))
    found |= {
        name
        for name, value in vars(Task).items()
        if not name.startswith("_")
        and (value is None or isinstance(value, bool | int | str | tuple))
    }
    no_options = {"self", "fun", "options", "base", "bind", "from_config", "request_stack"}
    assert found - no_options <= CeleryOptions.__annotations__.keys()
