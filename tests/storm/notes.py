"""What the processes of a storm write down, one line of JSON each, in one file for all."""

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
    """Append a line, whole: one short write to a file that is open for appending.

    :param at: ``time.monotonic()``, which the processes of a machine share. None: now.
    """
    line = json.dumps({"event": event, "at": time.monotonic() if at is None else at} | facts)
    os.write(_open(os.environ[FILE], os.getpid()), line.encode() + b"\n")


def read_notes(path: Path) -> Iterator[dict[str, Any]]:
    """All notes, in the order in which they were written, but for one that is being written."""
    whole, _, _ = path.read_text().rpartition("\n")
    for line in whole.splitlines():
        yield json.loads(line)
