"""Run Celery's commands, each in a process that is forked from one which has already loaded Celery.

Loading Celery takes four times as long as an average command, and took a tenth of the whole time of
the tests. The process from which commands are forked loads no app. A command that does not end by
itself, such as a worker, is not run in this way.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import warnings
from multiprocessing import get_context
from pathlib import Path

_server = get_context("forkserver")
_server.set_forkserver_preload(
    ["celery.__main__", "celery.bin.celery", "celery_singleton_state.cli"]
)

TIMEOUT = 60.0


def run(
    arguments: list[str], environment: dict[str, str], root: Path
) -> subprocess.CompletedProcess[str]:
    """Run ``celery <arguments>``.

    :param root: the directory in which the app's module is found.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _server.Process(
            target=_main, args=(arguments, environment, os.getcwd(), root, outputs)
        )
        process.start()
        process.join(TIMEOUT)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        stdout, stderr = (output.read_text() for output in outputs)
        process.close()
    if code is None:
        raise subprocess.TimeoutExpired(arguments, TIMEOUT, stdout, stderr)
    return subprocess.CompletedProcess(arguments, code, stdout, stderr)


def _main(
    arguments: list[str], environment: dict[str, str], folder: str, root: Path, outputs: list[Path]
) -> None:
    """Run the command as if a shell had started this process, with its environment, folder and
    output files.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(root))
    tempfile.tempdir = None
    warnings.resetwarnings()
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["celery", *arguments]
    from celery.__main__ import main

    try:
        main()
    finally:
        # Run the exit functions here, because before Python 3.13 a process of multiprocessing does
        # not run them.
        atexit._run_exitfuncs()
