"""``handoff``: measure the time from a run's death or a handoff request to the next run.

The time counts from just before the signal or the message is sent until the first line of the next
body. It includes the next message's way through the broker, and its attempts while the lease is
still held. Each case runs on PostgreSQL with the default settings: a lease lives for 8 s, and is
renewed every 4 s. "Another host" is simulated by another directory for temporary files, because the
workers of one host find each other's processes there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from celery import Celery
from rich.console import Console
from rich.table import Table

from .drain import ROOT
from .servers import Servers

TIMEOUT = 60.0
_numbers = itertools.count(1)


class Host:
    """A simulated host: a directory for temporary files, and one for the bodies' marks."""

    def __init__(self, servers: Servers, name: str) -> None:
        self._folder = servers.scratch / f"host-{name}"
        self._marks = servers.scratch / "handoff-marks"
        for folder in (self._folder, self._marks):
            folder.mkdir(exist_ok=True)
        self._environment = os.environ | {
            "BENCHMARK_BROKER": servers.broker,
            "BENCHMARK_DATABASE": servers.postgres,
            "BENCHMARK_MARKS": str(self._marks),
            "CELERY_SINGLETON_AUTO_MIGRATE": "true",
            "TMPDIR": str(self._folder),
        }
        self._app = Celery("client", broker=servers.broker, set_as_current=False)

    @contextlib.contextmanager
    def worker(self, queue: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start a worker, yield it when it is ready, and kill what is left of it at the end."""
        log = self._folder / f"log-{next(_numbers)}"
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.handoff_tasks", "worker"]
        command += ["-Q", queue, "-n", f"w{next(_numbers)}@%h", "-l", "INFO", *options]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--without-mingle", "--without-gossip"],
                cwd=ROOT,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_until(lambda: "ready." in log.read_text(), log.read_text)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def send(self, queue: str, ends: bool, task: str = "wait") -> Path:
        """Send a message; return the file that its body will write."""
        mark = f"mark-{next(_numbers)}"
        self._app.send_task(task, (mark, ends), queue=queue)
        return self._marks / mark

    def hold(self, queue: str, task: str = "wait") -> int:
        """Send a message whose body does not end; return the id of this body's process."""
        return int(_read(self.send(queue, ends=False, task=task))[0])


def _wait_until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"still waiting after {TIMEOUT:g} s: {what()}")
        time.sleep(0.01)


def _read(mark: Path) -> tuple[str, float]:
    _wait_until(mark.exists, lambda: f"{mark} is not written")
    pid, began_at = mark.read_text().split()
    return pid, float(began_at)


def _child_killed(host: Host, other: Host) -> float:
    with host.worker("a", "-c", "2"):
        child = host.hold("a")
        started = time.monotonic()
        os.kill(child, signal.SIGKILL)
        return _read(host.send("a", ends=True))[1] - started


def _worker_killed(next_host: Host, host: Host) -> float:
    with next_host.worker("b", "-c", "1"), host.worker("a", "-c", "1") as worker:
        host.hold("a")
        started = time.monotonic()
        os.killpg(worker.pid, signal.SIGKILL)
        return _read(host.send("b", ends=True))[1] - started


def _stopped(host: Host, other: Host) -> float:
    with other.worker("b", "-c", "1"), host.worker("a", "-c", "1") as worker:
        host.hold("a")
        started = time.monotonic()
        worker.send_signal(signal.SIGQUIT)
        return _read(host.send("b", ends=True))[1] - started


def _replaced(host: Host, other: Host) -> float:
    with host.worker("a", "-c", "2"):
        host.hold("a", task="replace")
        started = time.monotonic()
        return _read(host.send("a", ends=True, task="replace"))[1] - started


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print one table."""
    host, other = Host(servers, "one"), Host(servers, "two")
    cases: dict[str, tuple[str, Callable[[], float]]] = {
        "child killed": ("<= 0.25", lambda: _child_killed(host, other)),
        "worker killed, next on its host": ("", lambda: _worker_killed(host, host)),
        "worker killed, next on another host": ("<= 9", lambda: _worker_killed(other, host)),
        "cold shutdown, next on another host": ("<= 0.5", lambda: _stopped(host, other)),
        "asked to hand over": ("<= 4.5", lambda: _replaced(host, other)),
    }
    repeats = 3 if quick else 30
    table = Table(title=f"handoff: seconds until the next run, {repeats} times each")
    for heading in ("case", "median", "p99", "most", "target"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for name, (target, measure) in cases.items():
        with console.status(f"handoff: {name}"):
            taken = sorted(measure() for _ in range(repeats))
        p99 = taken[min(len(taken) - 1, round(0.99 * len(taken)))]
        figures = (statistics.median(taken), p99, taken[-1])
        table.add_row(name, *(f"{figure:.3f}" for figure in figures), target)
    console.print(table)
