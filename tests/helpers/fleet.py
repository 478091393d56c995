"""Real worker, beat and exporter processes for the tests, and the notes that task bodies write."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import celery
import psutil
import pytest
from celery.result import AsyncResult
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers import commands
from tests.helpers.waiting import wait_until

ROOT = Path(__file__).parents[2]
#: The app of a worker whose test names no other app.
TASKS = "tests.apps.tasks"


class Program:
    """A ``celery <command>`` process in a session of its own."""

    def __init__(
        self, command: list[str], environment: dict[str, str], log: Path, app: str
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", app, *command],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=log.parent,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until the program's output contains a text."""

        def said() -> bool:
            assert self.process.poll() is None, self.output
            return text in self.output

        wait_until(said, f"{self.log.stem} says {text!r}")

    def pids(self) -> list[int]:
        """Return the pids of the program and of all its children."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [self.process.pid, *(child.pid for child in children)]

    def signal_all(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """Stop the program cleanly with SIGTERM, and wait for its end."""
        self.process.terminate()
        self.process.wait(timeout=30)

    def close(self) -> None:
        """Kill the program and all its children at once, in whatever state they are."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)


class Worker(Program):
    """A ``celery worker`` process."""

    def __init__(
        self,
        name: str,
        environment: dict[str, str],
        log: Path,
        options: list[str],
        app: str = TASKS,
    ) -> None:
        command = ["worker", "-n", f"{name}@%h", "-l", "INFO"]
        command += ["--without-mingle", "--without-gossip", *options]
        super().__init__(command, environment, log, app)

    def wait_ready(self) -> None:
        self.wait_for("ready.")


class Beat(Program):
    """A ``celery beat`` process."""

    def __init__(
        self,
        environment: dict[str, str],
        log: Path,
        app: str,
        scheduler: str = "singleton",
        options: tuple[str, ...] = (),
    ) -> None:
        command = ["beat", "-S", scheduler, "-l", "INFO", "-s", f"{log}.schedule", *options]
        super().__init__(command, environment, log, app)

    def wait_leads(self) -> None:
        self.wait_for("beat leads")

    def wait_stands_by(self) -> None:
        self.wait_for("beat stands by")


has_ping = pytest.mark.skipif(
    tuple(map(int, celery.__version__.split(".")[:2])) < (5, 7),
    reason="Celery's beat answers to nothing before 5.7",
)

#: The labels whose values come first in the keys of ``Exporter.metrics``.
LEADING = ("key", "singleton")


class Exporter(Program):
    """A ``celery singleton exporter`` process."""

    def __init__(
        self, environment: dict[str, str], log: Path, app: str, options: tuple[str, ...]
    ) -> None:
        super().__init__(["singleton", "exporter", "--port", "0", *options], environment, log, app)

    @property
    def url(self) -> str:
        """The URL at which the exporter listens; reading it waits until it listens."""
        self.wait_for("listening at ")
        port = int(self.output.split("listening at ")[1].split("/\n")[0].rsplit(":", 1)[1])
        return f"http://127.0.0.1:{port}"

    def get(self, path: str) -> tuple[int, str]:
        """Return the status and the body of the exporter's answer to a request for a path."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Return the samples of one scrape: a dict that maps each metric to a dict, which maps the
        values of the labels, the singleton's first, to the sample's value.
        """
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                names = sorted(
                    sample.labels, key=lambda name: (name not in LEADING, name == "key", name)
                )
                labels = tuple(sample.labels[name] for name in names)
                found.setdefault(sample.name, {})[labels] = sample.value
        return found


