"""Fail a message whose runs kill their processes again and again.

From Celery 5.7 on, the worker sends the message of a killed child again as a retry
(``retry_on_worker_lost``), and fails it with ``WorkerLostError`` after ``max_retries``. Before 5.7
the worker rejects the message (``reject_on_worker_lost``), and the broker redelivers it at once and
without end. Neither version counts the deaths of a whole worker. So this package counts deaths in
the history: the process that frees the lease of a dead process adds the death.
"""

from __future__ import annotations

from celery import Task

from celery_singleton_state import history
from celery_singleton_state.errors import HeartbeatFailed

from .delivery import Delivery

#: Whether Celery itself retries and counts the messages of killed children, as it does from 5.7 on.
CELERY_COUNTS = hasattr(Task, "retry_on_worker_lost")
#: How many processes may die while they run one message, if Celery itself counts killed children;
#: or ``max_retries`` of the task, if that is larger. The limit is only a safety net: it is larger
#: than the usual ``max_retries``, at which Celery already fails the message.
MAX_DEATHS = 20


def deaths_allowed(max_retries: int | None) -> int | None:
    """Return how many processes may die while they run a message before the message fails.

    :param max_retries: the task's ``max_retries``; ``None`` means no limit.
    :returns: ``None`` if there is no limit.
    """
    if max_retries is None:
        return None
    return max(max_retries, MAX_DEATHS) if CELERY_COUNTS else max_retries


def refuse_poison(delivery: Delivery, entries: tuple[history.Entry, ...]) -> None:
    """Fail a message if too many processes have died while they ran it.

    :raises HeartbeatFailed: more processes died than :func:`deaths_allowed` allows.
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
