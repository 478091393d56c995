"""Start and stop a ``celery beat`` process for the parts ``beat`` and ``takeover``."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .beat_notes import Note, read
from .drain import ROOT
from .servers import Servers

#: How many seconds to wait for a beat before the benchmark fails.
PATIENCE = 150.0
OURS = "celery_singleton_state.beat:SingletonScheduler"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Schedule:
    """A scheduler, its store, and the number of its entries.

    :param database: the URL of this package's store.
    :param table: the table for this schedule alone.
    :param stretch: the factor for the intervals of 1 to 60 seconds.
    """

    scheduler: str
    database: str
    table: str
    entries: int
    stretch: int = 1

    def environment(self, servers: Servers) -> dict[str, str]:
        """Return the environment that the app reads."""
        return os.environ | {
            "BENCHMARK_BROKER": servers.broker,
            "BENCHMARK_REDBEAT": redbeat_url(servers),
            "BENCHMARK_DATABASE": self.database,
            "BENCHMARK_ENTRIES": str(self.entries),
            "BENCHMARK_STRETCH": str(self.stretch),
            "CELERY_SINGLETON_AUTO_MIGRATE": "true",
            "CELERY_SINGLETON_TABLE": self.table,
        }


def redbeat_url(servers: Servers) -> str:
    """Return the URL of RedBeat's database: another one on the broker's server."""
    return servers.broker.removesuffix("/0") + "/1"


class Beat:
    """A beat process. ``started`` is the time of its start, in seconds since the epoch."""

    def __init__(
        self,
        servers: Servers,
        schedule: Schedule,
        loglevel: str = "WARNING",
        temporary: Path | None = None,
    ) -> None:
        folder = servers.scratch / f"beat-{next(_numbers)}"
        folder.mkdir()
        self.notes, self._log = folder / "notes", folder / "log"
        environment = schedule.environment(servers) | {"BENCHMARK_NOTES": str(self.notes)}
        if temporary is not None:
            environment["TMPDIR"] = str(temporary)
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.beat_app", "beat"]
        command += ["-S", schedule.scheduler, "-l", loglevel, "--pidfile="]
        with self._log.open("wb") as output:
            self.started = time.time()
            self.process = subprocess.Popen(
                [*command, "-s", str(folder / "schedule")],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """The process's output until now."""
        return self._log.read_text()

    def first_note(self, since: float = 0.0) -> Note | None:
        """Return the first message that was sent after a time, or ``None`` if there is none yet."""
        return next((note for note in read(self.notes) if note.sent > since), None)

    def wait_until(self, condition: Callable[[], bool], pause: float = 0.01) -> None:
        """Wait until a condition holds.

        :raises RuntimeError: the process ended before that, or it took too long.
        """
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the beat exited or took longer than {PATIENCE:.0f} s:\n{self.log}"
                )
            time.sleep(pause)

    def stop(self) -> None:
        """Ask the process to stop, and kill it if it does not stop soon."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def started_beat(servers: Servers, schedule: Schedule) -> Iterator[Beat]:
    """Start a beat, yield it, and stop it at the end."""
    beat = Beat(servers, schedule)
    try:
        yield beat
    finally:
        beat.stop()
