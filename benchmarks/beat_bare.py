"""``python -m benchmarks.beat_bare SECONDS``: print how many messages a loop sends per second.

The loop runs in one process, with one producer like a beat's, and has no schedule.
"""

from __future__ import annotations

import sys
import time

from .beat_app import app, noop

WARM_UP = 200


def rate(seconds: float) -> float:
    """Send for some seconds; return the messages per second."""
    with app.connection_for_write() as connection:
        producer = app.amqp.Producer(connection, auto_declare=False)
        for _ in range(WARM_UP):
            noop.apply_async(producer=producer)
        count, started = 0, time.perf_counter()
        while (taken := time.perf_counter() - started) < seconds:
            noop.apply_async(producer=producer)
            count += 1
    return count / taken


if __name__ == "__main__":
    print(rate(float(sys.argv[1])))
