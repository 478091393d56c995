"""In a prefork worker's own process: renews the leases of the pool's processes.

:mod:`celery_singleton_state.lease.renewal_slots` says how the children ask for it, and why it is
right.

A thread looks into the children's files, several times in the shortest life of a lease. The
leases that it finds there are renewed by this process's heartbeat, as if this process held them: by
one statement for all children, on one connection. A lease that it finds no longer is dropped.

A child is renewed for as long as the kernel says that it lives, also if it is stopped (a debugger,
``SIGSTOP``): the parent cannot tell a stopped child from a busy one that goes on at any moment. A
time limit ends such a child.
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
    """A lease that a child holds, as its parent sees it.

    The parent does not trust it, so it cannot lose it by the clock: the child does that.
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
        """Tell the child that the renewal was refused; again, until its run has ended."""
        self._answer(RenewalAnswer(self.lease.holder, None), urgent=True)

    def _answer(self, answer: RenewalAnswer, urgent: bool) -> None:
        try:
            write_answer(self._path, self._start, answer)
        except FileNotFoundError:
            return  # the child is gone
        except OSError as error:
            logger.warning("singletons: process %d renews by itself: %s", self._pid, error)
            return
        if urgent and ANSWERED is not None:
            # If the process died just now, and another has its id, that ignores the signal.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._pid, ANSWERED)


class ParentRenewal:
    """Renews the leases of a pool's processes.

    :param processes: the processes that are in the pool at the moment.
    """

    def __init__(self, app: Celery, processes: Callable[[], list[Any]]) -> None:
        self._app = app
        self._processes = processes
        self._mark = mark_as_parent()
        #: By holder: the leases that are renewed, and by which heartbeat.
        self._leases: dict[str, tuple[ChildsLease, Heartbeat]] = {}
        #: By name of a file: the process whose file it is. A later process with the same id has a
        #: file of its own.
        self._owners: dict[str, Any] = {}

    def start(self) -> None:
        """Renew from now on until the process ends, in a thread."""
        threading.Thread(target=self._run, name="singleton-parent", daemon=True).start()

    def _run(self) -> None:
        stopped = threading.Event()
        while not stopped.wait(runtime_of(self._app).io_timeout / 2):
            try:
                self.check()
            except Exception as error:  # the next look still needs this thread
                logger.warning(
                    "singletons: processes of the pool renew by themselves: %s",
                    error,
                    exc_info=not isinstance(error, StoreError),
                )
                # Otherwise the leases of processes that have died meanwhile would be renewed.
                self._drop(*self._leases)

    def check(self) -> None:
        """Find out which leases are to be renewed, and renew them from now on."""
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
        """The files of the pool's living processes, with their ids."""
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
    """Whether a child of this process has not ended. Its end is left to the pool to collect."""
    if not hasattr(os, "waitid"):
        return True  # until the pool has noticed
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
