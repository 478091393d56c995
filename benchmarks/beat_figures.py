"""Run a beat for a window of time, and compute figures from its notes."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from celery_singleton_state.beat import SingletonEntry
from celery_singleton_state.migrations.open_store import open_store

from .beat_app import app, entry_name, seconds_between
from .beat_notes import Note, read
from .beat_process import OURS, Schedule, redbeat_url, started_beat
from .servers import Servers

#: The limits of saturation: a scheduler is saturated if it sends less than the share SATURATED of
#: the due messages, and half of them more than BEHIND seconds late. The share is below 1, because a
#: scheduler that counts from the last run always sends slightly less than is due.
SATURATED, BEHIND = 0.97, 0.25


@dataclass(frozen=True)
class Window:
    """The seconds after the first message: ``warm_up`` seconds that are not counted, then
    ``seconds``.
    """

    warm_up: float
    seconds: float


@dataclass(frozen=True)
class Figures:
    """The figures of one beat.

    :param due_rate: ticks due per second. For this package these ticks are counted within the
        window. The other schedulers count from the last run, so for them the intervals alone give
        the rate.
    :param start: seconds from the process's start to its first message.
    :param start_busy: the processor time of the process until its first message, in seconds.
    :param start_statements: the statements that the process had sent to the store until its first
        message.
    :param notes: the notes of the messages within the window.
    """

    due_rate: float
    window: Window
    start: float
    start_busy: float
    start_statements: int
    notes: list[Note]

    @property
    def rate(self) -> float:
        """The messages sent per second."""
        return len(self.notes) / self.window.seconds

    @property
    def saturated(self) -> bool:
        """Whether the beat could not send all messages that were due."""
        return self.rate < SATURATED * self.due_rate and self.late(0.5) > BEHIND

    def late(self, share: float) -> float:
        """Return the seconds by which this share of the messages was late at most."""
        late = sorted(note.late for note in self.notes)
        return late[min(len(late) - 1, round(share * len(late)))] if late else float("nan")

    @property
    def busy(self) -> float:
        """The processor time per message, in seconds."""
        return self._each("busy", len(self.notes) - 1)

    @property
    def statements_a_tick(self) -> float:
        """The round trips to the store per call of ``tick()``."""
        return self._each("statements", self.ticks)

    @property
    def messages_a_tick(self) -> float:
        """The messages per call of ``tick()``."""
        return (len(self.notes) - 1) / self.ticks if self.ticks else float("nan")

    @property
    def ticks(self) -> float:
        """The calls of ``tick()`` between the first and the last message."""
        return self.notes[-1].ticks - self.notes[0].ticks if self.notes else 0.0

    def _each(self, what: str, count: float) -> float:
        if count <= 0:
            return float("nan")
        grown: float = getattr(self.notes[-1], what) - getattr(self.notes[0], what)
        return grown / count


def prepare(servers: Servers, schedule: Schedule) -> None:
    """Make the tables, and remove what another run has left in Redis."""
    with redis.Redis.from_url(redbeat_url(servers)) as client:
        client.flushdb()
    store = open_store(schedule.database, schedule.table, 10.0, auto_migrate=True)
    store.check()
    store.close()


def measure(servers: Servers, schedule: Schedule, window: Window) -> Figures:
    """Run a beat until the end of its window.

    :raises RuntimeError: the beat ended early, or its notes do not match the messages that arrived.
    """
    with Drain(servers) as drain, started_beat(servers, schedule) as beat:
        beat.wait_until(lambda: bool(read(beat.notes)))
        begin = read(beat.notes)[0].sent + window.warm_up
        end = begin + window.seconds
        beat.wait_until(lambda: time.time() > end, 0.2)
    notes = read(beat.notes)
    if abs(len(notes) - drain.count) > 1:
        raise RuntimeError(f"{len(notes)} messages were noted and {drain.count} arrived")
    first = notes[0]
    return Figures(
        _due_rate(schedule, begin, window.seconds),
        window,
        first.sent - beat.started,
        first.busy,
        int(first.statements),
        [note for note in notes if begin <= note.sent < end],
    )


def _due_rate(schedule: Schedule, begin: float, seconds: float) -> float:
    every = [seconds_between(number, schedule.stretch) for number in range(schedule.entries)]
    if schedule.scheduler != OURS:
        return sum(1 / each for each in every)
    due = 0
    for number, each in enumerate(every):
        entry = SingletonEntry(name=entry_name(number), task="noop", schedule=each, app=app)
        entry.begin(datetime.fromtimestamp(begin, UTC))
        due += max(0, math.ceil((begin + seconds - entry.next_tick.timestamp()) / each))
    return due / seconds


class Drain:
    """Count the messages that arrive at the broker, and throw them away."""

    def __init__(self, servers: Servers) -> None:
        self.count = 0
        self._client = redis.Redis.from_url(servers.broker)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Drain:
        self._client.unlink("celery")
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._ends.set()
        self._thread.join()
        self._take()
        self._client.close()

    def _run(self) -> None:
        while not self._ends.wait(0.25):
            self._take()

    def _take(self) -> None:
        pipe: Any
        with self._client.pipeline() as pipe:
            self.count += int(pipe.llen("celery").unlink("celery").execute()[0])
