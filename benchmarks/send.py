"""``python -m benchmarks.send TASK COUNT``: fill the queue for one drain."""

from __future__ import annotations

import sys

from .tasks import SLOTS, app


def send(name: str, count: int) -> None:
    """Send messages with rotating slots, each with a number of its own."""
    task = app.tasks[f"benchmarks.tasks.{name}"]
    with app.producer_or_acquire() as producer:
        for number in range(count):
            task.apply_async((number % SLOTS, number), producer=producer)


if __name__ == "__main__":
    send(sys.argv[1], int(sys.argv[2]))
