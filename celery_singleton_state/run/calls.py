"""Other classes' ``__call__`` beside the guard, which is :meth:`SingletonTask.__call__`.

Flask's documentation, and Celery's, show a base class that opens a context around each task: its
``__call__`` ends in ``super().__call__(...)`` or in ``self.run(...)``. There are three cases:

- Such a class stands *behind* ours in the method resolution order. The guard calls it as the body.
- It stands *before* ours and ends in ``super().__call__``. It reaches the guard by itself.
- It stands before ours and ends in ``self.run``, which would go past the guard. Therefore the
  ``run`` of such a task leads to the guard (:class:`GuardedRun`), but only from a call of the task
  that has not reached the guard yet. In the body, or called by a test, it is the user's function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.compat import is_made_by_decorator, without_app
from celery_singleton_state.config.options import function_of
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)


class _Call:
    """A call of a task whose class has a ``__call__`` of its own before the guard."""

    def __init__(self, task: Any) -> None:
        self.task = task
        #: Whether it is in the guard, and whether it ever was.
        self.is_guarded = self.was_guarded = False


_current: ContextVar[_Call | None] = ContextVar("celery_singleton_state_call", default=None)
#: All calls of this process, for a thread that a ``__call__`` started: it has no context.
_calls: list[_Call] = []


def _unguarded_call(task: Any) -> _Call | None:
    """The call of this task that the calling code is in, if it has not reached the guard."""
    current = _current.get()
    candidates = [current] if current is not None else list(_calls)
    return next((call for call in candidates if call.task is task and not call.is_guarded), None)


@contextmanager
def in_guard(task: Any) -> Iterator[None]:
    """The part of a task's call from the guard on."""
    call = _unguarded_call(task)
    if call is None:
        yield
        return
    call.is_guarded = call.was_guarded = True
    try:
        yield
    finally:
        call.is_guarded = False


def has_call_behind(task: type, guard: type) -> bool:
    """Whether a class behind the guard's has a ``__call__`` which is not Celery's own."""
    behind = task.__mro__[task.__mro__.index(guard) + 1 :]
    return next(each for each in behind if "__call__" in vars(each)) is not Task


def guard_calls(task: Any, guard: type) -> bool:
    """Have all calls of a task class reach the guard.

    :param guard: the class whose ``__call__`` is the guard.
    :returns: whether a class with a ``__call__`` of its own stands before it.
    :raises ImproperlyConfigured: a class with a ``__call__`` of its own stands before the guard,
        and the guard could not surround the body.
    """
    first = next(each for each in task.__mro__ if "__call__" in vars(each))
    if first is guard:
        return False
    _refuse_unguardable(task, first, guard)
    if not hasattr(vars(first)["__call__"], "_is_noted"):
        task.__call__ = _noting(task)
    if not isinstance(inspect.getattr_static(task, "run"), GuardedRun):
        task.run = GuardedRun(inspect.getattr_static(task, "run"))
    return True


def _refuse_unguardable(task: Any, first: type, guard: type) -> None:
    static = function_of(task)
    if static is vars(Task)["run"]:
        raise ImproperlyConfigured(
            f"task {task.name}: {first.__name__}.__call__ does the work itself, without a lease; "
            "name that method run"
        )
    function = inspect.unwrap(getattr(static, "__func__", static))
    kinds = (
        inspect.iscoroutinefunction,
        inspect.isasyncgenfunction,
        inspect.isgeneratorfunction,
    )
    if not any(is_kind(function) for is_kind in kinds):
        return
    name = first.__name__
    if issubclass(first, guard):
        advice = f"move its __call__ to a class that stands behind {guard.__name__} in the bases"
    else:
        advice = f"write {guard.__name__} before it in the bases: ({guard.__name__}, {name})"
    raise ImproperlyConfigured(
        f"task {task.name}: its body is asynchronous or a generator, so {name}.__call__ would run "
        f"it when the lease is released already; {advice}"
    )


