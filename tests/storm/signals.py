"""Write notes about a storm's jobs when Celery's signals report them."""

from __future__ import annotations

import traceback
from typing import Any

from celery import signals
from celery.concurrency.base import BasePool

from tests.storm.notes import note


def _succeeded(sender: Any, **_: Any) -> None:
    note("succeeded", job=sender.request.id, worker=sender.request.hostname)


def _failed(sender: Any, task_id: str, exception: BaseException, **_: Any) -> None:
    if _is_of_cold_shutdown(exception):
        return
    note("failed", job=task_id, error=f"{type(exception).__name__}: {exception}")


def _is_of_cold_shutdown(error: BaseException) -> bool:
    """Return whether the error comes from a cold shutdown of a solo pool, after the body.

    The signal handler of such a shutdown raises ``NotImplementedError`` wherever the process is.
    This error is no failure of the job, so it is not noted. If the job is lost, the checker finds
    that.
    """
    if not isinstance(error, NotImplementedError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_code is BasePool.terminate_job.__code__


def _sends(headers: Any, **_: Any) -> None:
    note("sends", job=headers["id"])


def _begins(task_id: str, **_: Any) -> None:
    note("begins", job=task_id)


def observe() -> None:
    """Note every message that this process sends, and how each job that it begins ends."""
    signals.before_task_publish.connect(_sends)
    signals.task_prerun.connect(_begins)
    signals.task_success.connect(_succeeded)
    signals.task_failure.connect(_failed)
