"""Make calls reach the guard if a task's base class has a ``__call__`` of its own.

The guard is :meth:`SingletonTask.__call__`. Flask's documentation, and Celery's, show a base class
that opens a context around each task: its ``__call__`` ends with ``super().__call__(...)`` or with
``self.run(...)``. There are three cases:

- The class comes *after* ``SingletonTask`` in the method resolution order. The guard calls the
  class's ``__call__`` as the body.
- The class comes *before* ``SingletonTask`` and ends with ``super().__call__``. This call reaches
  the guard without our help.
- The class comes before ``SingletonTask`` and ends with ``self.run``, which would bypass the guard.
  Therefore ``run`` of such a task leads to the guard (:class:`GuardedRun`), but only in a call of
  the task that has not reached the guard yet. In the body, or in a test, ``run`` is the user's
  function.
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
    """One call of a task with a base class whose ``__call__`` runs before the guard."""

    def __init__(self, task: Any) -> None:
        self.task = task
        #: Whether the call is in the guard at present; and whether it has been in the guard at any
        #: time.
        self.is_guarded = self.was_guarded = False


_current: ContextVar[_Call | None] = ContextVar("celery_singleton_state_call", default=None)
#: All calls of this process that :class:`_Call` describes. A thread that a ``__call__`` started
#: does not have the value of :data:`_current`, so it finds its call here.
_calls: list[_Call] = []


def _unguarded_call(task: Any) -> _Call | None:
    """Return the present call of this task if the call is not in the guard; otherwise ``None``."""
    current = _current.get()
    candidates = [current] if current is not None else list(_calls)
    return next((call for call in candidates if call.task is task and not call.is_guarded), None)


@contextmanager
def in_guard(task: Any) -> Iterator[None]:
    """A context manager in which a task's present call, if any, counts as guarded by the lease."""
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
    """Return whether a base class after ``guard`` has a ``__call__`` that is not Celery's own.

    :param guard: the class whose ``__call__`` is the guard.
    """
    behind = task.__mro__[task.__mro__.index(guard) + 1 :]
    return next(each for each in behind if "__call__" in vars(each)) is not Task


def guard_calls(task: Any, guard: type) -> bool:
    """Make sure that all calls of a task class reach the guard.

    :param guard: the class whose ``__call__`` is the guard.
    :returns: whether another class's ``__call__`` runs before the guard.
    :raises ImproperlyConfigured: another class's ``__call__`` runs before the guard, in a way in
        which the guard cannot surround the body.
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
            f"task {task.name}: {first.__name__}.__call__ does the work itself, without the lease; "
            "rename that method to run"
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
        advice = f"move its __call__ to a class that comes after {guard.__name__} in the bases"
    else:
        advice = f"write {guard.__name__} before it in the bases: ({guard.__name__}, {name})"
    raise ImproperlyConfigured(
        f"task {task.name}: its body is asynchronous or a generator, so {name}.__call__ would run "
        f"it after the release of the lease; {advice}"
    )


def _noting(task: Any) -> Callable[..., Any]:
    """Make a task class's ``__call__`` that registers each call, so that ``run`` can find it."""
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
    """Warn, once for each task, of a call that has ended without reaching the guard.

    This is no error, because a ``__call__`` may choose not to run the body.
    """
    logger.warning(
        "task %s: the __call__ of its class ended without self.run(...) or super().__call__(...), "
        "so the lease did not guard what it did",
        name,
    )


class GuardedRun:
    """A descriptor in place of a task class's ``run``, which leads unguarded calls to the guard.

    Celery's ``autoretry_for`` and mocks set ``run`` on the task itself. Such a ``run`` is guarded,
    too.

    :param static: the class's original ``run``, as ``inspect.getattr_static`` gives it.
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
        """Make the value of ``type(self).run``, which is called with the task as first argument.

        If ``run`` is a static method, it is called without the task.
        """
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
    """The ``run`` of one task: it calls the guard if the task's call has not reached the guard yet.

    Otherwise it calls the body.
    """

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
    """Bind an attribute of a class to a task; to the class if ``task`` is ``None``."""
    get = getattr(type(static), "__get__", None)
    return static if get is None else get(static, task, owner)


def keep_class_of_app(task: Any) -> None:
    """Add the app's own task class to the bases of a singleton's class.

    The app's class is that of ``Celery(task_cls=...)`` or ``app.Task``. Celery's ``base=`` replaces
    this class. So with ``base=SingletonTask`` a task would lack what the app's class adds: a
    context around all tasks, or Django's ``delay_on_commit``. The app's class comes after
    ``SingletonTask``, so that the guard calls its ``__call__`` as the body.

    :param task: a task class that Python is creating. The class is changed only if Celery's
        decorator makes it.
    :raises ImproperlyConfigured: Python cannot combine the two classes.
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
