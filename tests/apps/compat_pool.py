"""Check ``compat`` with real process pools. ``test_compat`` runs this file in a process of its own.

The argument chooses one of Celery's two kinds of pool: ``events`` or ``threads``.
"""

from __future__ import annotations

import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

from celery import Celery
from celery.concurrency.prefork import TaskPool
from kombu.asynchronous import Hub

from celery_singleton_state import compat
from tests.helpers.waiting import wait_until


def main(kind: str) -> None:
    app = Celery("compat", broker="memory://")
    is_threads = kind == "threads"
    pool: Any = TaskPool(1, app=app, threads=is_threads, initargs=(app, "compat"))
    worker = SimpleNamespace(pool=pool)
    assert compat.process_pool(worker) is None
    assert compat.processes_of(worker) == []
    pool.start()
    try:
        if not is_threads:
            pool.register_with_event_loop(Hub())
        billiards = compat.process_pool(worker)
        (first,) = compat.processes_of(worker)
        seen: list[Any] = []
        compat.watch_processes(billiards, seen.append)
        assert seen == [first]
        if is_threads:
            # Do not kill a process here: it may hold the lock of the queue that all processes of
            # the pool share.
            pool.grow(1)
            wait_until(lambda: len(seen) == 2, "a thread of the pool makes one more process")
        else:
            os.kill(first.pid, signal.SIGKILL)
            os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
            compat.replace_dead(billiards)
        assert compat.processes_of(worker) == (seen if is_threads else seen[1:])
    finally:
        pool.terminate()


if __name__ == "__main__":
    main(sys.argv[1])
    print("done")
