"""Workers that are restarted whenever they end. Each has its own proxies to the store and the
broker.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests.helpers.fleet import Worker
from tests.helpers.servers import Proxy
from tests.storm.notes import note


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def through(proxy: Proxy, url: str) -> str:
    """Return the URL with the port of the proxy instead of the server's."""
    return url.replace(f":{port_of(url)}", f":{proxy.port}", 1)


class Slot:
    """The place of one worker of the fleet: whenever the worker has ended, a new one is started in
    it.

    The worker's connections to the store and the broker go through proxies of its own, so that a
    fault can cut this worker off alone.

    :param app: the module of the worker's app.
    """

    def __init__(
        self,
        name: str,
        options: list[str],
        environment: dict[str, str],
        store: str,
        broker: str,
        directory: Path,
        app: str,
    ) -> None:
        self.name = name
        self.store, self.broker = Proxy(port_of(store)), Proxy(port_of(broker))
        self.log = directory / f"{name}.log"
        self._options, self._app = options, app
        self._environment = environment | {
            "CELERY_SINGLETON_STORE_URL": through(self.store, store),
            "CELERY_BROKER_URL": through(self.broker, broker),
        }
        self._lock = threading.Lock()
        self._starts = itertools.count()
        self.worker = self._start()

    def _start(self) -> Worker:
        note("start", worker=self.name, number=next(self._starts))
        return Worker(self.name, self._environment, self.log, self._options, self._app)

    def restart_if_ended(self) -> None:
        """Start the worker again if it has ended."""
        with self._lock:
            if self.worker.process.poll() is not None:
                self.worker.close()
                self.worker = self._start()

    def signal_all(self, number: signal.Signals) -> None:
        with self._lock, contextlib.suppress(psutil.NoSuchProcess):
            self.worker.signal_all(number)

    def kill_child(self, chance: random.Random) -> None:
        """Kill one process of the worker's pool, or the worker if its pool has no processes."""
        with self._lock, contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            pids = self.worker.pids()
            os.kill(chance.choice(pids[1:] or pids), signal.SIGKILL)

    def shut_down(self, number: signal.Signals) -> None:
        """Ask the worker to shut down: warm with SIGTERM, or cold with SIGQUIT."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            os.kill(self.worker.process.pid, number)

    def mend_store(self) -> None:
        """Let the worker reach the store again, through new connections."""
        self.store.mode = "pass"
        self.store.cut()

    def clear(self) -> None:
        """End all lasting faults of this worker."""
        self.store.mode = "pass"
        self.signal_all(signal.SIGCONT)

    def close(self) -> None:
        self.worker.close()
        self.store.close()
        self.broker.close()


class Later:
    """Actions that end faults, each at its own time and in a thread of its own."""

    def __init__(self) -> None:
        self._timers: list[threading.Timer] = []

    def do(self, seconds: float, what: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, what)
        self._timers.append(timer)
        timer.start()

    def wait(self) -> None:
        """Wait until all actions are done."""
        for timer in self._timers:
            timer.join()
        self._timers.clear()
