"""The open connections of the HTTP server: a bounded number, none of them for good.

Each connection has a thread. A client that sends half a request, or does not read its answer, would
keep that thread for ever, and a time limit for each read would not help: one byte every few seconds
resets it. So the whole request has one deadline, the sending of its answer has another, and a
connection that is past its deadline is shut down, which ends the call that its thread waits in.

When the number is reached, a new connection takes the place of the one that has waited longest for
its client, once that has had a moment to be read by its thread. A client that sends its request at
once is answered, however many others do not.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

#: Connections, and so threads, at one time.
LIMIT = 64
#: Seconds that a whole request may take to arrive, and its answer to be read.
REQUEST_TIME, ANSWER_TIME = 10.0, 30.0
#: Seconds that a connection has in any case: its thread may not have run yet.
MOMENT = 0.25


class Step(Enum):
    """What a connection is waiting for."""

    #: Its client, to send the whole request.
    REQUEST = "request"
    #: The store. The store's own time limits apply.
    STORE = "store"
    #: Its client, to read the whole answer.
    ANSWER = "answer"


@dataclass(slots=True)
class _Open:
    step: Step
    since: float
    deadline: float | None


class Connections:
    """The open connections; used by several threads.

    :param limit: how many there may be.
    :param clock: seconds, of any origin.
    """

    def __init__(
        self,
        limit: int = LIMIT,
        request_time: float = REQUEST_TIME,
        answer_time: float = ANSWER_TIME,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._times = {Step.REQUEST: request_time, Step.STORE: None, Step.ANSWER: answer_time}
        self._clock = clock
        #: With which a change of a step, and an end, are told.
        self._changed = threading.Condition()
        #: In the order in which they came.
        self._open: dict[socket.socket, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: socket.socket) -> bool:
        """Add a connection, in the place of another if the limit is reached.

        It may take :data:`MOMENT`. Returns whether there is room: not if all others wait for the
        store.
        """
        with self._changed:
            while len(self._open) >= self._limit:
                if (oldest := self._oldest()) is None:
                    return False
                left = self._open[oldest].since + MOMENT - self._clock()
                if left <= 0:
                    self._shut(oldest)
                else:
                    self._changed.wait(left)
            self._open[connection] = self._begun(Step.REQUEST)
            return True

    def begin(self, connection: socket.socket, step: Step) -> None:
        """Note what the connection is waiting for from now on."""
        with self._changed:
            if connection in self._open:
                self._open[connection] = self._begun(step)
                self._changed.notify()

    def remove(self, connection: socket.socket) -> None:
        """Forget a connection that is about to be closed.

        A socket that is forgotten is never shut down: its descriptor may be another's by then.
        """
        with self._changed:
            self._open.pop(connection, None)
            self._changed.notify()

    def shut_late(self) -> None:
        """Shut down the connections that are past their deadline."""
        now = self._clock()
        with self._changed:
            for connection, each in list(self._open.items()):
                if each.deadline is not None and each.deadline <= now:
                    self._shut(connection)

    def _begun(self, step: Step) -> _Open:
        now, seconds = self._clock(), self._times[step]
        return _Open(step, now, None if seconds is None else now + seconds)

    def _oldest(self) -> socket.socket | None:
        """The connection that waits longest for its client. One that has sent nothing is worth less
        than one that reads slowly.
        """
        for step in (Step.REQUEST, Step.ANSWER):
            for connection, each in self._open.items():
                if each.step is step:
                    return connection
        return None

    def _shut(self, connection: socket.socket) -> None:
        """End what its thread waits in; the thread then closes it."""
        del self._open[connection]
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
