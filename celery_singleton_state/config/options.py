"""Read the options of a singleton task from its class, and check them when the task is made."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.errors import RETRYABLE_REASONS, SingletonErrorReason
from celery_singleton_state.keys import UniqueOn
from celery_singleton_state.state.codec import Codec, Migration, StateError, is_schema

from .checks import (
    anything,
    checked,
    checks_of,
    choice,
    duration,
    refused,
    seconds,
    switch,
    whole,
)
from .retry import RetryPolicy
from .settings import MIN_INTERVAL
from .task_options import OnConflict, OnDecodeError, OnLeaseLost

#: The largest allowed ``state_version``. The column ``schema_version`` can hold no larger number.
MAX_VERSION = 2**31 - 1
#: The longest allowed ``lease_ttl``, ``hold_at_least`` and ``conflict_timeout``, in seconds: a day.
#: A longer lease would block its singleton for longer than a day after the lease's holder died.
MAX_SECONDS = 86400.0

#: The allowed values of ``on_conflict``, the option that says what a delivery does if the lease is
#: taken.
POLICIES = get_args(OnConflict)


def _unique_on(value: Any) -> UniqueOn:
    if callable(value) or value == "*":
        return value  # type: ignore[no-any-return]
    is_list = isinstance(value, list | tuple | set | frozenset) and value
    if is_list and all(isinstance(name, str) for name in value):
        return tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    raise ValueError('names of arguments as a list, "*" for all of them, a callable, or None')


def _schema(value: Any) -> Any:
    if not is_schema(value):
        raise ValueError(
            "a dataclass, a msgspec.Struct, an attrs class, a TypedDict or a pydantic model"
        )
    return value


_version = whole(1, MAX_VERSION)


def _migrations(value: Any) -> Mapping[int, Migration]:
    with suppress(ValueError):
        if isinstance(value, Mapping) and all(map(callable, value.values())):
            return {_version(version): step for version, step in value.items()}
    raise ValueError("a dict from versions, 1 or more, to functions of one raw value")


_reason = choice(*SingletonErrorReason)
_REASONS = f"reasons ({', '.join(SingletonErrorReason)})"


def _reasons(value: Any) -> frozenset[str]:
    with suppress(ValueError):
        if isinstance(value, list | tuple | set | frozenset):
            return frozenset(map(_reason, value))
    raise ValueError(f"a list of {_REASONS}")


def _policies(value: Any) -> Mapping[str, RetryPolicy]:
    with suppress(ValueError):
        if isinstance(value, Mapping) and all(isinstance(p, RetryPolicy) for p in value.values()):
            return {_reason(name): policy for name, policy in value.items()}
    raise ValueError(f"a dict from {_REASONS} to RetryPolicy")


@dataclass(frozen=True)
class Options:
    """The checked options of a task. The class lists each option's check and default.

    Each field has the name of an option. A user sets the option as an attribute of the task, or as
    an argument of the decorator. :class:`TaskOptions` explains the options.
    """

    unique_on: Annotated[UniqueOn, _unique_on] = None
    state_schema: Annotated[type | None, _schema] = None
    initial_state: Annotated[Any, anything] = None
    state_version: Annotated[int, _version] = 1
    state_migrations: Annotated[Mapping[int, Migration], _migrations] = field(default_factory=dict)
    state_round_trip: Annotated[bool, switch] = True
    on_decode_error: Annotated[str, choice(*get_args(OnDecodeError))] = "fail"
    persist_on_error: Annotated[bool, switch] = False
    on_conflict: Annotated[str, choice(*POLICIES)] = "skip"
    conflict_timeout: Annotated[float | None, seconds(0, MAX_SECONDS)] = None
    hold_at_least: Annotated[float | None, seconds(0, MAX_SECONDS)] = None
    enqueue_once: Annotated[bool, switch] = False
    lease_ttl: Annotated[float | None, seconds(MIN_INTERVAL, MAX_SECONDS)] = None
    on_lease_lost: Annotated[str, choice(*get_args(OnLeaseLost))] = "interrupt"
    deduplicate: Annotated[bool | None, switch] = None
    retry_reasons: Annotated[frozenset[str], _reasons] = RETRYABLE_REASONS
    retry_policy: Annotated[Mapping[str, RetryPolicy], _policies] = field(default_factory=dict)
    expected_interval: Annotated[float | None, duration(seconds(0, above=True))] = None

    def codec(self) -> Codec[Any] | None:
        """Return the codec for the task's state; ``None`` if the task has no state."""
        if self.state_schema is None:
            return None
        return Codec(
            self.state_schema,
            self.initial_state,
            self.state_version,
            self.state_migrations,
            self.state_round_trip,
        )


