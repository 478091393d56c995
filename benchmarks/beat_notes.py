"""A beat's notes about each message that it sends, in a file that it shares with the benchmark.

The file is mapped into memory. So a note costs a microsecond or two with each scheduler, and stays
readable after the process was killed.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

#: How many notes a file has room for. The unused room takes no space on the disk.
ROOM = 400_000
_FORM = struct.Struct("5d")


class Note(NamedTuple):
    """A note about one message.

    :param due: when the message was due, in seconds since the epoch.
    :param sent: when the broker had the message, in seconds since the epoch.
    :param busy: the processor time of the process until ``sent``, in seconds.
    :param statements: the statements that the process had sent to the store until ``sent``.
    :param ticks: the calls of the scheduler's ``tick()`` that had ended until ``sent``.
    """

    due: float
    sent: float
    busy: float
    statements: float
    ticks: float

    @property
    def late(self) -> float:
        """The seconds between ``due`` and ``sent``."""
        return self.sent - self.due


class Notebook:
    """Write notes to a file; only one process may do so."""

    def __init__(self, path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(_FORM.size * ROOM)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._end = 0

    def add(self, note: Note) -> None:
        """Write a note, if the file has room for it."""
        if self._end < len(self._memory):
            _FORM.pack_into(self._memory, self._end, *note)
            self._end += _FORM.size


def read(path: Path, skipped: int = 0) -> list[Note]:
    """Return all notes in a file, but not the first ``skipped`` ones."""
    notes: list[Note] = []
    if not path.exists():
        return notes
    with path.open("rb") as file:
        file.seek(_FORM.size * skipped)
        while len(found := file.read(_FORM.size)) == _FORM.size:
            note = Note(*_FORM.unpack(found))
            if not note.sent:
                break
            notes.append(note)
    return notes
