"""A worker's watch over the processes of its pool: what a dead one held is free at once.

Celery reports a child's death late: up to five seconds after it when the child was killed, while it
still lives when a hard time limit kills it. So the worker waits for the deaths itself, on a
``pidfd`` for each child, which the kernel marks when the child is surely gone.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class ChildWatch:
    """Calls back after each death of a child, in a thread of its own.

    :param on_death: given the process id.
    """

    def __init__(self, on_death: Callable[[int], None]) -> None:
        self._on_death = on_death
        self._own_pid = os.getpid()
        self._epoll = select.epoll()
        self._pids: dict[int, int] = {}
        self._thread: threading.Thread | None = None
        self._wake_reader, self._wake_writer = os.pipe()
        self._epoll.register(self._wake_reader, select.EPOLLIN)

    def watch(self, pid: int) -> None:
        """Watch over a child from now on. One that is gone already is called back for as well."""
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._on_death(pid)
            return
        self._pids[descriptor] = pid
        self._epoll.register(descriptor, select.EPOLLIN)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="singleton-watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread, after it was told of all deaths until now."""
        if os.getpid() != self._own_pid:
            return  # a forked child that ends must leave its parent's watch alone
        os.write(self._wake_writer, b".")
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            for descriptor, _ in self._epoll.poll():
                if descriptor == self._wake_reader:
                    closing = True
                else:
                    self._tell(descriptor)

    def _tell(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)
        pid = self._pids.pop(descriptor)
        os.close(descriptor)
        try:
            self._on_death(pid)
        except Exception:  # the next death must be seen as well
            logger.exception("singletons: what process %d held could not be freed", pid)


def watch_pool(pool: Any, on_death: Callable[[int], None]) -> ChildWatch | None:
    """Watch over all processes of a billiard pool, those that it will make included.

    Where there is no ``pidfd`` the pool's own reports are used, late as they are.
    """
    if not hasattr(os, "pidfd_open"):
        report = pool.on_process_down

        def report_and_call(process: Any) -> None:
            report(process)
            on_death(process.pid)

        pool.on_process_down = report_and_call
        return None
    children = ChildWatch(on_death)
    watch = children.watch
    make = pool._create_worker_process

    def make_and_watch(i: int) -> Any:
        process = make(i)
        watch(process.pid)
        return process

    pool._create_worker_process = make_and_watch
    for process in list(pool._pool):
        watch(process.pid)
    return children
