"""Run a storm: a fleet works while faults happen, and then in a calm without faults."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from celery_singleton_state.migrations.open_store import open_store
from tests.helpers.fleet import ROOT
from tests.helpers.mariadb import MariaDB
from tests.helpers.servers import Postgres, Server
from tests.helpers.waiting import wait_until
from tests.storm import fault_plan, notes
from tests.storm.checker import Log
from tests.storm.fault_plan import Fault
from tests.storm.fleet import Later, Slot

INTERVAL = 1.0
LEASE_TTL = 2 * INTERVAL

POOLS = (
    ("-P", "prefork", "-c", "2"),
    ("-P", "threads", "-c", "2"),
    ("-P", "solo"),
    ("-P", "gevent", "-c", "2"),
)
#: After how many seconds without a note a message counts as lost. It is more than ten seconds,
#: because only every ten seconds the Redis transport checks for messages that a dead worker left
#: unacknowledged.
QUIET = 15.0


@dataclass(frozen=True)
class Storm:
    """The settings of a storm.

    :param seconds: how long the faults go on.
    :param rate: jobs a second, on average.
    :param slow: how many of a hundred bodies take about as long as a lease's life, or longer.
    :param calm: seconds after the faults within which all jobs must end.
    :param kinds: the kinds of faults that happen.
    :param pools: the command-line options of each worker.
    :param app: the module of the workers' app.
    :param environment: additional environment variables of the workers.
    """

    seed: int
    seconds: float
    rate: float = 8.0
    slow: int = 5
    calm: float = 60.0
    kinds: Sequence[str] = (*fault_plan.TO_A_WORKER, *fault_plan.TO_A_SERVER)
    pools: Sequence[Sequence[str]] = POOLS
    app: str = "tests.storm.tasks"
    environment: Mapping[str, str] = field(default_factory=dict)


class Drill:
    """One run of a storm, on two servers.

    :param broker: the broker's server; ``broker_url`` is its URL.
    :param database: the URL of an empty database on ``store``.
    """

    def __init__(
        self,
        storm: Storm,
        directory: Path,
        store: Postgres | MariaDB,
        database: str,
        broker: Server,
        broker_url: str,
    ) -> None:
        self.storm = storm
        self._store = store
        self._servers = {"restart store": store, "restart broker": broker}
        self._database, self._broker_url = database, broker_url
        self._notes = directory / "notes"
        self._directory = directory
        self._chance = random.Random(storm.seed)
        self._later = Later()
        self._restarting = threading.Lock()
        self._slots: list[Slot] = []
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CELERY_")
        } | {
            "PYTHONPATH": str(ROOT),
            "C_FORCE_ROOT": "1",
            notes.FILE: str(self._notes),
            "CELERY_SINGLETON_HEARTBEAT_INTERVAL": str(INTERVAL),
            "CELERY_SINGLETON_HISTORY": "200",
            **storm.environment,
        }

    def run(self) -> Log:
        """Run the storm and the calm; return the notes and the database's contents."""
        os.environ[notes.FILE] = str(self._notes)
        self._make_tables()
        with ExitStack() as stack:
            stack.callback(self._later.wait)
            for number, options in enumerate(self.storm.pools):
                self._slots.append(self._slot(number, list(options)))
                stack.callback(self._slots[-1].close)
            for slot in self._slots:
                slot.worker.wait_ready()
            with self._sending(self.storm.seconds, self.storm.rate, 0):
                self._cause_faults()
            self._clear()
            self._wait_for_jobs()
            with self._sending(0, 1, 100_000):
                pass
            self._wait_for_jobs()
            return self._log()

    # -- before

    def _make_tables(self) -> None:
        store = open_store(
            self._database, "kv_store", io_timeout=5.0, pool_size=1, auto_migrate=True
        )
        store.check()
        store.close()
        with self._connection() as connection:
            connection.exec_driver_sql(
                "CREATE TABLE effects (singleton text, event int, job text, fence bigint)"
            )

    def _slot(self, number: int, options: list[str]) -> Slot:
        # Give each worker a temporary directory of its own, as in a container. A worker finds dead
        # workers by the files in this directory, so here it must wait until the leases of dead
        # workers expire.
        host = self._directory / f"host{number}"
        host.mkdir(exist_ok=True)
        return Slot(
            f"w{number}",
            options,
            self._environment | {"TMPDIR": str(host)},
            self._database,
            self._broker_url,
            self._directory,
            self.storm.app,
        )

    @contextmanager
    def _sending(self, seconds: float, rate: float, first: int) -> Iterator[None]:
        storm = self.storm
        arguments = (storm.app, storm.seed, seconds, rate, storm.slow, first)
        sender = subprocess.Popen(
            [sys.executable, "-m", "tests.storm.sender", *map(str, arguments)],
            env=self._environment
            | {
                "CELERY_BROKER_URL": self._broker_url,
                "CELERY_SINGLETON_STORE_URL": self._database,
                "STORM_FAULT": "",
            },
            cwd=self._directory,
        )
        try:
            yield
            assert sender.wait(timeout=60) == 0
        finally:
            sender.kill()
            sender.wait()

    # -- the storm

    def _cause_faults(self) -> None:
        start = time.monotonic()
        storm = self.storm
        for fault in fault_plan.plan(
            storm.seed, storm.seconds, len(self._slots), LEASE_TTL, storm.kinds
        ):
            while time.monotonic() < start + fault.at:
                self._restart_ended()
                time.sleep(0.05)
            notes.note("fault", kind=fault.kind, target=fault.target, lasts=fault.lasts)
            self._cause(fault)

    def _restart_ended(self) -> None:
        for slot in self._slots:
            slot.restart_if_ended()

    def _cause(self, fault: Fault) -> None:
        slot = self._slots[fault.target]
        match fault.kind:
            case "kill child":
                slot.kill_child(self._chance)
            case "kill worker":
                slot.signal_all(signal.SIGKILL)
            case "stop worker":
                slot.signal_all(signal.SIGSTOP)
                self._later.do(fault.lasts, lambda: slot.signal_all(signal.SIGCONT))
            case "warm shutdown":
                slot.shut_down(signal.SIGTERM)
            case "cold shutdown":
                slot.shut_down(signal.SIGQUIT)
            case "store mute":
                slot.store.mode = "mute"
                self._later.do(fault.lasts, slot.mend_store)
            case "store answers lost":
                slot.store.mode = "drop answers"
                self._later.do(fault.lasts, slot.mend_store)
            case "store cut":
                slot.store.cut()
            case "broker cut":
                slot.broker.cut()
            case "restart store" | "restart broker":
                self._later.do(0, lambda: self._restart(self._servers[fault.kind], fault.lasts))
            case "stop backends":
                self._stop_backends(fault.lasts)
            case "read-only store":
                self._later.do(0, lambda: self._make_read_only(fault.lasts))
            case _:
                raise ValueError(fault.kind)

    def _restart(self, server: Any, seconds: float) -> None:
        with self._restarting:
            server.stop(signal.SIGKILL)
            time.sleep(seconds)
            server.start()

    def _stop_backends(self, seconds: float) -> None:
        """Stop half of the processes in which PostgreSQL serves the workers. MariaDB serves them in
        threads, so do nothing there.
        """
        if not isinstance(self._store, Postgres):
            return
        # The server may be down now. Then it has no such processes.
        with contextlib.suppress(psycopg.OperationalError):
            backends = self._store.backends()
            stopped = self._chance.sample(backends, (len(backends) + 1) // 2)
            _signal_each(stopped, signal.SIGSTOP)
            self._later.do(seconds, lambda: _signal_each(stopped, signal.SIGCONT))

    def _make_read_only(self, seconds: float) -> None:
        """Make the store read-only for a while, as if all connections led to a standby."""
        with self._restarting:
            self._store.make_read_only(True)
            time.sleep(seconds)
            self._store.make_read_only(False)

    # -- the calm

    def _clear(self) -> None:
        self._later.wait()
        for slot in self._slots:
            slot.clear()
        notes.note("calm")

    def _wait_for_jobs(self) -> None:
        """Wait until all jobs have ended, or the calm is over. The checker finds the jobs that have
        not ended.
        """
        end = time.monotonic() + self.storm.calm

        def over() -> bool:
            self._restart_ended()
            log = self._log()
            if log.open_jobs - log.lost_by_broker:
                return time.monotonic() > end
            return not log.lost_by_broker or log.quiet_since < time.monotonic() - QUIET

        wait_until(over, "the calm is over", deadline=2 * self.storm.calm + QUIET)

    def _log(self) -> Log:
        with self._connection() as connection:
            read = connection.exec_driver_sql
            states = read("SELECT value FROM kv_store WHERE value <> 'null'").all()
            effects = read("SELECT singleton, event, job, fence FROM effects").all()
            return Log.read(self._notes, states, effects)

    @contextmanager
    def _connection(self) -> Iterator[sa.Connection]:
        engine = sa.create_engine(self._database)
        with engine.begin() as connection:
            yield connection
        engine.dispose()


def _signal_each(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
