"""What each option of a task may be: a value is returned as it is to be used, or refused.

A refusal is a :exc:`ValueError` whose message says what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from celery_singleton_state.errors import parse_reason
from celery_singleton_state.keys import UniqueOn
from celery_singleton_state.retry import RetryPolicy
from celery_singleton_state.state.codec import is_schema

from .settings import MIN_INTERVAL

#: What the column holds.
MAX_VERSION = 2**31 - 1
#: A day: nobody should wait longer for a dead run, and a living one renews.
MAX_SECONDS = 86400.0

#: What a delivery can do that finds the lease taken.
POLICIES = ("skip", "wait", "raise", "replace", "coalesce")


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


def _seconds(least: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= MAX_SECONDS:
            raise ValueError(f"a number of seconds from {least:g} to {MAX_SECONDS:g}")
        return float(value)

    return check


def _interval(value: Any) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not 0 < seconds < float("inf"):
        raise ValueError("a timedelta or a number of seconds, above 0")
    return float(seconds)


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


CHECKS: dict[str, Callable[[Any], Any]] = {
    "unique_on": _unique_on,
    "state_schema": _schema,
    "initial_state": lambda value: value,
    "state_version": _version,
    "state_migrations": _migrations,
    "state_round_trip": _switch,
    "on_decode_error": _choice("fail", "initial"),
    "persist_on_error": _switch,
    "on_conflict": _choice(*POLICIES),
    "conflict_timeout": _seconds(0),
    "hold_at_least": _seconds(0),
    "enqueue_once": _switch,
    "lease_ttl": _seconds(MIN_INTERVAL),
    "on_lease_lost": _choice("interrupt", "finish"),
    "deduplicate": _switch,
    "retry_reasons": _reasons,
    "retry_policy": _policies,
    "expected_interval": _interval,
}
