"""Singleton tasks that run in the test's own process, and their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery import Celery

from celery_singleton_state import singleton_task
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Ended, NewValue, Row, Write


@dataclass
class Counter:
    n: int = 0


def idle(self: Any) -> None:
    """A body that does nothing."""


def task_of(app: Celery, body: Callable[..., Any], **options: Any) -> Any:
    options = {"state_schema": Counter, "name": "count", "shared": False} | options
    return singleton_task(app, **options)(body)


def row(app: Celery, name: str = "count") -> Row:
    found = runtime_of(app).store.peek(f"singleton-state:{name}")
    assert found is not None
    return found


def write(app: Celery, value: str, version: int | None = None, name: str = "count") -> None:
    """Store a value in the singleton's row, as a run does."""
    store = runtime_of(app).store
    acquired = store.acquire(f"singleton-state:{name}", "by hand", 60, None)
    assert acquired is not None
    store.release(
        acquired.lease, Ended("succeeded", "[]"), Write(1, 0, NewValue(value, version or 1))
    )


def make_table(app: Celery) -> None:
    """Create a user's own table of numbers in the store's database."""
    with runtime_of(app).sql.engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE written (n integer)")


def written(app: Celery) -> list[int]:
    """Return the numbers in the user's own table."""
    with runtime_of(app).sql.engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT n FROM written ORDER BY n").all()
    return [n for (n,) in found]