def _noting(task: Any) -> Callable[..., Any]:
    """The task class's ``__call__``, which notes each call until it has reached the guard."""
    own = vars(task).get("__call__")

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        call = _Call(self)
        token = _current.set(call)
        _calls.append(call)
        try:
            if own is None:
                result = super(task, self).__call__(*args, **kwargs)
            else:
                result = own.__get__(self, type(self))(*args, **kwargs)
        finally:
            _calls.remove(call)
            _current.reset(token)
        if not call.was_guarded:
            _warn_of_unguarded(self.name)
        return result

    __call__._is_noted = True  # type: ignore[attr-defined]  # a mark, which functools.wraps keeps
    return __call__


@functools.cache
def _warn_of_unguarded(name: str) -> None:
    """Warn, once for each task: calls that do not run the body are allowed."""
    logger.warning(
        "task %s: the __call__ of its class ended without self.run(...) or super().__call__(...); "
        "nothing was guarded by the lease",
        name,
    )


class GuardedRun:
    """The ``run`` of a task class whose calls may come here without having passed the guard.

    Celery's ``autoretry_for`` and mocks set ``run`` on the task itself; that one is guarded, too.

    :param static: the class's ``run``, as it stands in the class.
    """

    def __init__(self, static: Any) -> None:
        self.unguarded = static

    def __get__(self, task: Any, owner: type) -> Any:
        if task is None:
            return self._of_class(owner)
        replaced = vars(task).get("run")
        if replaced is not None and inspect.getattr_static(type(task), "run") is self:
            return _BoundRun(task, replaced)
        return _BoundRun(task, _bound(self.unguarded, task, type(task)))

    def __set__(self, task: Any, run: Any) -> None:
        vars(task)["run"] = run

    def __delete__(self, task: Any) -> None:
        if vars(task).pop("run", None) is None:
            raise AttributeError("run")

    def _of_class(self, owner: type[Any]) -> Any:
        """What ``type(self).run`` is: called with the task, or of a static method without it."""
        function = _bound(self.unguarded, None, owner)
        given = 1 if function is self.unguarded else 0

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            call = _current.get()
            if call is None or call.is_guarded or not isinstance(call.task, owner):
                return function(*args, **kwargs)
            body = functools.partial(function, *args[:given])
            return call.task._run_guarded(body, args[given:], kwargs)

        return run


class _BoundRun:
    """The ``run`` of a task: the body, or the way to the guard."""

    def __init__(self, task: Any, body: Callable[..., Any]) -> None:
        self._task = task
        self._body = body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _unguarded_call(self._task) is None:
            return self._body(*args, **kwargs)
        return self._task._run_guarded(self._body, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._body)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def _bound(static: Any, task: Any, owner: type) -> Any:
    """An attribute of a class as the task, or with ``None`` the class, has it."""
    get = getattr(type(static), "__get__", None)
    return static if get is None else get(static, task, owner)


def keep_class_of_app(task: Any) -> None:
    """Make a task of the app's own task class, too: ``Celery(task_cls=...)``, ``app.Task``.

    Celery's ``base=`` replaces that class. With ``base=SingletonTask`` the context that it opens
    around all tasks would be missing, or Django's ``delay_on_commit``. The app's class is put
    behind ours, so that the guard calls its ``__call__`` as the body.

    :param task: a class that is just being made. One that Celery's decorator does not make is left
        as it is.
    """
    app = vars(task).get("app")
    if not isinstance(app, Celery) or not is_made_by_decorator(task):
        return
    of_app: Any = without_app(app.Task, app)
    if issubclass(task, of_app):
        return
    (base,) = task.__bases__
    try:
        task.__bases__ = (of_app,) if issubclass(of_app, base) else (base, of_app)
    except TypeError as error:
        raise ImproperlyConfigured(
            f"task {task.name}: its base {base.__name__} and the app's own task class "
            f"{of_app.__name__} do not go together ({error}); derive one class from both"
        ) from error
