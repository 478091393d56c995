"""A worker with eventlet warns at its start that runs are not interrupted."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.concurrency.base import BasePool
from celery.concurrency.thread import TaskPool as Threads

from celery_singleton_state.worker.steps import SingletonStep, watch_over


class OfEventlet(BasePool):
    """Stands in for eventlet's pool, whose class cannot be imported without eventlet."""

    __module__ = "celery.concurrency.eventlet"


class OfUsers(OfEventlet):
    """A user's subclass of eventlet's pool, as ``CELERY_CUSTOM_WORKER_POOL`` may name it."""


@pytest.mark.parametrize(
    ("pool", "warns"),
    [
        (OfEventlet, True),
        (OfUsers, True),
        ("celery.concurrency.eventlet:TaskPool", True),
        (Threads, False),
        ("celery.concurrency.gevent:TaskPool", False),
    ],
)
def test_a_worker_of_eventlet_warns_that_runs_are_not_interrupted(
    memory_app: Celery, caplog: pytest.LogCaptureFixture, pool: Any, warns: bool
) -> None:
    watch_over(memory_app)
    worker = SimpleNamespace(app=memory_app, pool_cls=pool, concurrency=2, hostname="w@h")
    step = SingletonStep.__new__(SingletonStep)
    with caplog.at_level(logging.WARNING):
        step.check(worker)
    found = [record for record in caplog.records if "eventlet" in record.getMessage()]
    assert bool(found) == warns
    assert all("is not interrupted" in record.getMessage() for record in found)
    assert all("use --pool=gevent" in record.getMessage() for record in found)
