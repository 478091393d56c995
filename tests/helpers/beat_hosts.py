"""Beats that each run on a host of their own, and learn of one another only through the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import redis

from celery_singleton_state.beat.entry_state import EntryState, decode_rows
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.beat_ticks import complaints
from tests.helpers.fleet import Beat, Fleet
from tests.helpers.servers import Proxy
from tests.helpers.waiting import wait_until

APP = "tests.apps.beat_app"
LEADER = "singleton-beat:shop"
Schedule = dict[str, dict[str, object]]


@dataclass
class Host:
    """A host: a beat, its proxies to store and broker, and its extra environment variables."""

    number: int
    store: Proxy
    broker: Proxy
    environment: dict[str, str]
    beat: Beat


class Hosts:
    """Several hosts whose beats send one schedule; and what the store and the workers' notes say
    about the ticks.
    """

    def __init__(
        self,
        fleet: Fleet,
        schedule: Schedule,
        store_url: str,
        broker_url: str,
        make_proxy: Callable[[int], Proxy],
    ) -> None:
        self.fleet = fleet
        self._schedule = schedule
        self._store_url = store_url
        self._broker_url = broker_url
        self._make_proxy = make_proxy
        self.store: SqlStore = open_store(store_url, "kv_store", 5.0, auto_migrate=True)
        self.hosts: list[Host] = []

    def close(self) -> None:
        self.store.close()

    def start(self, **environment: str) -> Host:
        """Start a beat on a new host."""
        number = len(self.hosts)
        store = self._make_proxy(_port(self._store_url))
        broker = self._make_proxy(_port(self._broker_url))
        beat = self._beat(number, store, broker, environment)
        self.hosts.append(Host(number, store, broker, environment, beat))
        return self.hosts[-1]

    def restart(self, host: Host) -> None:
        """Start a new beat on a host whose beat is dead."""
        host.beat = self._beat(host.number, host.store, host.broker, host.environment)

    def _beat(self, number: int, store: Proxy, broker: Proxy, environment: dict[str, str]) -> Beat:
        return self.fleet.start_beat(
            APP,
            host=str(number),
            CELERY_SINGLETON_STORE_URL=_through(self._store_url, store),
            CELERY_BROKER_URL=_through(self._broker_url, broker),
            **environment,
        )

    def leader(self, other_than: Host | None = None) -> Host:
        """Wait until a host's beat leads, and return the host.

        :param other_than: a host that must not be returned, even if its beat leads.
        """

        def found() -> Host | None:
            row = self.store.peek(LEADER)
            if row is None or not row.held:
                return None
            holder = row.holder or ""
            leads = [host for host in self.hosts if f":{host.beat.process.pid}:" in holder]
            return leads[0] if leads and leads[0] is not other_than else None

        return wait_until(found, "a beat leads")

    def states(self) -> dict[str, EntryState]:
        return decode_rows(self.store.entries.load(f"{LEADER}:"))

    def executed(self) -> dict[str, list[datetime]]:
        """Return a dict that maps each entry to the due times of its ticks that have run."""
        found: dict[str, list[datetime]] = {}
        for note in self.fleet.notes("tick"):
            found.setdefault(note["entry"], []).append(datetime.fromisoformat(note["due"]))
        return found

    def wait_for_ticks(self, more: int) -> None:
        self.fleet.wait_for_notes("tick", len(self.fleet.notes("tick")) + more)

    def sent(self) -> int:
        """Return how many ticks the store's records say were sent."""
        return sum(state.total_run_count for state in self.states().values())

    def wait_for_sent(self, more: int) -> None:
        before = self.sent()
        wait_until(lambda: self.sent() >= before + more, f"{more} more ticks are sent")

    def wait_until_caught_up(self) -> None:
        """Wait until the leader is not behind: it has sent all due ticks, also those that a former
        leader sent and could not record.
        """

        def caught_up() -> bool:
            row = self.store.peek(LEADER)
            if row is None or not row.held:
                return False
            late = row.read_at - 2.0
            ticks = [state.next_tick for state in self.states().values()]
            return all(tick is not None and tick.timestamp() > late for tick in ticks)

        wait_until(caught_up, "the leader is not behind", 90)

    def stop(self) -> None:
        """Stop all beats cleanly, and wait until every tick that they sent has run."""
        for host in self.hosts:
            if host.beat.process.poll() is None:
                host.beat.stop()
        sent = {name: state.total_run_count for name, state in self.states().items()}

        def all_ran() -> bool:
            executed = self.executed()
            return all(len(set(executed.get(name, ()))) >= n for name, n in sent.items())

        wait_until(all_ran, "every tick that was sent has run", 60)
        with redis.Redis.from_url(self._broker_url) as broker:
            wait_until(lambda: not broker.llen("celery"), "the queue is empty")

    def complaints(self) -> list[str]:
        """Return a line for each fault of the ticks that have run. Call this function after
        ``stop``.
        """
        intervals = {
            name: timedelta(seconds=float(str(fields["schedule"])))
            for name, fields in self._schedule.items()
        }
        return complaints(self.states(), intervals, self.executed())


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1].split("/")[0])


def _through(url: str, proxy: Proxy) -> str:
    return url.replace(f":{_port(url)}/", f":{proxy.port}/")