_CHECKS = checks_of(Options)
NAMES = tuple(_CHECKS)
#: The options that are only allowed together with ``state_schema``.
_OF_STATE = (
    "initial_state",
    "state_version",
    "state_migrations",
    "state_round_trip",
    "on_decode_error",
)
#: The names of the attributes of Celery's class ``Task``. An attribute with such a name never
#: counts as a misspelled option.
_OF_CELERY = frozenset(dir(Task))


def read_options(task: type[Task[Any, Any]]) -> Options:
    """Read and check the options of a task class.

    :raises ImproperlyConfigured: a value is not allowed. The error names the task, the option, the
        value and what is allowed.
    """
    found = {
        name: checked(f"task {task.name}", f"option {name}", value, check)
        for name, check in _CHECKS.items()
        if (value := getattr(task, name, None)) is not None
    }
    options = Options(**found)
    _check_together(task, options)
    return options


def options_of(task: Any) -> Options | None:
    """Return the options of a task; ``None`` if it is not a singleton task."""
    options = getattr(task, "_options", None)
    return options if isinstance(options, Options) else None


def expected_singletons(app: Celery) -> set[str]:
    """Return the names of an app's singletons that are expected to run regularly.

    A singleton is expected to run regularly if its task has an ``expected_interval``. Tasks with
    ``unique_on`` are left out, because the names of their singletons are not known before the first
    runs.
    """
    return {
        name
        for name, task in app.tasks.items()
        if (own := options_of(task)) and own.expected_interval and own.unique_on is None
    }


def find_misspelled(task_name: str, attributes: Mapping[str, Any]) -> None:
    """Refuse attributes of a task that are probably misspelled options.

    Celery accepts any attribute of a task, so a misspelled option would silently have no effect.

    :param attributes: maps the names of the attributes to their values.
    :raises ImproperlyConfigured: the name of an attribute is similar to the name of an option.
    """
    for name, value in attributes.items():
        if name in NAMES or name.startswith("_") or name in _OF_CELERY:
            continue
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.85)
        if near:
            raise ImproperlyConfigured(
                f"task {task_name}: {name}={value!r} is not an option; did you mean {near[0]}?"
            )


def _refused(task: type[Task[Any, Any]], name: str, value: Any, allowed: str) -> Exception:
    return refused(f"task {task.name}", f"option {name}", repr(value), allowed)


def _check_together(task: type[Task[Any, Any]], options: Options) -> None:
    """Check options whose allowed values depend on other options or on the task's arguments.

    :raises ImproperlyConfigured: a value is not allowed together with the other options, or an
        argument that ``unique_on`` names does not exist.
    """
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
        allowed = f"a state of {name}, or None if {name}() makes one: {error}"
        raise _refused(task, "initial_state", options.initial_state, allowed) from error


def run_signature(task: type[Task[Any, Any]]) -> inspect.Signature:
    """Return the signature of a task's ``run`` as its callers see it, without ``self``."""
    static = function_of(task)
    if isinstance(static, staticmethod | classmethod):
        return inspect.signature(static.__get__(None, task))
    signature = inspect.signature(static)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def function_of(task: type) -> Any:
    """Return the ``run`` of a task class as its author wrote it: a function or a ``staticmethod``.

    :mod:`celery_singleton_state.run.calls` replaces ``run`` by a wrapper that acquires the lease.
    The wrapper keeps the original in its attribute ``unguarded``.
    """
    static = inspect.getattr_static(task, "run")
    return getattr(static, "unguarded", static)
