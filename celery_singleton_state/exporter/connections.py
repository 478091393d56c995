"""The open connections of the HTTP server: limited in number and in time.

Each connection has a thread. A client that sends half a request, or does not read its answer, would
keep that thread for ever. A time limit for each read would not help, because a client can reset
such a limit by one byte every few seconds. So the whole request has one deadline, and sending the
answer has another. When a deadline has passed, the server shuts the connection down. The shutdown
ends the call in which the thread waits.

When the limit of connections is reached, a new connection replaces the oldest connection that waits
for its client. No connection is replaced in the first moment of its wait, so that its thread can
read the request. Therefore a client that sends its request at once is answered, however many other
clients send nothing.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

#: The most connections, and so the most threads, that the server has at one time.
LIMIT = 64
#: Time limits in seconds: the first until the whole request has arrived, the second until the
#: client has read the whole answer.
REQUEST_TIME, ANSWER_TIME = 10.0, 30.0
#: Seconds that a connection must have waited before a new connection may replace it. In a shorter
#: time its thread may not have run at all.
MOMENT = 0.25


class Step(Enum):
    """The three things that a connection can wait for."""

    #: Wait until the client has sent the whole request.
    REQUEST = "request"
    #: Wait until the store has answered. Only the store's own time limits apply.
    STORE = "store"
    #: Wait until the client has read the whole answer.
    ANSWER = "answer"


@dataclass(slots=True)
class _Open:
    step: Step
    since: float
    deadline: float | None


class Connections:
    """The open connections of one server. Several threads may use this object.

    :param limit: the most connections at one time.
    :param request_time: seconds within which a whole request must arrive.
    :param answer_time: seconds within which the client must read the whole answer.
    :param clock: a function that returns a number of seconds that never decreases.
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
        #: Guards the connections. Notified when a connection begins another step or is removed.
        self._changed = threading.Condition()
        #: Maps each open connection to its step, oldest connection first.
        self._open: dict[socket.socket, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: socket.socket) -> bool:
        """Add a connection. If the limit is reached, first shut down another connection.

        The call can take up to :data:`MOMENT` seconds.

        :returns: whether the connection was added. A connection is refused if the limit is reached
            and all other connections wait for the store.
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
        """Record what the connection waits for from now on."""
        with self._changed:
            if connection in self._open:
                self._open[connection] = self._begun(step)
                self._changed.notify()

    def remove(self, connection: socket.socket) -> None:
        """Forget a connection that is about to be closed.

        This object must not shut down a closed connection, because the system may have given the
        connection's file descriptor to another connection.
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
        """Return the connection to replace: the oldest that waits for its client.

        Connections whose request is incomplete come before connections whose client reads slowly.
        ``None`` if all connections wait for the store.
        """
        for step in (Step.REQUEST, Step.ANSWER):
            for connection, each in self._open.items():
                if each.step is step:
                    return connection
        return None

    def _shut(self, connection: socket.socket) -> None:
        """Shut a connection down. Its thread then stops waiting and closes the connection."""
        del self._open[connection]
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
