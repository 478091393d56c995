"""The open connections of the HTTP server: a bounded number, none of them for good.

Each connection has a thread. A client that sends half a request, or does not read its answer, would
keep that thread for ever, and a time limit for each read would not help: one byte every few seconds
resets it. So the whole request has one deadline, the sending of its answer has another, and a
connection that is past its deadline is shut down, which ends the call that its thread waits in.

When the number is reached, a new connection takes the place of the one that has waited longest for
its client. A client that sends its request at once is answered, however many others do not.
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
        self._lock = threading.Lock()
        #: In the order in which they came.
        self._open: dict[socket.socket, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: socket.socket) -> bool:
        """Add a connection, in the place of another if the limit is reached.

        Returns whether there is room: not if all others wait for the store.
        """
        with self._lock:
            if len(self._open) >= self._limit:
                # A client that has sent nothing is worth less than one that reads slowly.
                for step in (Step.REQUEST, Step.ANSWER):
                    oldest = next((c for c, each in self._open.items() if each.step is step), None)
                    if oldest is not None:
                        self._shut(oldest)
                        break
                else:
                    return False
            self._open[connection] = _Open(Step.REQUEST, self._deadline(Step.REQUEST))
            return True

    def begin(self, connection: socket.socket, step: Step) -> None:
        """Note what the connection is waiting for from now on."""
        with self._lock:
            if (found := self._open.get(connection)) is not None:
                found.step, found.deadline = step, self._deadline(step)

    def remove(self, connection: socket.socket) -> None:
        """Forget a connection that is about to be closed.

        A socket that is forgotten is never shut down: its descriptor may be another's by then.
        """
        with self._lock:
            self._open.pop(connection, None)

    def shut_late(self) -> None:
        """Shut down the connections that are past their deadline."""
        now = self._clock()
        with self._lock:
            for connection, each in list(self._open.items()):
                if each.deadline is not None and each.deadline <= now:
                    self._shut(connection)

    def _deadline(self, step: Step) -> float | None:
        seconds = self._times[step]
        return None if seconds is None else self._clock() + seconds

    def _shut(self, connection: socket.socket) -> None:
        """End what its thread waits in; the thread then closes it."""
        del self._open[connection]
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
