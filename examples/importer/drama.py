"""Plays the demo: orders arrive, the worker and the leading beat are killed, the import goes on."""

import re
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

from orders import FILE_SIZES, Arrivals, data_set
from processes import Service
from proof import Proof, prove
from watch import Row, Watch, make_table

T = TypeVar("T")

TOTAL = sum(FILE_SIZES)
KILL_AFTER = TOTAL // 2
SECONDS_BETWEEN_REPORTS = 1.0
DEADLINE = 120.0
RESTARTS = 3

START = re.compile(r"fence (\d+) starts at (\S+)$", re.MULTILINE)
SKIPPED = re.compile(r"singleton \S+ skipped: ")


class DemoFailed(Exception):
    """The demo failed before its end. The exception's text says why."""


@dataclass(frozen=True)
class Ending:
    """The result of the demo.

    :param killed_fence: the fence of the run that was killed.
    :param resumed_fence: the fence of the next run.
    :param resumed_at: the file and line at which the next run started.
    """

    runs: int
    skipped: int
    killed_fence: int
    resumed_fence: int
    resumed_at: str
    seconds: float
    proof: Proof


class Drama:
    """One demo, in a folder of its own.

    :param say: called with a line of text for each event.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        for name in ("queue", "control", "processed", "inbox"):
            (folder / name).mkdir()
        self._interrupted = False
        self._say = say
        self._began = self._reported = time.monotonic()
        self._restarts = 0
        self._database = folder / "shop.db"
        make_table(self._database)
        self._watch = Watch(self._database)
        self._arrivals = Arrivals(folder / "inbox", say)
        self._worker = Service(folder, "worker", "--loglevel=INFO", "--concurrency=2")
        self._beats = [Service(folder, f"beat-{number}", "--loglevel=INFO") for number in (1, 2)]

    def play(self) -> Ending:
        """Play the whole demo, and compare the table with the data set at the end.

        :raises DemoFailed: the demo did not reach its end.
        :raises KeyboardInterrupt: a signal interrupted the demo.
        """
        with closing(self._watch):
            self._say("starting a worker with a pool of 2, and two beats that tick every second")
            one, other = self._beats
            with self._worker, one, other:
                self._wait_until("the worker is ready", lambda: " ready." in self._worker.log)
                with self._arrivals:
                    dead = self._kill_in_mid_batch()
                    fence, place = self._start_again(dead.fence)
                    self._kill_leading_beat()
                    self._finish()
            return Ending(
                runs=self._watch.row().runs,
                skipped=len(SKIPPED.findall(self._worker.log)),
                killed_fence=dead.fence,
                resumed_fence=fence,
                resumed_at=place,
                seconds=time.monotonic() - self._began,
                proof=prove(self._database, chain.from_iterable(data_set().values())),
            )

    def interrupt(self, *_signal: object) -> None:
        """End the demo early. This is a signal handler."""
        self._interrupted = True

    def _kill_in_mid_batch(self) -> Row:
        """Kill the worker and its pool within a batch, and return the row that the worker left."""
        self._wait_until("half is imported", lambda: self._look().imported >= KILL_AFTER)
        self._wait_until("a batch is half way", self._is_frozen_in_mid_batch, pause=0.001)
        self._say(f"SIGKILL for worker {self._worker.pid} and its pool, in the middle of a batch")
        status = self._worker.kill()
        dead = self._watch.row()
        self._say(f"all its processes are dead, exit status {status}; {dead.lease}")
        self._say(f"committed are {dead.imported:,} lines, up to {dead.file}:{dead.line}")
        return dead

    def _is_frozen_in_mid_batch(self) -> bool:
        """Stop all processes of the worker within a transaction, and return whether that succeeded.

        If no transaction is open, the processes continue.
        """
        if not self._watch.sees_open_transaction():
            return False
        self._worker.signal(signal.SIGSTOP)
        if self._watch.sees_open_transaction():
            return True
        self._worker.signal(signal.SIGCONT)
        return False

    def _start_again(self, dead_fence: int) -> tuple[int, str]:
        """Start the worker, and return the next run's fence and the file and line at its start."""
        self._say("starting the worker again")
        self._worker.start()

        def next_start() -> tuple[int, str] | None:
            self._look()
            starts = ((int(fence), place) for fence, place in START.findall(self._worker.log))
            return next((start for start in starts if start[0] > dead_fence), None)

        fence, place = self._wait_until("the next run starts", next_start)
        self._say(f"the lease is free, and a run with fence {fence} goes on at {place}")
        return fence, place

    def _kill_leading_beat(self) -> None:
        """Kill the leading beat, and wait until the other beat leads."""

        def leads(beat: Service) -> bool:
            return "beat leads" in beat.log

        self._wait_until("a beat leads", lambda: any(map(leads, self._beats)))
        leader, standby = sorted(self._beats, key=leads, reverse=True)
        self._beats.remove(leader)
        self._say(f"SIGKILL for {leader.name}, which leads")
        leader.kill()
        self._wait_until("the other beat leads", lambda: leads(standby))
        self._say(f"{standby.name} leads, and goes on with the schedule")

    def _finish(self) -> None:
        self._wait_until("all is imported", lambda: self._look().imported >= TOTAL)
        self._wait_until("the last run ends", lambda: self._look().holder is None)
        self._say(f"all {TOTAL:,} lines are imported; stopping beat and worker")
        for beat in self._beats:
            beat.stop()
        self._worker.stop()

    # -- waiting

    def _wait_until(self, what: str, condition: Callable[[], T | None], pause: float = 0.05) -> T:
        """Wait until a condition returns a true value, and return this value.

        :raises DemoFailed: the demo takes too long.
        """
        while not (answer := condition()):
            if self._interrupted:
                raise KeyboardInterrupt
            if time.monotonic() - self._began > DEADLINE:
                raise DemoFailed(f"waited in vain until {what}")
            self._revive()
            time.sleep(pause)
        return answer

    def _revive(self) -> None:
        """Restart processes that ended by themselves, as a service manager would.

        A worker ends by itself if it reads half a message. That can happen because the filesystem
        broker lets a process read a message while another process still writes the message.
        """
        for service in (self._worker, *self._beats):
            if not service.has_ended:
                continue
            if self._restarts == RESTARTS:
                end = service.log[-2000:]
                raise DemoFailed(f"the {service.name} keeps ending by itself:\n{end}")
            self._restarts += 1
            self._say(f"the {service.name} ended by itself; starting it again")
            service.kill()
            service.start()

    def _look(self) -> Row:
        """Read the importer's row, and print it once a second."""
        row = self._watch.row()
        if time.monotonic() - self._reported >= SECONDS_BETWEEN_REPORTS:
            self._reported = time.monotonic()
            self._say(f"{row.imported:,} of {TOTAL:,} lines imported; {row.lease}")
        return row
