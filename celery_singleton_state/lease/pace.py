"""How soon a process sends messages again that wait for a lease, by how many it has sent."""

from __future__ import annotations

import heapq
import threading

from .lease import clock

#: The part of a process's time that the tries of messages which wait may take.
SHARE = 0.05
#: Seconds that a try takes besides its requests to the store: the worker receives a message, hands
#: it to the process, and sends it again.
COST_OF_MESSAGE = 0.005


class Pace:
    """What a process has sent again, by key, and so how long the next message is to pause."""

    def __init__(self) -> None:
        self._due: dict[str, list[float]] = {}
        self._cost = COST_OF_MESSAGE
        self._lock = threading.Lock()

    def pause(self, key: str, at_least: float, cost: float) -> float:
        """Seconds until a message is to try again.

        :param at_least: seconds that it is to pause if nobody else waits.
        :param cost: seconds that the store took to answer its last try.
        """
        now = clock()
        with self._lock:
            # The first request, which makes a connection, tells little of those that follow.
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
