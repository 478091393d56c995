"""The options of a singleton task: read from its class, checked when the task is made."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.errors import RETRYABLE_REASONS
from celery_singleton_state.keys import UniqueOn
from celery_singleton_state.retry import RetryPolicy
from celery_singleton_state.state.codec import Codec, Migration, StateError

from .checks import CHECKS


@dataclass(frozen=True)
class Options:
    """A task's options. The names are those of the task's attributes."""

    unique_on: UniqueOn = None
    state_schema: type | None = None
    initial_state: Any = None
    state_version: int = 1
    state_migrations: Mapping[int, Migration] = field(default_factory=dict)
    state_round_trip: bool = True
    on_decode_error: str = "fail"
    persist_on_error: bool = False
    on_conflict: str = "skip"
    conflict_timeout: float | None = None
    hold_at_least: float | None = None
    enqueue_once: bool = False
    lease_ttl: float | None = None
    on_lease_lost: str = "interrupt"
    deduplicate: bool | None = None
    retry_reasons: frozenset[str] = RETRYABLE_REASONS
    retry_policy: Mapping[str, RetryPolicy] = field(default_factory=dict)
    expected_interval: float | None = None

    def codec(self) -> Codec[Any] | None:
        """The codec of the state; ``None`` for a singleton without one."""
        if self.state_schema is None:
            return None
        return Codec(
            self.state_schema,
            self.initial_state,
            self.state_version,
            self.state_migrations,
            self.state_round_trip,
        )


NAMES = tuple(option.name for option in fields(Options))
_OF_STATE = (
    "initial_state",
    "state_version",
    "state_migrations",
    "state_round_trip",
    "on_decode_error",
)
_OF_CELERY = frozenset(dir(Task))


def read_options(task: type[Task[Any, Any]]) -> Options:
    """The options of a task class.

    :raises ImproperlyConfigured: names the task, the option, the value and what is allowed.
    """
    found = {}
    for name in NAMES:
        value = getattr(task, name, None)
        if value is not None:
            found[name] = _checked(task, name, value)
    options = Options(**found)
    _check_together(task, options)
    return options


def options_of(task: Any) -> Options | None:
    """A task's options; ``None`` if it is no singleton."""
    options = getattr(task, "_options", None)
    return options if isinstance(options, Options) else None


def expected_singletons(app: Celery) -> set[str]:
    """The names of those singletons that should run now and then, as far as their tasks tell.

    One with ``unique_on`` is known by its first run.
    """
    return {
        name
        for name, task in app.tasks.items()
        if (own := options_of(task)) and own.expected_interval and own.unique_on is None
    }


def find_misspelled(task_name: str, attributes: Mapping[str, Any]) -> None:
    """Refuse an attribute whose name is nearly that of an option.

    Celery takes any attribute for a task's own, so a misspelled option would do nothing.

    :raises ImproperlyConfigured: there is one.
    """
    for name, value in attributes.items():
        if name in NAMES or name.startswith("_") or name in _OF_CELERY:
            continue
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.85)
        if near:
            raise ImproperlyConfigured(
                f"task {task_name}: {name}={value!r} is no option; did you mean {near[0]}?"
            )


def _checked(task: type[Task[Any, Any]], name: str, value: Any) -> Any:
    try:
        return CHECKS[name](value)
    except ValueError as error:
        raise _refused(task, name, value, str(error)) from None


def _refused(task: type[Task[Any, Any]], name: str, value: Any, allowed: str) -> Exception:
    return ImproperlyConfigured(
        f"task {task.name}: option {name}={value!r} is not allowed; it takes {allowed}"
    )


def _check_together(task: type[Task[Any, Any]], options: Options) -> None:
    """What no option can be judged by alone."""
    if isinstance(options.unique_on, tuple):
        _check_names(task, options.unique_on)
    if options.state_schema is None:
        _check_no_state(task)
    else:
        _check_state(task, options)


def _check_names(task: type[Task[Any, Any]], chosen: tuple[str, ...]) -> None:
    names = list(run_signature(task).parameters)
    if not set(chosen) <= set(names):
        allowed = ", ".join(names) or "none: the task has no arguments"
        raise _refused(task, "unique_on", chosen, f"names of arguments ({allowed})")


def _check_no_state(task: type[Task[Any, Any]]) -> None:
    for name in _OF_STATE:
        value = getattr(task, name, None)
        if value is not None:
            raise _refused(task, name, value, "a value only together with state_schema")


def _check_state(task: type[Task[Any, Any]], options: Options) -> None:
    newest = max(options.state_migrations, default=0)
    if newest >= options.state_version:
        allowed = f"versions below state_version={options.state_version}"
        raise _refused(task, "state_migrations", dict(options.state_migrations), allowed)
    codec = options.codec()
    assert codec is not None
    name = codec.schema.__name__
    try:
        codec.encode(codec.initial())
    except StateError as error:
        allowed = f"a state of {name}, or nothing where {name}() makes one: {error}"
        raise _refused(task, "initial_state", options.initial_state, allowed) from error


def run_signature(task: type[Task[Any, Any]]) -> inspect.Signature:
    """The signature of a task's ``run`` as its callers see it, without ``self``."""
    static = function_of(task)
    if isinstance(static, staticmethod | classmethod):
        return inspect.signature(static.__get__(None, task))
    signature = inspect.signature(static)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def function_of(task: type) -> Any:
    """A task class's ``run`` as its author wrote it: a function, or a ``staticmethod`` of one.

    What leads calls of ``run`` to the guard (:mod:`celery_singleton_state.run.calls`) keeps it.
    """
    static = inspect.getattr_static(task, "run")
    return getattr(static, "unguarded", static)
