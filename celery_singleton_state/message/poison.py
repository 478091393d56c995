"""End messages whose every run kills its process.

From Celery 5.7 on, the worker sends the message of a killed child again as a retry
(``retry_on_worker_lost``), and fails it as ``WorkerLostError`` after ``max_retries``. Before 5.7
the message is rejected (``reject_on_worker_lost``): the broker gives it out again at once, and
would do so for ever. Neither counts a worker that dies whole. So the deaths are counted in the
history, by whoever frees the lease of the dead process.
"""

from __future__ import annotations

from celery import Task

from celery_singleton_state import history
from celery_singleton_state.errors import HeartbeatFailed

from .delivery import Delivery

#: Whether Celery itself sends the message of a killed child again, and counts that.
CELERY_COUNTS = hasattr(Task, "retry_on_worker_lost")
#: How often a message's processes may die where Celery counts killed children.
MAX_DEATHS = 20


def deaths_allowed(max_retries: int | None) -> int | None:
    """How often the processes that run a message may die before the message fails.

    :param max_retries: of the task; ``None``: as often as they like.
    """
    if max_retries is None:
        return None
    return max(max_retries, MAX_DEATHS) if CELERY_COUNTS else max_retries


def refuse_poison(delivery: Delivery, entries: tuple[history.Entry, ...]) -> None:
    """Refuse to run a message whose processes have died too often.

    :raises HeartbeatFailed: the message fails.
    """
    task_id = delivery.request.id
    allowed = deaths_allowed(delivery.task.max_retries)
    if not task_id or allowed is None:
        return
    deaths = history.deaths_of(entries, task_id, delivery.sent)
    if deaths > allowed:
        raise HeartbeatFailed(
            delivery.name,
            f"{deaths} processes died while they ran task {task_id}, so it is not run again; "
            f"max_retries={delivery.task.max_retries}",
        )
