"""Singletons in a web application that makes its Celery app as Flask's documentation says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from celery import Celery, Task

from celery_singleton_state import SingletonTask, singleton_task
from tests.apps.tasks import Counter, app, inside, wait_for

__all__ = ["app"]


class WebApp:
    """A stand-in for a Flask application: a body may use it only within its context."""

    def __init__(self) -> None:
        self._contexts: ContextVar[int] = ContextVar("contexts", default=0)

    @contextmanager
    def app_context(self) -> Iterator[None]:
        token = self._contexts.set(self._contexts.get() + 1)
        try:
            yield
        finally:
            self._contexts.reset(token)

    @property
    def contexts(self) -> int:
        """In how many contexts of this application the calling code is."""
        return self._contexts.get()


web = WebApp()


def init_celery(celery: Celery) -> type:
    class FlaskTask(Task):  # type: ignore[type-arg]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with web.app_context():
                return self.run(*args, **kwargs)

    celery.Task = FlaskTask
    return FlaskTask


# Set the task class of the existing app; a new app would get it as ``task_cls``.
FlaskTask: Any = init_celery(app)


class Before(FlaskTask, SingletonTask):  # type: ignore[misc]
    pass


class Behind(SingletonTask, FlaskTask):  # type: ignore[misc]
    pass


def body(self: Any, until: str) -> int:
    with inside(self.name, contexts=web.contexts, n=self.state.n):
        wait_for(until)
        self.state.n += 1
    return int(self.state.n)


for name, base in {
    "flask_before": Before,
    "flask_behind": Behind,
    "of_the_app": SingletonTask,
}.items():
    app.task(bind=True, base=base, name=name, state_schema=Counter)(body)


@singleton_task(app, name="paged", state_schema=Counter)
def paged(self: SingletonTask[Counter], page: int) -> int:
    with inside("paged", contexts=web.contexts, n=self.state.n, page=page):
        self.state.n += 1
    if page < 4:
        raise self.replace(self.s(page + 1))
    return self.state.n
