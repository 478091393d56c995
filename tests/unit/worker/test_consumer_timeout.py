"""The worker's warning about RabbitMQ's ``consumer_timeout``, the time limit for
acknowledgements.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu import Queue

from celery_singleton_state import singleton_task
from celery_singleton_state.worker.consumer_timeout import timeout_of, warn_at_start


def app_on(broker: str, **settings: Any) -> Celery:
    app = Celery("shop", broker=broker, set_as_current=False)
    app.conf.update(settings)
    return app


@pytest.mark.parametrize(
    ("broker", "settings", "seconds"),
    [
        ("redis://", {}, 0),
        ("memory://", {}, 0),
        ("amqp://", {}, 1800),
        ("amqp://", {"singleton_consumer_timeout": 7200}, 7200),
        ("amqp://", {"singleton_consumer_timeout": 0}, 0),
        ("amqp://", {"task_queues": [Queue("a")]}, 1800),
        (
            "amqp://",
            {"task_queues": [Queue("a", queue_arguments={"x-consumer-timeout": 3_600_000})]},
            3600,
        ),
        (
            "amqp://",
            {
                "task_queues": [
                    Queue("a"),
                    Queue("long", consumer_arguments={"x-consumer-timeout": 3_600_000}),
                ]
            },
            3600,
        ),
    ],
)
def test_the_consumer_timeout_is_that_of_the_setting_or_the_queues(
    broker: str, settings: dict[str, Any], seconds: float
) -> None:
    assert timeout_of(app_on(broker, **settings)) == seconds


@pytest.mark.parametrize(
    ("options", "worker", "level"),
    [
        ({}, {}, logging.INFO),
        ({"time_limit": 7200}, {}, logging.WARNING),
        ({"soft_time_limit": 7200}, {}, logging.WARNING),
        ({"time_limit": 600}, {}, None),
        ({"soft_time_limit": 600, "time_limit": 7200}, {}, None),
        ({}, {"time_limit": 600}, None),
        ({}, {"soft_time_limit": 7200}, logging.WARNING),
        ({"acks_late": False}, {}, None),
    ],
)
def test_only_a_task_that_may_run_longer_is_warned_of(
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    worker: dict[str, Any],
    level: int | None,
) -> None:
    app = app_on("amqp://")

    @singleton_task(app, name="closes_the_year", shared=False, **options)
    def body(self: Any) -> None:
        """A body that never runs in this test."""

    app.finalize()
    caplog.set_level(logging.INFO, "celery_singleton_state")
    limits = {"time_limit": None, "soft_time_limit": None} | worker
    warn_at_start(SimpleNamespace(app=app, **limits), 1800)
    assert [record.levelno for record in caplog.records] == ([level] if level else [])
    assert ("closes_the_year" in caplog.text) == (level == logging.WARNING)
