"""The app of workers on an unusual host; the environment says which features the host lacks."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

from celery_singleton_state.lease import holder_files
from tests.apps.tasks import app

__all__ = ["app"]

PIDFD = os.environ.get("TEST_PIDFD")

_open = os.pidfd_open
_opened: list[int] = []


def refuse_pidfd(pid: int, *_: Any) -> int:
    how = str(PIDFD)
    if how == "EMFILE, once":
        _opened.append(pid)
        if len(_opened) > 1:
            return _open(pid)
        how = "EMFILE"
    raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)))


def no_temporary_directory() -> str:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")


if PIDFD == "missing":
    del os.pidfd_open
elif PIDFD is not None:
    os.pidfd_open = refuse_pidfd
if "TEST_NO_TEMPDIR" in os.environ:
    tempfile.gettempdir = no_temporary_directory
if "TEST_BOOT_ID" in os.environ:
    # Pretend to be another host: it has another boot id, and its locks do not conflict with others.
    holder_files.BOOT_ID = Path(os.environ["TEST_BOOT_ID"])
    fcntl.flock = lambda *_: None
