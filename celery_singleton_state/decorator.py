"""A decorator that makes singleton tasks and keeps their types."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar

from celery import Celery

from .config.retry import RetryPolicy
from .state.codec import Migration
from .task import S, SingletonTask

P = ParamSpec("P")
R = TypeVar("R")


def singleton_task(
    app: Celery,
    *,
    unique_on: Collection[str] | str | Callable[..., Any] | None = None,
    state_schema: type[S] | None = None,
    initial_state: S | Callable[[], S] | None = None,
    state_version: int | None = None,
    state_migrations: Mapping[int, Migration] | None = None,
    state_round_trip: bool | None = None,
    on_decode_error: str | None = None,
    persist_on_error: bool | None = None,
    on_conflict: str | None = None,
    conflict_timeout: float | None = None,
    hold_at_least: float | None = None,
    enqueue_once: bool | None = None,
    lease_ttl: float | None = None,
    on_lease_lost: str | None = None,
    deduplicate: bool | None = None,
    retry_reasons: Collection[str] | None = None,
    retry_policy: Mapping[str, RetryPolicy] | None = None,
    expected_interval: float | timedelta | None = None,
    base: type[SingletonTask[Any, Any, Any]] = SingletonTask,
    **celery_options: Any,
) -> Callable[[Callable[Concatenate[Any, P], R]], SingletonTask[S, P, R]]:
    """Make a singleton task of a function whose first parameter is the task.

    The same as ``app.task(bind=True, base=SingletonTask, …)``, with the types kept: annotate
    ``self: SingletonTask[Cursor]`` and ``self.state`` is a ``Cursor``.

    Options are those of :class:`SingletonTask`; what is left out takes its default there. All
    further ones are Celery's.

    :raises ImproperlyConfigured: when the task is made, for an option that is not allowed.
    """
    options = {
        "unique_on": unique_on,
        "state_schema": state_schema,
        "initial_state": initial_state,
        "state_version": state_version,
        "state_migrations": state_migrations,
        "state_round_trip": state_round_trip,
        "on_decode_error": on_decode_error,
        "persist_on_error": persist_on_error,
        "on_conflict": on_conflict,
        "conflict_timeout": conflict_timeout,
        "hold_at_least": hold_at_least,
        "enqueue_once": enqueue_once,
        "lease_ttl": lease_ttl,
        "on_lease_lost": on_lease_lost,
        "deduplicate": deduplicate,
        "retry_reasons": retry_reasons,
        "retry_policy": retry_policy,
        "expected_interval": expected_interval,
    }
    chosen = {name: value for name, value in options.items() if value is not None}

    def decorate(function: Callable[Concatenate[Any, P], R]) -> SingletonTask[S, P, R]:
        make: Any = app.task
        task: SingletonTask[S, P, R] = make(bind=True, base=base, **chosen, **celery_options)(
            function
        )
        return task

    return decorate
