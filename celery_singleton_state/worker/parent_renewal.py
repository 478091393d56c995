"""A prefork worker's main process renews the leases of the pool's processes.

How the children ask for renewals, and why that is safe, is explained in
:mod:`celery_singleton_state.lease.renewal_slots`.

A thread reads the children's holder files, several times within the shortest life of a lease. The
heartbeat of the main process renews all leases that are in the files, with one statement for all
children and on one connection. When a lease is no longer in a file, its renewal stops.

The leases of a child are renewed as long as the kernel says that the child lives, even if it is
stopped by a debugger or ``SIGSTOP``: the parent cannot tell a stopped child from a busy child that
may go on at any time. Celery's hard time limit kills such a child.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from celery import Celery

from celery_singleton_state.lease.heartbeat import Heartbeat
from celery_singleton_state.lease.lease import HeldLease
from celery_singleton_state.lease.renewal_slots import (
    ANSWERED,
    RenewalAnswer,
    RenewalRequest,
    mark_as_parent,
    requests_in,
    write_answer,
)
from celery_singleton_state.runtime import Runtime, runtime_of
from celery_singleton_state.store.base import Lease, StoreError
from celery_singleton_state.text.visible import logger_of

logger = logger_of(__name__)


class ChildsLease(HeldLease):
    """A child process's lease, as the parent process keeps it. The parent renews the lease for the
    child, and writes the store's answer to the child's holder file.

    The parent's clock never declares this lease lost. The child itself checks how long it may trust
    the lease.
    """

    def __init__(self, request: RenewalRequest, path: Path, start: int, pid: int) -> None:
        self._path = path
        self._start = start
        self._pid = pid
        self.is_apart = request.is_apart
        lease = Lease(request.key, request.holder, request.fence, request.ttl)
        super().__init__(lease, request.asked_at, request.every)

    def renewed(self, asked_at: float) -> None:
        super().renewed(asked_at)
        self.trusted_until = float("inf")

    def answered(self, asked_at: float, handoff_to: str | None) -> None:
        self.renewed(asked_at)
        self._answer(
            RenewalAnswer(self.lease.holder, asked_at, handoff_to), urgent=handoff_to is not None
        )

    def lose(self, why: str) -> None:
        self.lost = why
        self.report_loss()

    def report_loss(self) -> None:
        """Tell the child that the store has refused a renewal of the lease.

        :meth:`ParentRenewal.check` repeats this report until the child's run ends.
        """
        self._answer(RenewalAnswer(self.lease.holder, None), urgent=True)

    def _answer(self, answer: RenewalAnswer, urgent: bool) -> None:
        try:
            write_answer(self._path, self._start, answer)
        except FileNotFoundError:
            return  # the child has exited, and its file is deleted
        except OSError as error:
            logger.warning("singletons: process %d renews its own leases: %s", self._pid, error)
            return
        if urgent and ANSWERED is not None:
            # If the child has just died, another process may have got the child's process id. The
            # signal does no harm there, because a process ignores this signal by default.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, ANSWERED)


class ParentRenewal:
    """Renews the leases of the processes of a worker's pool.

    :param processes: returns the processes that are in the pool at present.
    """

    def __init__(self, app: Celery, processes: Callable[[], list[Any]]) -> None:
        self._app = app
        self._processes = processes
        self._mark = mark_as_parent()
        #: Maps the name of each holder to its lease and the heartbeat that renews the lease.
        self._leases: dict[str, tuple[ChildsLease, Heartbeat]] = {}
        #: Maps the name of each holder file to the process that the file belongs to. A later
        #: process with the same process id has a file with another name.
        self._owners: dict[str, Any] = {}

    def start(self) -> None:
        """Start the thread that renews the leases until this process exits."""
        threading.Thread(target=self._run, name="singleton-parent", daemon=True).start()

    def _run(self) -> None:
        stopped = threading.Event()
        while not stopped.wait(runtime_of(self._app).io_timeout / 2):
            try:
                self.check()
            except Exception as error:
                # Catch every error, because this thread must go on to the next check.
                logger.warning(
                    "singletons: the processes of the pool renew their own leases, because their "
                    "parent cannot: %s",
                    error,
                    exc_info=not isinstance(error, StoreError),
                )
                # Stop all renewals: this thread does not know which processes are still alive.
                self._drop(*self._leases)

    def check(self) -> None:
        """Read the children's holder files, renew each new lease in them, and stop renewing the
        leases that are no longer in them.
        """
        own = runtime_of(self._app)
        found = dict(self._requests(own))
        self._drop(*self._leases.keys() - found.keys())
        for holder, held in found.items():
            if holder not in self._leases:
                apart = own.leases if held.is_apart else None
                heartbeat = own.heartbeat_of(apart or own.store)
                self._leases[holder] = held, heartbeat
                heartbeat.hold(held)
            elif self._leases[holder][0].lost:
                self._leases[holder][0].report_loss()

    def _drop(self, *holders: str) -> None:
        for holder in holders:
            held, heartbeat = self._leases.pop(holder)
            heartbeat.drop(held)

    def _requests(self, own: Runtime) -> Iterator[tuple[str, ChildsLease]]:
        for path, pid in self._files(own.holder_files.directory):
            for start, request in requests_in(path):
                if request.parent == self._mark:
                    yield request.holder, ChildsLease(request, path, start, pid)

    def _files(self, directory: Path | None) -> Iterator[tuple[Path, int]]:
        """Yield the holder file and the process id of each living process of the pool."""
        if directory is None or not directory.is_dir():
            return
        processes = {str(process.pid): process for process in self._processes()}
        seen, self._owners = self._owners, {}
        for name in os.listdir(directory):
            pid = name.partition("-")[0]
            if name not in seen and pid not in processes:
                continue
            owner = self._owners[name] = seen[name] if name in seen else processes[pid]
            if pid in processes and processes[pid] is owner and _lives(owner.pid):
                yield directory / name, owner.pid


def _lives(pid: int) -> bool:
    """Whether a child of this process lives. If the child is dead, the pool can still reap it."""
    if not hasattr(os, "waitid"):
        return True  # without waitid(), a child counts as alive until the pool has removed it
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
