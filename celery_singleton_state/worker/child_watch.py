"""Watch the processes of a worker's pool, so that the leases of a dead process are released at
once.

Celery's own report of a child's death comes at the wrong time: up to five seconds late for a killed
child, and too early after a hard time limit, when the child still lives. Therefore the worker waits
for the deaths itself. The worker opens a ``pidfd`` for each child; the kernel makes the ``pidfd``
readable when the child is surely dead.

If the kernel refuses a ``pidfd`` (Linux before 5.3, gVisor, a seccomp filter, too many open files),
a thread waits for that child with ``waitid`` and leaves the zombie for Celery to reap. If the
system has no ``waitid`` either (macOS before Python 3.13), the leases of a dead child are not
released early, but expire.
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

#: The longest time, in seconds, for which a worker at its exit waits for the death of each child
#: that has no ``pidfd``.
PATIENCE = 1.0


class ChildWatch:
    """Calls a function in a separate thread when a watched child process has died.

    :param on_death: called with the child's process id.
    """

    def __init__(self, on_death: Callable[[int], None]) -> None:
        self._on_death = on_death
        self._own_pid = os.getpid()
        self._pids: dict[int, int] = {}
        self._thread: threading.Thread | None = None
        #: The threads that wait for the death of a child without a pidfd, one thread for each.
        self._waiting: set[threading.Thread] = set()

    def watch(self, pid: int) -> None:
        """Watch a child from now on. A child that is dead already is reported at once."""
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
        """Report the deaths that have not been reported yet, then stop the threads."""
        # A forked child inherits this object and the exit handler, but not the threads. So the
        # child has nothing to stop.
        if os.getpid() != self._own_pid:
            return
        if self._thread is not None:
            os.write(self._wake_writer, b".")
            self._thread.join()
        for waiting in list(self._waiting):
            # The pool has ended, so its children should be dead. If a child still lives after
            # PATIENCE, do not wait for its death any longer.
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
            # Ignore the error of waitid() for a child that Celery has reaped already: such a child
            # is dead, and its death is reported all the same.
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
        except Exception:
            # Catch every error, because this thread must go on to report the next death.
            logger.exception("singletons: the leases of process %d could not be released", pid)


def watch_pool(pool: Any, on_death: Callable[[int], None]) -> ChildWatch:
    """Watch all processes of a billiard pool, including those that it makes later.

    :param on_death: called with the process id of each process that has died.
    """
    children = ChildWatch(on_death)
    watch_processes(pool, lambda process: children.watch(process.pid))
    return children
