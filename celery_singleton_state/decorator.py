"""``singleton_task``, a decorator that makes singleton tasks and keeps their types."""

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
    """Make a singleton task from a function whose first parameter is the task, as ``self``.

    The decorator does the same as ``app.task(bind=True, base=SingletonTask, …)``, and also keeps
    the types for a type checker: with the annotation ``self: SingletonTask[Cursor]``,
    ``self.state`` is a ``Cursor``.

    :param app: the Celery app that the task belongs to.
    :param base: the task's base class. Default: :class:`SingletonTask`.
    :param options: the options of :class:`TaskOptions`, Celery's task options included. An option
        of this package that is left out, or ``None``, has the value of the base class.
    :returns: a decorator, which returns the task.
    :raises ImproperlyConfigured: an option is not allowed. The error is raised when Celery makes
        the task.
    """
    chosen = {
        name: value for name, value in options.items() if value is not None or name not in NAMES
    }

    def decorate(function: Callable[Concatenate[Any, P], R]) -> SingletonTask[S, P, R]:
        make: Any = app.task
        task: SingletonTask[S, P, R] = make(bind=True, base=base, **chosen)(function)
        return task

    return decorate
