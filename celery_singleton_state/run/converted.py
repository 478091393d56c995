"""Argument conversion: how Celery's ``pydantic=True`` converts a message's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.compat import converter_in
from celery_singleton_state.config.options import function_of

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
Converter = Callable[[Any, Any], Arguments]


def converter_of(task: Any) -> Converter | None:
    """Return a function that converts a message's arguments as Celery does for the task's body.

    The function is Celery's own wrapper around the body, with another function in place of the
    body. So the installed Celery converts the arguments, with the task's ``pydantic_strict`` and
    ``pydantic_context``, and raises its own errors.

    :returns: ``None`` if Celery does not convert the task's arguments.
    :raises ImproperlyConfigured: this version of Celery converts them in an unknown way.
    """
    static = function_of(task)
    try:
        convert = converter_in(getattr(static, "__func__", static))
    except LookupError:
        raise ImproperlyConfigured(
            f"task {task.name}: this version of Celery converts arguments (pydantic=True) in an "
            "unknown way; leave pydantic=True out and convert the arguments in the body"
        ) from None
    if convert is None:
        return None
    if isinstance(static, staticmethod):
        return lambda args, kwargs: convert(*args, **kwargs)

    def convert_bound(args: Any, kwargs: Any) -> Arguments:
        (_, *converted), by_name = convert(None, *args, **kwargs)
        return tuple(converted), by_name

    return convert_bound
