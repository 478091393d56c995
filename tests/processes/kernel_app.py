"""The app of the other workers, on a kernel that gives no ``pidfd``, as TEST_PIDFD says."""

from __future__ import annotations

import errno
import os
from typing import Any

from tests.processes.tasks import app

__all__ = ["app"]

_open = os.pidfd_open
_opened: list[int] = []


def refuse(pid: int, *_: Any) -> int:
    how = os.environ["TEST_PIDFD"]
    if how == "EMFILE, once":
        _opened.append(pid)
        if len(_opened) > 1:
            return _open(pid)
        how = "EMFILE"
    raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)))


if os.environ["TEST_PIDFD"] == "missing":
    del os.pidfd_open
else:
    os.pidfd_open = refuse
