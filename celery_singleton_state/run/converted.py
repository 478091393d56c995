"""The arguments that a body sees where Celery converts them: ``pydantic=True``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.compat import converter_in
from celery_singleton_state.config.options import function_of

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
Converter = Callable[[Any, Any], Arguments]


def converter_of(task: Any) -> Converter | None:
    """A function from the arguments of a message to those that the task's body sees.

    It is Celery's own wrapper, with another function in the body's place, so that its rules are
    those of this version of Celery, and of ``pydantic_strict`` and ``pydantic_context``. It raises
    what the wrapper raises.

    :returns: ``None`` if Celery does not convert them.
    :raises ImproperlyConfigured: it does, in a way that is not known here.
    """
    static = function_of(task)
    try:
        convert = converter_in(getattr(static, "__func__", static))
    except LookupError:
        raise ImproperlyConfigured(
            f"task {task.name}: how this version of Celery converts arguments (pydantic=True) is "
            "not known; convert them in the body"
        ) from None
    if convert is None:
        return None
    if isinstance(static, staticmethod):
        return lambda args, kwargs: convert(*args, **kwargs)

    def convert_bound(args: Any, kwargs: Any) -> Arguments:
        (_, *converted), by_name = convert(None, *args, **kwargs)
        return tuple(converted), by_name

    return convert_bound
