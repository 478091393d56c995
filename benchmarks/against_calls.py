"""``python -m benchmarks.against_calls TASK``: measure direct calls of a task.

For each line of its input it measures some calls, and prints the median of their times in seconds.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import celery_singleton_state

from .measure import median_time
from .tasks import SLOTS, app

CALLS = 60


def main(name: str) -> None:
    """Measure once for each input line, until the input ends.

    :param name: the name of a task in :mod:`benchmarks.tasks`.
    """
    package = Path(celery_singleton_state.__file__).parent.parent
    if not package.samefile(Path.cwd()):
        raise SystemExit(f"the package comes from {package}, and not from {Path.cwd()}")
    task, numbers = app.tasks[f"benchmarks.tasks.{name}"], itertools.count()

    def call() -> None:
        number = next(numbers)
        task(number % SLOTS, number)

    # Fill the histories first, because calls with a full history take longest.
    median_time(call, SLOTS * 16)
    for _ in sys.stdin:
        print(median_time(call, CALLS), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
