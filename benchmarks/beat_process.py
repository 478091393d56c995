"""A beat process of the parts ``beat`` and ``takeover``."""

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

#: Seconds that a beat is given for what it should do.
PATIENCE = 150.0
OURS = "celery_singleton_state.beat:SingletonScheduler"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Schedule:
    """What a beat runs.

    :param database: the URL of this package's store; ``table``: that of this schedule alone.
    :param stretch: by what the intervals of 1 to 60 seconds are multiplied.
    """

    scheduler: str
    database: str
    table: str
    entries: int
    stretch: int = 1

    def environment(self, servers: Servers) -> dict[str, str]:
        """What the app reads."""
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
    """A database beside that of the broker."""
    return servers.broker.removesuffix("/0") + "/1"


class Beat:
    """A process that was started. ``started`` is when, in seconds since the epoch."""

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
        """What it has written so far."""
        return self._log.read_text()

    def first_note(self, since: float = 0.0) -> Note | None:
        """The first message that it sent after a moment, as far as it has."""
        return next((note for note in read(self.notes) if note.sent > since), None)

    def wait_until(self, condition: Callable[[], bool], pause: float = 0.01) -> None:
        """:raises RuntimeError: it ended before that, or took too long."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a beat did not do what it should:\n{self.log}")
            time.sleep(pause)

    def stop(self) -> None:
        """Ask it to stop, and kill it if it does not soon."""
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
    """A beat that is stopped at the end."""
    beat = Beat(servers, schedule)
    try:
        yield beat
    finally:
        beat.stop()
