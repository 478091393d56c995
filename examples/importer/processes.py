"""Starts, stops and kills the demo's processes, and leaves none behind."""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
#: Seconds that a service has for a graceful shutdown. After that it is killed.
PATIENCE = 10.0


class Service:
    """A Celery command with all its processes. It runs within a ``with`` block.

    :param folder: the demo's folder, which gets the log.
    :param name: the name of the command, with a number if there are several: ``beat-1``.
    :param options: further options of the command.
    """

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        command = name.split("-")[0]
        self._command = [sys.executable, "-m", "celery", "-A", "tasks", command, *options]
        # Celery's environment variables would take precedence over the settings of the demo.
        own = {key: value for key, value in os.environ.items() if not key.startswith("CELERY_")}
        self._environment = own | {"IMPORTER_FOLDER": str(folder), "TMPDIR": str(folder)}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Service":
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()

    def start(self) -> None:
        # All processes of the service inherit the write end of a pipe. So the reader of the pipe
        # meets an end of file exactly when the last of these processes is gone.
        lifeline, inherited = os.pipe()
        self._lifeline = os.fdopen(lifeline)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=HERE,
                env=self._environment,
                stdout=log,
                stderr=log,
                pass_fds=[inherited],
                start_new_session=True,
            )
        os.close(inherited)

    @property
    def pid(self) -> int:
        """The id of the main process, which is also the id of its process group."""
        return self._started.pid

    @property
    def log(self) -> str:
        """The whole log of the service since its first start."""
        return self._log.read_text()

    @property
    def has_ended(self) -> bool:
        """Whether the service was started and its main process is gone."""
        return self._process is not None and self._process.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the main process and the processes of its pool, all at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def stop(self) -> None:
        """Shut the service down gracefully, and kill it if that takes too long."""
        self._started.terminate()
        if not self._all_gone(PATIENCE):
            self.kill()

    def kill(self) -> int:
        """Kill all processes of the service. Return the main process's exit status.

        :raises TimeoutError: a process has not died in time.
        """
        if not self._all_gone(0):
            self.signal(signal.SIGKILL)
            if not self._all_gone(PATIENCE):
                raise TimeoutError(f"{self.name} does not die")
        return self._started.wait()

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    def _all_gone(self, timeout: float) -> bool:
        if not self._lifeline.closed and any(select.select([self._lifeline], [], [], timeout)):
            self._lifeline.close()
        return self._lifeline.closed
