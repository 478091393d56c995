"""The pauses of messages that wait for a lease: the more messages wait, the longer they pause."""

from __future__ import annotations

import heapq
import threading

from .lease import clock

#: The fraction of a process's time that messages which wait for a lease may take with their tries.
SHARE = 0.05
#: Seconds that one try of a message takes besides its requests to the store: the worker receives
#: the message, passes it to the process, and sends it again.
COST_OF_MESSAGE = 0.005


class Pace:
    """Computes how long a waiting message pauses: the longer, the more messages wait.

    For each key, a ``Pace`` keeps the times at which the messages that this process has sent again
    will try again. So it knows how many messages wait.
    """

    def __init__(self) -> None:
        self._due: dict[str, list[float]] = {}
        self._cost = COST_OF_MESSAGE
        self._lock = threading.Lock()

    def pause(self, key: str, at_least: float, cost: float) -> float:
        """Return the seconds until a message should try again, and note that the message waits.

        :param key: the row's key of the message's singleton.
        :param at_least: seconds to pause if no other message waits.
        :param cost: seconds that the store took to answer the message's last try.
        """
        now = clock()
        with self._lock:
            # Limit by how much one try raises the average, because the first try also makes a
            # connection, and so takes much longer than the next ones.
            cost = min(cost + COST_OF_MESSAGE, 4 * self._cost)
            self._cost += (cost - self._cost) / 8
            for each in list(self._due):
                self._forget_past(each, now)
            waiting = self._due.setdefault(key, [])
            distance = self._cost / SHARE * len(self._due)
            pause = max(at_least, distance * (len(waiting) + 1))
            heapq.heappush(waiting, now + pause)
        return pause

    def _forget_past(self, key: str, now: float) -> None:
        due = self._due[key]
        while due and due[0] <= now:
            heapq.heappop(due)
        if not due:
            del self._due[key]