class Fleet:
    """Workers on one broker and one store, and the notes that their bodies write."""

    def __init__(
        self, directory: Path, broker: str, store: str, app: str = TASKS, **settings: Any
    ) -> None:
        self.directory = directory
        self.app = app
        self.notes_file = directory / "notes"
        self.notes_file.touch()
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CELERY_")
        }
        self.environment |= {
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(directory),
            "TEST_LOG": str(self.notes_file),
            "C_FORCE_ROOT": "1",
            "CELERY_BROKER_URL": broker,
            "CELERY_RESULT_BACKEND": broker,
            "CELERY_SINGLETON_STORE_URL": store,
            "CELERY_SINGLETON_AUTO_MIGRATE": "1",
        }
        self.environment |= {name: str(value) for name, value in settings.items()}
        self._workers: list[Worker] = []
        self._beats: list[Beat] = []
        self._exporters: list[Exporter] = []

    def start(
        self,
        *options: str,
        name: str = "w",
        ready: bool = True,
        app: str | None = None,
    ) -> Worker:
        """Start a worker, and wait until it is ready."""
        number = len(self._workers)
        worker = Worker(
            f"{name}{number}",
            self.environment,
            self.directory / f"worker{number}.log",
            list(options),
            app or self.app,
        )
        self._workers.append(worker)
        if ready:
            worker.wait_ready()
        return worker

    def start_beat(
        self,
        app: str | None = None,
        scheduler: str = "singleton",
        host: str = "",
        options: tuple[str, ...] = (),
        **environment: str,
    ) -> Beat:
        """Start a beat.

        :param host: the name of the beat's host. Beats of different hosts have different temporary
            directories, so that none of them sees the process of another.
        """
        folder = self.directory / f"host{host}"
        folder.mkdir(exist_ok=True)
        log = self.directory / f"beat{len(self._beats)}.log"
        settings = self.environment | {"TMPDIR": str(folder)} | environment
        self._beats.append(Beat(settings, log, app or self.app, scheduler, options))
        return self._beats[-1]

    def start_exporter(self, *options: str) -> Exporter:
        """Start an exporter, and wait until it receives events."""
        log = self.directory / f"exporter{len(self._exporters)}.log"
        started = Exporter(self.environment, log, self.app, options)
        self._exporters.append(started)
        wait_until(
            lambda: started.metrics()["singleton_broker_up"][()], "the exporter receives events"
        )
        return started

    def notes(self, event: str) -> list[dict[str, Any]]:
        """Return the notes of one event, in order."""
        # Drop the last line if it is only partly written.
        lines = self.notes_file.read_text().rpartition("\n")[0].splitlines()
        return [note for note in map(json.loads, lines) if note["event"] == event]

    def wait_for_notes(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]]:
            found = self.notes(event)
            return found if len(found) >= count else []

        return wait_until(enough, f"{count} times {event}")

    def wait_for_output(self, worker: Worker, text: str) -> None:
        wait_until(lambda: text in worker.output, f"the worker says {text!r}")

    def celery(self, *arguments: str) -> list[str]:
        """Return the command line of ``celery -A … <arguments>``."""
        return [sys.executable, "-m", "celery", "-A", self.app, *arguments]

    def command(self, *arguments: str, app: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run ``celery -A … <arguments>``; return its output and exit code."""
        return commands.run(["-A", app or self.app, *arguments], self.environment, ROOT)

    def outputs(self) -> list[tuple[str, str]]:
        """Return the log of each program, and the notes, as pairs of a title and a text."""
        programs = (*self._workers, *self._beats, *self._exporters)
        said = [(program.log.stem, program.output) for program in programs]
        return [*said, ("notes", self.notes_file.read_text())]

    def close(self) -> None:
        for program in (*self._exporters, *self._beats, *self._workers):
            program.close()


def outcome(result: AsyncResult[Any], deadline: float = 60.0) -> Any:
    """Wait until a task has ended; return its result or its error."""
    wait_until(result.ready, f"task {result.id} ends", deadline)
    return result.result


def refused(fleet: Fleet, *options: str) -> str:
    """Start a worker that must refuse to start; return its output."""
    worker = fleet.start(*options, ready=False)
    worker.process.wait(timeout=30)
    assert worker.process.returncode != 0
    return worker.output
