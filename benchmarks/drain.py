"""Fill a queue, drain it with a real worker, and measure the rate."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from .servers import Servers, stop_process

#: How many bodies at the beginning are not counted: they open connections and fill caches.
WARM_UP = 100
TIMEOUT = 120.0
#: The folder from which ``benchmarks`` can be imported.
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Variant:
    """A task, and the database that it uses.

    :param leases: whether the leases of singletons without a state are in Redis.
    :param app: the module in ``benchmarks`` that has the app and the task.
    :param root: the folder from which the package and its benchmarks are imported.
    """

    task: str
    database: str
    leases: bool = False
    app: str = "tasks"
    root: Path = ROOT

    def environment(self, servers: Servers) -> dict[str, str]:
        """Return the environment of each process that uses the task."""
        return os.environ | {
            "BENCHMARK_BROKER": servers.broker,
            "BENCHMARK_DATABASE": self.database,
            "CELERY_SINGLETON_AUTO_MIGRATE": "true",
            **({"CELERY_SINGLETON_LEASE_URL": servers.broker} if self.leases else {}),
        }


@dataclass(frozen=True)
class Pool:
    """A worker's pool, and more command-line options of the worker."""

    name: str
    concurrency: int
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name if self.name == "solo" else f"{self.name} {self.concurrency}"


@dataclass(frozen=True)
class Drain:
    """The result of one drain.

    :param rate: bodies per second.
    :param skipped: how many messages' bodies did not run.
    """

    rate: float
    skipped: int


def drain(servers: Servers, variant: Variant, pool: Pool, count: int) -> Drain:
    """Send messages, start a worker, and measure how fast it runs their bodies.

    :raises RuntimeError: the worker ended, did not empty the queue in time, or ran too few bodies.
    """
    with drained(servers, variant, pool, count) as marks:
        # Import the app only now, so that importing this module needs no servers.
        from .tasks import read_marks

        times = read_marks(marks)
    counted = times[WARM_UP:]
    if len(counted) < 2:
        raise RuntimeError(f"{variant}: only {len(times)} of {count} bodies ran")
    return Drain((len(counted) - 1) / (counted[-1] - counted[0]), count - len(times))


@contextlib.contextmanager
def drained(servers: Servers, variant: Variant, pool: Pool, count: int) -> Iterator[Path]:
    """Yield the folder with the notes of a worker's processes, after the worker ran all messages.

    :raises RuntimeError: the worker ended, or did not empty the queue in time.
    """
    _send(servers, variant, count)
    with tempfile.TemporaryDirectory(dir=servers.scratch) as folder:
        marks = Path(folder, "marks")
        marks.mkdir()
        environment = variant.environment(servers) | {"BENCHMARK_MARKS": str(marks)}
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*_celery(variant), "worker", *_options(pool)],
                cwd=variant.root,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_until_empty(servers, process, log)
        finally:
            # This is a warm shutdown: running bodies end, and the processes write their notes.
            stop_process(process)
        yield marks


def _send(servers: Servers, variant: Variant, count: int) -> None:
    """Send the messages from another process, whose app is configured like the worker's."""
    subprocess.run(
        [sys.executable, "-m", "benchmarks.send", variant.app, variant.task, str(count)],
        cwd=variant.root,
        env=variant.environment(servers),
        check=True,
    )


def _celery(variant: Variant) -> list[str]:
    return [sys.executable, "-m", "celery", "-A", f"benchmarks.{variant.app}"]


def _options(pool: Pool) -> list[str]:
    return [
        f"--pool={pool.name}",
        f"--concurrency={pool.concurrency}",
        "--loglevel=WARNING",
        # Do not wait for other workers' answers, because there are no other workers.
        "--without-mingle",
        "--without-gossip",
        *pool.options,
    ]


def _wait_until_empty(servers: Servers, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until all messages were taken from the queue and acknowledged."""
    deadline = time.monotonic() + TIMEOUT
    with redis.Redis.from_url(servers.broker) as client:
        # Check twice, because a message that is just being fetched is neither in the queue nor
        # among the unacknowledged messages.
        for _ in range(2):
            while client.llen("celery") or client.hlen("unacked"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the worker did not empty the queue:\n{log.read_text()}")
                time.sleep(0.1)
            time.sleep(0.05)
