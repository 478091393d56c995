"""``python -m benchmarks.send APP TASK COUNT``: fill the queue for one drain."""

from __future__ import annotations

import sys
from importlib import import_module

from celery import Celery

from .tasks import SLOTS


def send(module: str, name: str, count: int) -> None:
    """Send messages with rotating slots. Each message has a number of its own."""
    app: Celery = import_module(f"benchmarks.{module}").app
    task = app.tasks[f"benchmarks.{module}.{name}"]
    with app.producer_or_acquire() as producer:
        for number in range(count):
            task.apply_async((number % SLOTS, number), producer=producer)


if __name__ == "__main__":
    send(sys.argv[1], sys.argv[2], int(sys.argv[3]))
