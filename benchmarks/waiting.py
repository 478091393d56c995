"""``waiting``: measure how long a plain task waits while many messages wait for one singleton.

A worker with two processes gets 20 plain tasks a second, and messages with ``on_conflict="wait"``
for a lease that another worker holds. After all messages were sent, the benchmark measures the time
from sending a plain task to its body. After the holder's end, it measures the time until the first
waiting message runs, and how many of them have run after ten seconds. For comparison, plain tasks
are also measured without waiting messages.

Not measured: sending the messages, and their first attempts, which take 2 s for 1,000 messages.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from celery import Celery
from rich.console import Console
from rich.table import Table

from celery_singleton_state.migrations.open_store import open_store

from .servers import Servers

#: The cases that are measured: how many messages wait, and for how many seconds at most.
CASES = ((0, 600), (300, 600), (1000, 600), (300, 10), (1000, 10))
PLAIN_A_SECOND = 20
#: For how many seconds after the holder's end the served messages are counted.
SERVED_WITHIN = 10.0
START_TIMEOUT = 60.0


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print the table."""
    seconds = 5.0 if quick else 20.0
    table = Table(title="waiting: plain tasks on two processes", title_justify="left")
    for heading in (
        *("waiting", "timeout (s)", "plain ms (p50)", "ms (p95)", "ms (most)"),
        *("first served (s)", f"served in {SERVED_WITHIN:.0f} s"),
    ):
        table.add_column(heading, justify="right")
    for count, timeout in CASES:
        with console.status(f"waiting: {count}, {timeout} s"):
            table.add_row(f"{count:,}", str(timeout), *_measure(servers, count, timeout, seconds))
    console.print(table)


def _measure(servers: Servers, count: int, timeout: int, seconds: float) -> list[str]:
    folder = servers.scratch / f"waiting-{count}-{timeout}"
    folder.mkdir()
    notes, go = folder / "notes", folder / "go"
    notes.touch()
    open_store(servers.postgres, "kv_store", 10.0, auto_migrate=True).close()
    environment = os.environ | {
        "BENCHMARK_BROKER": servers.broker,
        "BENCHMARK_DATABASE": servers.postgres,
        "BENCHMARK_NOTES": str(notes),
        "BENCHMARK_TIMEOUT": str(timeout),
        "C_FORCE_ROOT": "1",
        "TMPDIR": str(folder),
    }
    app = Celery("sender", broker=servers.broker, set_as_current=False)
    try:
        with _worker(environment, folder, 1, "holder"), _worker(environment, folder, 2, "celery"):
            app.send_task("waits", (0, str(go)), queue="holder")
            _wait_for(notes, "holds")
            for number in range(1, count + 1):
                app.send_task("waits", (number,))
            _wait_for_first_tries(servers.broker)
            took = _plain(app, notes, seconds)
            go.touch()
            freed = time.monotonic()
            time.sleep(SERVED_WITHIN)
            served = [at - freed for _, at in _read(notes, "served") if at - freed <= SERVED_WITHIN]
    finally:
        app.control.purge()
        app.close()
        shutil.rmtree(folder)
    took.sort()
    return [
        f"{statistics.median(took) * 1e3:.1f}",
        f"{took[int(len(took) * 0.95)] * 1e3:.0f}",
        f"{took[-1] * 1e3:.0f}",
        f"{min(served):.1f}" if served else "-",
        f"{len(served)}",
    ]


def _wait_for_first_tries(broker: str) -> None:
    """Wait until the queue is empty: then the worker has all messages that wait."""
    until = time.monotonic() + START_TIMEOUT
    with redis.Redis.from_url(broker) as client:
        while client.llen("celery") and time.monotonic() < until:
            time.sleep(0.05)


def _plain(app: Celery, notes: Path, seconds: float) -> list[float]:
    """Send plain tasks evenly; return the seconds from the sending of each to its body."""
    sent, begin = [], time.monotonic()
    for number in range(int(seconds * PLAIN_A_SECOND)):
        time.sleep(max(0.0, begin + number / PLAIN_A_SECOND - time.monotonic()))
        sent.append(time.monotonic())
        app.send_task("plain", (number,))
    until = time.monotonic() + START_TIMEOUT
    while len(_read(notes, "plain")) < len(sent) and time.monotonic() < until:
        time.sleep(0.1)
    return [at - sent[int(number)] for number, at in _read(notes, "plain")]


def _read(notes: Path, what: str) -> list[tuple[float, float]]:
    """Return the numbers and times of the notes of one kind."""
    lines = (line.split() for line in notes.read_text().rpartition("\n")[0].splitlines())
    return [(float(number), float(at)) for kind, number, at in lines if kind == what]


def _wait_for(notes: Path, what: str) -> None:
    until = time.monotonic() + START_TIMEOUT
    while not _read(notes, what):
        if time.monotonic() > until:
            raise TimeoutError(f"no task noted {what!r} within {START_TIMEOUT:.0f} s")
        time.sleep(0.05)


@contextlib.contextmanager
def _worker(
    environment: dict[str, str], folder: Path, processes: int, queue: str
) -> Iterator[None]:
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.waiting_tasks", "worker"]
    command += ["-c", str(processes), "-Q", queue, "-n", f"{queue}@%h", "-l", "WARNING"]
    with (folder / f"{queue}.log").open("wb") as log:
        worker = subprocess.Popen(
            [*command, "--without-mingle", "--without-gossip"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        worker.terminate()
        try:
            worker.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, 9)
            worker.wait()
