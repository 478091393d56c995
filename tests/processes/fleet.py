"""Real worker processes for the tests, and what their bodies wrote down."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from celery.result import AsyncResult

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


class Worker:
    """A ``celery worker`` with a session of its own."""

    def __init__(
        self,
        name: str,
        environment: dict[str, str],
        log: Path,
        options: list[str],
        app: str = "tests.processes.tasks",
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "celery", "-A", app, "worker"),
                    *("-n", f"{name}@%h", "-l", "INFO", "--without-mingle", "--without-gossip"),
                    *options,
                ],
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

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.output
            return "ready." in self.output

        wait_until(ready, "the worker is ready")

    def pids(self) -> list[int]:
        """Of the worker and of all its children."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [self.process.pid, *(child.pid for child in children)]

    def signal_all(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """An orderly stop."""
        self.process.terminate()
        self.process.wait(timeout=30)

    def close(self) -> None:
        """End it and all its children at once, whatever state they are in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)


class Fleet:
    """Workers on one broker and one store, and the log that their bodies write."""

    def __init__(self, directory: Path, broker: str, store: str, **settings: Any) -> None:
        self.directory = directory
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

    def start(self, *options: str, name: str = "w", ready: bool = True) -> Worker:
        """Start a worker, and wait until it is ready."""
        number = len(self._workers)
        worker = Worker(
            f"{name}{number}",
            self.environment,
            self.directory / f"worker{number}.log",
            list(options),
        )
        self._workers.append(worker)
        if ready:
            worker.wait_ready()
        return worker

    def notes(self, event: str) -> list[dict[str, Any]]:
        """What the bodies wrote down of one kind, in order."""
        lines = self.notes_file.read_text().splitlines()
        return [note for note in map(json.loads, lines) if note["event"] == event]

    def wait_for_notes(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]]:
            found = self.notes(event)
            return found if len(found) >= count else []

        return wait_until(enough, f"{count} times {event}")

    def wait_for_output(self, worker: Worker, text: str) -> None:
        wait_until(lambda: text in worker.output, f"the worker says {text!r}")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``celery -A … <arguments>``."""
        return subprocess.run(
            [sys.executable, "-m", "celery", "-A", "tests.processes.tasks", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def outputs(self) -> list[tuple[str, str]]:
        """A title and a text for each worker, and for what the bodies wrote down."""
        said = [(f"worker {worker.log.stem}", worker.output) for worker in self._workers]
        return [*said, ("notes", self.notes_file.read_text())]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def outcome(result: AsyncResult[Any], deadline: float = 60.0) -> Any:
    """The task's result, or its error, asked of the backend until it is there."""
    wait_until(result.ready, f"task {result.id} ends", deadline)
    return result.result
