"""Take messages from a broker in memory, and deliver them in this process, as a worker does."""

from __future__ import annotations

import uuid
from queue import Empty
from typing import Any

from celery import Celery
from celery.app.trace import build_tracer


def use_own_queue(app: Celery) -> None:
    """Give the app a queue of its own, because all apps of a process share the broker in memory."""
    app.conf.task_default_queue = f"queue-{uuid.uuid4()}"


def received(app: Celery) -> list[Any]:
    """Take all waiting messages from the app's queue."""
    found = []
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue(app.conf.task_default_queue)
        while True:
            try:
                message = queue.get_nowait()
            except Empty:
                return found
            message.ack()
            found.append(message)


def deliver(app: Celery, message: Any) -> Any:
    """Deliver a message; return Celery's record of the delivery, with ``retval`` and
    ``info.state``.
    """
    args, kwargs, embedded = message.payload
    request = {
        **embedded,
        **message.headers,
        "headers": {k: v for k, v in message.headers.items() if k.startswith("singleton_")},
        "delivery_info": dict(message.delivery_info),
        "hostname": "w1@here",
    }
    task = app.tasks[message.headers["task"]]
    return build_tracer(task.name, task, app=app)(message.headers["id"], args, kwargs, request)


def deliver_all(app: Celery, limit: int = 50) -> list[Any]:
    """Deliver all waiting messages, and all messages that the deliveries send."""
    accounts: list[Any] = []
    while messages := received(app):
        for message in messages:
            accounts.append(deliver(app, message))  # noqa: PERF401  # it may send others
        assert len(accounts) < limit
    return accounts
