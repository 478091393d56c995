"""A worker's watch over the processes of its pool: what a dead one held is free at once.

Celery reports a child's death late: up to five seconds after it when the child was killed, while it
still lives when a hard time limit kills it. So the worker waits for the deaths itself, on a
``pidfd`` for each child, which the kernel marks when the child is surely gone.

Where the kernel refuses a ``pidfd`` (Linux before 5.3, gVisor, a seccomp filter, a process that has
too many files open), a thread waits for that child, and leaves it to Celery to be reaped. Without
either, which is macOS before Python 3.13, the leases of a dead child run out.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from typing import Any

from celery_singleton_state.compat import watch_processes
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)

#: Seconds that the worker's end waits for the end of each child.
PATIENCE = 1.0


class ChildWatch:
    """Calls back after each death of a child, in a thread of its own.

    :param on_death: given the process id.
    """

    def __init__(self, on_death: Callable[[int], None]) -> None:
        self._on_death = on_death
        self._own_pid = os.getpid()
        self._pids: dict[int, int] = {}
        self._thread: threading.Thread | None = None
        #: Each waits for one child.
        self._waiting: set[threading.Thread] = set()

    def watch(self, pid: int) -> None:
        """Watch over a child from now on. One that is gone already is called back for as well."""
        try:
            if self._thread is None:
                self._start()
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._on_death(pid)
            return
        except (AttributeError, OSError) as error:
            logger.debug("singletons: process %d has no pidfd: %s", pid, error)
            self._wait_for(pid)
            return
        self._pids[descriptor] = pid
        self._epoll.register(descriptor, select.EPOLLIN)

    def close(self) -> None:
        """End the threads, after they were told of all deaths until now."""
        # A forked child that ends must leave its parent's watch alone.
        if os.getpid() != self._own_pid:
            return
        if self._thread is not None:
            os.write(self._wake_writer, b".")
            self._thread.join()
        for waiting in list(self._waiting):
            # The pool has ended; whoever lives nevertheless is not waited for.
            waiting.join(PATIENCE)

    def _start(self) -> None:
        self._epoll = select.epoll()
        self._wake_reader, self._wake_writer = os.pipe()
        self._epoll.register(self._wake_reader, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="singleton-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        closing = False
        while not closing:
            for descriptor, _ in self._epoll.poll():
                if descriptor == self._wake_reader:
                    closing = True
                else:
                    self._epoll.unregister(descriptor)
                    pid = self._pids.pop(descriptor)
                    os.close(descriptor)
                    self._report(pid)

    def _wait_for(self, pid: int) -> None:
        if not hasattr(os, "waitid"):
            return

        def wait() -> None:
            # It may have been reaped by now.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            self._report(pid)
            self._waiting.discard(threading.current_thread())

        thread = threading.Thread(target=wait, name=f"singleton-watch-{pid}", daemon=True)
        self._waiting.add(thread)
        thread.start()

    def _report(self, pid: int) -> None:
        try:
            self._on_death(pid)
        except Exception:  # the next death must be seen as well
            logger.exception("singletons: what process %d held could not be freed", pid)


def watch_pool(pool: Any, on_death: Callable[[int], None]) -> ChildWatch:
    """Watch over all processes of a billiard pool, those that it will make included."""
    children = ChildWatch(on_death)
    watch_processes(pool, lambda process: children.watch(process.pid))
    return children
