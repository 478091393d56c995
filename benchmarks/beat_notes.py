"""What a beat notes of each message that it sends, in a file that it shares with the benchmark.

A note is written to memory, and so costs a microsecond or two, the same for each scheduler; it is
there when the process has been killed, too.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

#: Notes that a file has room for. What is not written takes no room on the disk.
ROOM = 400_000
_FORM = struct.Struct("5d")


class Note(NamedTuple):
    """One message.

    :param due: when it was due, in seconds since the epoch.
    :param sent: when the broker had it, likewise.
    :param busy: seconds of processor time that the process had taken until then.
    :param statements: how many the process had sent to the store until then.
    :param ticks: how many calls of the scheduler's ``tick()`` had ended until then.
    """

    due: float
    sent: float
    busy: float
    statements: float
    ticks: float

    @property
    def late(self) -> float:
        """Seconds between the two times."""
        return self.sent - self.due


class Notebook:
    """Notes to be written, by one process."""

    def __init__(self, path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(_FORM.size * ROOM)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._end = 0

    def add(self, note: Note) -> None:
        """Write a note, if there is room."""
        if self._end < len(self._memory):
            _FORM.pack_into(self._memory, self._end, *note)
            self._end += _FORM.size


def read(path: Path, skipped: int = 0) -> list[Note]:
    """The notes that have been written, without the first ones."""
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
