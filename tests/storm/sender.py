"""``python -m tests.storm.sender <app> <seed> <seconds> <jobs a second> <slow> <first number>``

Sends jobs, and tries each until the broker has it. With 0 seconds, one for each singleton.
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

#: How long bodies take, in seconds. Many a slow one has a half that outlives the lease's 2 s.
QUICK, MEDIUM, SLOW = (0.02, 0.1), (0.3, 1.0), (1.5, 5.5)


def send(task: Any, name: str, job: str, seconds: float) -> None:
    """Send a job until the broker has it. Another job's result says that it was not wanted.

    A quorum queue that was sent a message while RabbitMQ started may never confirm it.
    """
    options = {}
    if "confirm_timeout" in inspect.signature(task.app.amqp.send_task_message).parameters:
        options["confirm_timeout"] = 5.0
    while True:
        try:
            result = task.apply_async((name, job, seconds), task_id=job, **options)
        except Exception as error:  # the broker is away, in one of its clients' words
            if type(error).__name__ == "AlreadyQueued":
                return
            time.sleep(0.2)
            continue
        if result.id == job:
            note("sent", job=job, singleton=name)
        return


def storm(chance: random.Random, names: list[str], seconds: float, rate: float) -> Iterator[str]:
    """The names of a storm's jobs, each at its time."""
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
