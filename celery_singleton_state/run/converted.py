"""The arguments that a body sees where Celery converts them: ``pydantic=True``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

from celery.app import base
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.config.options import function_of

#: The name under which Celery's wrapper knows the body.
_BODY = "task_fun"

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
    wrapper = getattr(static, "__func__", static)
    code = getattr(wrapper, "__code__", None)
    if code is None or wrapper.__globals__ is not vars(base):
        return None
    if _BODY not in code.co_freevars:
        raise ImproperlyConfigured(
            f"task {task.name}: how this version of Celery converts arguments (pydantic=True) is "
            "not known; convert them in the body"
        )
    cells = dict(zip(code.co_freevars, wrapper.__closure__, strict=True))
    cells[_BODY] = CellType(lambda *args, **kwargs: (args, kwargs))
    convert = FunctionType(code, wrapper.__globals__, closure=tuple(cells.values()))
    if isinstance(static, staticmethod):
        return lambda args, kwargs: convert(*args, **kwargs)

    def convert_bound(args: Any, kwargs: Any) -> Arguments:
        (_, *converted), by_name = convert(None, *args, **kwargs)
        return tuple(converted), by_name

    return convert_bound
