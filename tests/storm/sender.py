"""Send jobs to the workers of a storm.

Call: ``python -m tests.storm.sender <app> <seed> <seconds> <jobs a second> <slow> <first number>``.
Each job is sent again until the broker has accepted it. With 0 seconds, one job is sent for each
singleton.
"""

from __future__ import annotations

import importlib
import inspect
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from tests.storm.notes import note

#: The shortest and the longest time of quick, medium and slow bodies, in seconds. Each half of a
#: body is one stretch of work, and half of a slow body can outlast the lease's life of 2 s.
QUICK, MEDIUM, SLOW = (0.02, 0.1), (0.3, 1.0), (1.5, 5.5)


def send(task: Any, name: str, job: str, seconds: float) -> None:
    """Send a job until the broker has accepted it, or the task says that another copy is queued.

    The wait for the broker's confirmation has a time limit, because RabbitMQ may never confirm a
    message that was published to a quorum queue while that queue was starting.
    """
    options = {}
    if "confirm_timeout" in inspect.signature(task.app.amqp.send_task_message).parameters:
        options["confirm_timeout"] = 5.0
    while True:
        try:
            result = task.apply_async((name, job, seconds), task_id=job, **options)
        # the broker is unavailable; each client library has its own error for that
        except Exception as error:
            if type(error).__name__ == "AlreadyQueued":
                return
            time.sleep(0.2)
            continue
        if result.id == job:
            note("sent", job=job, singleton=name)
        return


def storm(chance: random.Random, names: list[str], seconds: float, rate: float) -> Iterator[str]:
    """Yield the singleton's name for each job, at the time at which to send the job."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield chance.choice(names)
        time.sleep(chance.expovariate(rate))


def main(module: str, seed: int, seconds: float, rate: float, slow: int, first: int) -> None:
    contestant = importlib.import_module(module)
    singletons: dict[str, str] = contestant.SINGLETONS
    chance = random.Random(seed)
    names = list(singletons)
    jobs = storm(chance, names, seconds, rate) if seconds else iter(names)
    for number, name in enumerate(jobs, first):
        (bounds,) = chance.choices((QUICK, MEDIUM, SLOW), weights=(85 - slow, 15, slow))
        task = contestant.app.tasks[singletons[name]]
        send(task, name, f"{name}-{number}", chance.uniform(*bounds))


if __name__ == "__main__":
    module, *numbers = sys.argv[1:]
    seed, seconds, rate, slow, first = map(float, numbers)
    main(module, int(seed), seconds, rate, int(slow), int(first))
