"""The options of a singleton task: read from its class, checked when the task is made."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from celery import Task
from celery.exceptions import ImproperlyConfigured

from .conflict import POLICIES
from .errors import RETRYABLE_REASONS, parse_reason
from .keys import UniqueOn
from .retry import RetryPolicy
from .settings import MIN_INTERVAL
from .state import Codec, Migration, StateError, is_schema


@dataclass(frozen=True)
class Options:
    """A task's options. The names are those of the task's attributes."""

    unique_on: UniqueOn = None
    state_schema: type | None = None
    initial_state: Any = None
    state_version: int = 1
    state_migrations: Mapping[int, Migration] = field(default_factory=dict)
    on_decode_error: str = "fail"
    persist_on_error: bool = False
    on_conflict: str = "skip"
    lease_ttl: float | None = None
    deduplicate: bool | None = None
    retry_reasons: frozenset[str] = RETRYABLE_REASONS
    retry_policy: Mapping[str, RetryPolicy] = field(default_factory=dict)

    @property
    def deduplicates(self) -> bool:
        """Whether a message that was done is not done again: as told, else if there is state."""
        return self.state_schema is not None if self.deduplicate is None else self.deduplicate

    def codec(self) -> Codec[Any] | None:
        """The codec of the state; ``None`` for a singleton without one."""
        if self.state_schema is None:
            return None
        return Codec(
            self.state_schema, self.initial_state, self.state_version, self.state_migrations
        )


NAMES = tuple(option.name for option in fields(Options))
#: What the column holds.
MAX_VERSION = 2**31 - 1
#: A day: nobody should wait longer for a dead run, and a living one renews.
MAX_LEASE_TTL = 86400.0
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
        return _CHECKS[name](value)
    except ValueError as error:
        raise _refused(task, name, value, str(error)) from None


def _refused(task: type[Task[Any, Any]], name: str, value: Any, allowed: str) -> Exception:
    return ImproperlyConfigured(
        f"task {task.name}: option {name}={value!r} is not allowed; it takes {allowed}"
    )


def _check_together(task: type[Task[Any, Any]], options: Options) -> None:
    """What no option can be judged by alone."""
    if isinstance(options.unique_on, tuple):
        names = list(run_signature(task).parameters)
        if not set(options.unique_on) <= set(names):
            allowed = ", ".join(names) or "none: the task has no arguments"
            raise _refused(task, "unique_on", options.unique_on, f"names of arguments ({allowed})")
    if options.state_schema is None:
        for name in ("initial_state", "state_version", "state_migrations", "on_decode_error"):
            if getattr(task, name, None) is not None:
                value = getattr(task, name)
                raise _refused(task, name, value, "a value only together with state_schema")
    for version in options.state_migrations:
        if version >= options.state_version:
            raise _refused(
                task,
                "state_migrations",
                dict(options.state_migrations),
                f"versions below state_version={options.state_version}",
            )
    codec = options.codec()
    if codec is not None:
        try:
            codec.encode(codec.initial())
        except StateError as error:
            raise _refused(
                task,
                "initial_state",
                options.initial_state,
                f"a state of {codec.schema.__name__}, or nothing where "
                f"{codec.schema.__name__}() makes one: {error}",
            ) from error


def run_signature(task: type[Task[Any, Any]]) -> inspect.Signature:
    """The signature of a task's ``run`` as its callers see it, without ``self``."""
    static = inspect.getattr_static(task, "run")
    signature = inspect.signature(task.run)
    if isinstance(static, staticmethod | classmethod):
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _unique_on(value: Any) -> UniqueOn:
    if callable(value) or value == "*":
        return value  # type: ignore[no-any-return]
    if isinstance(value, list | tuple | set | frozenset) and value:
        names = sorted(value) if isinstance(value, set | frozenset) else value
        if all(isinstance(name, str) for name in names):
            return tuple(names)
    raise ValueError('names of arguments as a list, "*" for all of them, a callable, or nothing')


def _schema(value: Any) -> Any:
    if not is_schema(value):
        raise ValueError(
            "a dataclass, a msgspec.Struct, an attrs class, a TypedDict or a pydantic model"
        )
    return value


def _version(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_VERSION:
        raise ValueError(f"a whole number from 1 to {MAX_VERSION}")
    return value


def _migrations(value: Any) -> Any:
    if not isinstance(value, Mapping) or not all(
        isinstance(version, int) and version >= 1 and callable(step)
        for version, step in value.items()
    ):
        raise ValueError("a dict from versions, 1 or more, to functions of one raw value")
    return dict(value)


def _choice(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ValueError(", ".join(repr(choice) for choice in allowed))
        return str(value)

    return check


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def _lease_ttl(value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not MIN_INTERVAL <= value <= MAX_LEASE_TTL
    ):
        raise ValueError(f"a number of seconds from {MIN_INTERVAL:g} to {MAX_LEASE_TTL:g}")
    return float(value)


def _reasons(value: Any) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        raise ValueError("a list of reasons")
    return frozenset(parse_reason(name) for name in value)


def _policies(value: Any) -> dict[str, RetryPolicy]:
    if not isinstance(value, Mapping) or not all(
        isinstance(policy, RetryPolicy) for policy in value.values()
    ):
        raise ValueError("a dict from reasons to RetryPolicy")
    return {parse_reason(name): policy for name, policy in value.items()}


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "unique_on": _unique_on,
    "state_schema": _schema,
    "initial_state": lambda value: value,
    "state_version": _version,
    "state_migrations": _migrations,
    "on_decode_error": _choice("fail", "initial"),
    "persist_on_error": _switch,
    "on_conflict": _choice(*POLICIES),
    "lease_ttl": _lease_ttl,
    "deduplicate": _switch,
    "retry_reasons": _reasons,
    "retry_policy": _policies,
}
