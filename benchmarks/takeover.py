"""``takeover``: measure how long after a leading beat's end another beat leads, and sends.

The time counts from just before the signal is sent until two events: the other beat acquires the
beats' lease (by the time in its row), and the broker has the other beat's first message. Two beats
run with the default settings, their state in PostgreSQL, and one entry that is due every second;
the second figure includes waiting until the entry is due. "Another host" is simulated by another
directory for temporary files, because the beats of one host find each other's processes there.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psycopg
from rich.console import Console
from rich.table import Table

from .beat_figures import prepare
from .beat_process import OURS, Beat, Schedule
from .servers import Servers

STANDS_BY = "beat stands by: celerybeat"


@dataclass(frozen=True)
class Case:
    """A signal that ends the leader, and whether the next leader runs on the same host.

    :param target: the seconds until another beat must send.
    """

    name: str
    signal: signal.Signals
    same_host: bool
    target: str


CASES = (
    Case("orderly stop (SIGTERM), other host", signal.SIGTERM, False, "<= 1"),
    Case("killed, same host", signal.SIGKILL, True, "<= 10"),
    Case("killed, other host", signal.SIGKILL, False, "<= 10"),
    Case("paused (SIGSTOP), other host", signal.SIGSTOP, False, "<= 10"),
)


class Pair:
    """Two beats of one schedule. The first leads, and the other stands by."""

    def __init__(self, servers: Servers, case: Case) -> None:
        self._servers, self._case = servers, case
        table = f"takeover_{CASES.index(case)}"
        self._schedule = Schedule(OURS, servers.postgres, table, 1)
        hosts = [servers.scratch / f"{table}-{name}" for name in ("one", "two")]
        for host in hosts:
            host.mkdir()
        self._hosts = hosts[:1] * 2 if case.same_host else hosts
        prepare(servers, self._schedule)
        self._database = psycopg.connect(servers.postgres, autocommit=True)
        self._leader = self._start()
        self._leader.wait_until(lambda: self._leader.first_note() is not None)
        self._hosts.reverse()
        self._other = self._start()
        self._other.wait_until(lambda: STANDS_BY in self._other.log)

    def take_over(self) -> tuple[float, float]:
        """End the leader; return the seconds until the other leads, and until it sends."""
        # End the leader at a random time between two ticks.
        time.sleep(random.random())
        old, new = self._leader, self._other
        ended_at = time.time()
        old.process.send_signal(self._case.signal)
        new.wait_until(lambda: new.first_note(ended_at) is not None)
        note = new.first_note(ended_at)
        assert note is not None
        taken = self._led_since() - ended_at, note.sent - ended_at
        self._leader, self._other = new, self._stand_by_again(old)
        return taken

    def close(self) -> None:
        """Kill all processes that still run."""
        self._database.close()
        for beat in (self._leader, self._other):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(beat.process.pid, signal.SIGKILL)
            beat.process.wait()

    def _stand_by_again(self, old: Beat) -> Beat:
        """Return a beat that stands by: the old leader, resumed, or a new process in its place."""
        before = 0
        if self._case.signal is signal.SIGSTOP:
            before = old.log.count(STANDS_BY)
            old.process.send_signal(signal.SIGCONT)
        else:
            old.process.wait(15)
            self._hosts.reverse()
            old = self._start()
        old.wait_until(lambda: old.log.count(STANDS_BY) > before)
        return old

    def _start(self) -> Beat:
        return Beat(self._servers, self._schedule, "INFO", self._hosts[0])

    def _led_since(self) -> float:
        query = (
            f"SELECT extract(epoch FROM acquired_at) FROM {self._schedule.table}"
            " WHERE fence IS NOT NULL"
        )
        row = self._database.execute(query.encode()).fetchone()
        assert row is not None
        return float(row[0])


def run(servers: Servers, quick: bool, console: Console) -> None:
    """Print one table."""
    repeats = 3 if quick else 20
    with console.status("takeover"), ThreadPoolExecutor(2) as pool:
        # Two pairs run at a time, because they mostly wait.
        found = list(pool.map(lambda case: _measure(servers, case, repeats), CASES))
    table = Table(title=f"takeover: seconds until another beat leads, {repeats} times each")
    for number, heading in enumerate(
        ("case", "leads: median", "p99", "most", "sends: median", "most", "target")
    ):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for case, taken in zip(CASES, found, strict=True):
        leads, sends = (sorted(each) for each in zip(*taken, strict=True))
        p99 = leads[min(len(leads) - 1, round(0.99 * len(leads)))]
        figures = (statistics.median(leads), p99, leads[-1], statistics.median(sends), sends[-1])
        table.add_row(case.name, *(f"{figure:.3f}" for figure in figures), case.target)
    console.print(table)


def _measure(servers: Servers, case: Case, repeats: int) -> list[tuple[float, float]]:
    pair = Pair(servers, case)
    try:
        return [pair.take_over() for _ in range(repeats)]
    finally:
        pair.close()
