"""A message to a fanout exchange: each worker gets a copy, and the task runs once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu import Queue
from kombu.common import Broadcast

from celery_singleton_state import singleton_task
from celery_singleton_state.run import guard
from tests.helpers.kept_messages import Broker, broker_of
from tests.helpers.waiting import wait_until

#: The delivery info of a copy, which names the fanout exchange.
COPY = {"exchange": "all", "routing_key": "", "redelivered": False}


@pytest.fixture
def app(memory_app: Celery) -> Celery:
    memory_app.conf.task_queues = (Queue("celery"), Broadcast("all"))
    return memory_app


@pytest.fixture
def broker(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Broker:
    return broker_of(app, monkeypatch)


def task_of(app: Celery, body: Callable[..., Any]) -> Any:
    return singleton_task(app, name="reload", shared=False)(body)


def test_a_task_id_that_is_used_each_day_runs_once_a_day(app: Celery, broker: Broker) -> None:
    """Send a new message each day with one task id, in two copies. It runs once each day.

    The fault was: from the second day on, all copies counted as copies of the first day's message.
    """
    ran: list[int] = []

    def body(self: Any, day: int) -> None:
        ran.append(day)

    task = task_of(app, body)
    for day in (1, 2, 3):
        task.apply_async((day,), task_id="reload-config")
        message = broker.pop()
        for _ in range(2):
            message.deliver(delivery_info=COPY)
    assert ran == [1, 2, 3]


def test_copies_of_a_retry_wait_for_the_end_of_the_run_that_asked_for_it(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The body asks for a retry.
    2. Two workers get a copy of the retry's message. They wait.
    3. The run ends.
    4. The retry runs once.
    """
    ran: list[int] = []
    waits: list[float] = []
    copies: list[Future[Any]] = []

    def note(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(0.01)

    def body(self: Any) -> None:
        ran.append(self.request.retries)
        if self.request.retries:
            return
        try:
            raise self.retry(countdown=0)
        finally:
            early = broker.pop()
            copies.extend(workers.submit(early.deliver, delivery_info=COPY) for _ in range(2))
            wait_until(
                lambda: len(waits) > 1 or all(copy.done() for copy in copies), "the copies wait"
            )

    monkeypatch.setattr(guard, "time", SimpleNamespace(sleep=note))
    task_of(app, body).delay()
    with ThreadPoolExecutor(2) as workers:
        broker.pop().deliver(delivery_info=COPY)
        for copy in copies:
            copy.result(30)
    assert ran == [0, 1]
    assert set(waits) == {guard.COPY_PAUSE}
