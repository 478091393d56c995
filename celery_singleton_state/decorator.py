"""A decorator that makes singleton tasks and keeps their types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

from celery import Celery

from .config.options import NAMES
from .config.task_options import TaskOptions
from .task import S, SingletonTask

P = ParamSpec("P")
R = TypeVar("R")


def singleton_task(
    app: Celery,
    *,
    base: type[SingletonTask[Any, Any, Any]] = SingletonTask,
    **options: Unpack[TaskOptions[S]],
) -> Callable[[Callable[Concatenate[Any, P], R]], SingletonTask[S, P, R]]:
    """Make a singleton task of a function whose first parameter is the task.

    The same as ``app.task(bind=True, base=SingletonTask, …)``, with the types kept: annotate
    ``self: SingletonTask[Cursor]`` and ``self.state`` is a ``Cursor``.

    :param options: those of :class:`TaskOptions`. One that is left out, or ``None``, is what the
        base class says.
    :raises ImproperlyConfigured: when the task is made, for an option that is not allowed.
    """
    chosen = {
        name: value for name, value in options.items() if value is not None or name not in NAMES
    }

    def decorate(function: Callable[Concatenate[Any, P], R]) -> SingletonTask[S, P, R]:
        make: Any = app.task
        task: SingletonTask[S, P, R] = make(bind=True, base=base, **chosen)(function)
        return task

    return decorate
