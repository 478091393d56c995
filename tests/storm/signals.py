"""What Celery says of a storm's jobs, written down."""

from __future__ import annotations

from typing import Any

from celery import signals

from tests.storm.notes import note


def _succeeded(sender: Any, **_: Any) -> None:
    note("succeeded", job=sender.request.id, worker=sender.request.hostname)


def _failed(sender: Any, task_id: str, exception: BaseException, **_: Any) -> None:
    note("failed", job=task_id, error=f"{type(exception).__name__}: {exception}")


def _sends(headers: Any, **_: Any) -> None:
    note("sends", job=headers["id"])


def _begins(task_id: str, **_: Any) -> None:
    note("begins", job=task_id)


def observe() -> None:
    """Write down what this process sends, and what becomes of what it begins."""
    signals.before_task_publish.connect(_sends)
    signals.task_prerun.connect(_begins)
    signals.task_success.connect(_succeeded)
    signals.task_failure.connect(_failed)
