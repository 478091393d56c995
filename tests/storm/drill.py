"""The drill: a fleet works through a storm, and through the calm after it."""

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
from tests.storm import notes, weather
from tests.storm.checker import Log
from tests.storm.fleet import Berth, Later
from tests.storm.weather import Blow

INTERVAL = 1.0
LEASE_TTL = 2 * INTERVAL

POOLS = (
    ("-P", "prefork", "-c", "2"),
    ("-P", "threads", "-c", "2"),
    ("-P", "solo"),
    ("-P", "gevent", "-c", "2"),
)
#: Seconds of silence after which a message is not on its way any more: the Redis transport looks
#: every ten seconds for those that a worker left behind.
QUIET = 15.0


@dataclass(frozen=True)
class Storm:
    """What a storm is like.

    :param seconds: how long it lasts.
    :param rate: jobs a second, on average.
    :param slow: how many of a hundred bodies take about as long as a lease lives, or longer.
    :param calm: seconds that its jobs are given to be done in the calm after it.
    :param kinds: of blows.
    :param app: the module of the workers' app.
    :param environment: more for the workers.
    """

    seed: int
    seconds: float
    rate: float = 8.0
    slow: int = 5
    calm: float = 60.0
    kinds: Sequence[str] = (*weather.TO_A_WORKER, *weather.TO_A_SERVER)
    pools: Sequence[Sequence[str]] = POOLS
    app: str = "tests.storm.tasks"
    environment: Mapping[str, str] = field(default_factory=dict)


class Drill:
    """A storm on two servers.

    :param broker: its server, and ``broker_url`` its URL.
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
        self._berths: list[Berth] = []
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
        """Work through it, and return what was written down and what is in the database."""
        os.environ[notes.FILE] = str(self._notes)
        self._make_tables()
        with ExitStack() as stack:
            stack.callback(self._later.wait)
            for number, options in enumerate(self.storm.pools):
                self._berths.append(self._berth(number, list(options)))
                stack.callback(self._berths[-1].close)
            for berth in self._berths:
                berth.worker.wait_ready()
            with self._sending(self.storm.seconds, self.storm.rate, 0):
                self._blow()
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

    def _berth(self, number: int, options: list[str]) -> Berth:
        # Each has the temporary files, in which a worker finds its dead, to itself, like a
        # container: those of the others it knows by the clock alone.
        host = self._directory / f"host{number}"
        host.mkdir(exist_ok=True)
        return Berth(
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

    def _blow(self) -> None:
        start = time.monotonic()
        storm = self.storm
        for blow in weather.forecast(
            storm.seed, storm.seconds, len(self._berths), LEASE_TTL, storm.kinds
        ):
            while time.monotonic() < start + blow.at:
                self._keep()
                time.sleep(0.05)
            notes.note("blow", kind=blow.kind, target=blow.target, lasts=blow.lasts)
            self._strike(blow)

    def _keep(self) -> None:
        for berth in self._berths:
            berth.keep()

    def _strike(self, blow: Blow) -> None:
        berth = self._berths[blow.target]
        match blow.kind:
            case "kill child":
                berth.kill_child(self._chance)
            case "kill worker":
                berth.signal_all(signal.SIGKILL)
            case "stop worker":
                berth.signal_all(signal.SIGSTOP)
                self._later.do(blow.lasts, lambda: berth.signal_all(signal.SIGCONT))
            case "warm shutdown":
                berth.shut_down(signal.SIGTERM)
            case "cold shutdown":
                berth.shut_down(signal.SIGQUIT)
            case "store mute":
                berth.store.mode = "mute"
                self._later.do(blow.lasts, berth.mend_store)
            case "store answers lost":
                berth.store.mode = "drop answers"
                self._later.do(blow.lasts, berth.mend_store)
            case "store cut":
                berth.store.cut()
            case "broker cut":
                berth.broker.cut()
            case "restart store" | "restart broker":
                self._later.do(0, lambda: self._restart(self._servers[blow.kind], blow.lasts))
            case "stop backends":
                self._stop_backends(blow.lasts)
            case "read-only store":
                self._later.do(0, lambda: self._make_read_only(blow.lasts))
            case _:
                raise ValueError(blow.kind)

    def _restart(self, server: Any, seconds: float) -> None:
        with self._restarting:
            server.stop(signal.SIGKILL)
            time.sleep(seconds)
            server.start()

    def _stop_backends(self, seconds: float) -> None:
        """Half of the server's processes that serve the workers; a server of threads has none."""
        if not isinstance(self._store, Postgres):
            return
        # The server may be down at this moment, and have none either.
        with contextlib.suppress(psycopg.OperationalError):
            backends = self._store.backends()
            stopped = self._chance.sample(backends, (len(backends) + 1) // 2)
            _signal_each(stopped, signal.SIGSTOP)
            self._later.do(seconds, lambda: _signal_each(stopped, signal.SIGCONT))

    def _make_read_only(self, seconds: float) -> None:
        """As if all ways led to a standby for a while."""
        with self._restarting:
            self._store.make_read_only(True)
            time.sleep(seconds)
            self._store.make_read_only(False)

    # -- the calm

    def _clear(self) -> None:
        self._later.wait()
        for berth in self._berths:
            berth.clear()
        notes.note("calm")

    def _wait_for_jobs(self) -> None:
        """Until all jobs are done, or as long as they are given; the checker judges the rest."""
        end = time.monotonic() + self.storm.calm

        def over() -> bool:
            self._keep()
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
