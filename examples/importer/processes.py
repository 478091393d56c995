"""Real processes: started, stopped, killed, and never left behind."""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
#: Seconds that an orderly end may take before it becomes a kill.
PATIENCE = 10.0


class Service:
    """A celery command with all the processes that it starts; within ``with`` it is up.

    :param name: is the command's, and a number where there are several.
    """

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        command = name.split("-")[0]
        self._command = [sys.executable, "-m", "celery", "-A", "tasks", command, *options]
        # Celery's own variables would win over the settings of the demo.
        own = {key: value for key, value in os.environ.items() if not key.startswith("CELERY_")}
        self._environment = own | {"IMPORTER_FOLDER": str(folder), "TMPDIR": str(folder)}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Service":
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()

    def start(self) -> None:
        # All processes of the service inherit the pipe, so it ends when the last of them does.
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
        """The main process's id, which is that of the whole group."""
        return self._started.pid

    @property
    def log(self) -> str:
        """All that it has logged since its first start."""
        return self._log.read_text()

    @property
    def has_ended(self) -> bool:
        """Whether it was started and its main process is gone."""
        return self._process is not None and self._process.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the main process and to those of its pool, all at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def stop(self) -> None:
        """Let it finish what it does and end; kill it if that takes too long."""
        self._started.terminate()
        if not self._all_gone(PATIENCE):
            self.kill()

    def kill(self) -> int:
        """Kill all its processes and wait for their end; returns the main one's exit status."""
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
