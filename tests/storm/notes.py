"""The notes of a storm's processes: one JSON line each, in one file for all processes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

FILE = "STORM_NOTES"


@cache
def _open(path: str, pid: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(event: str, at: float | None = None, **facts: Any) -> None:
    """Append a note in one write, so that the lines of different processes do not mix.

    :param at: the time of the note, as ``time.monotonic()``, which is the same in all processes of
        a machine. None: now.
    """
    line = json.dumps({"event": event, "at": time.monotonic() if at is None else at} | facts)
    os.write(_open(os.environ[FILE], os.getpid()), line.encode() + b"\n")


def read_notes(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all complete notes, in the order in which they were written."""
    whole, _, _ = path.read_text().rpartition("\n")
    for line in whole.splitlines():
        yield json.loads(line)
