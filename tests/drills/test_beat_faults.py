"""Three beats, and what can happen to the one that leads; each on a host of its own."""

from __future__ import annotations

import json
import logging
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

import pytest
import redis

from celery_singleton_state.entry_state import EntryState, decode_rows
from celery_singleton_state.store import SqlStore, open_store
from tests.drills.beat_ticks import complaints
from tests.processes.fleet import Beat, Fleet
from tests.servers import Proxy
from tests.waiting import wait_until

logger = logging.getLogger(__name__)

APP = "tests.processes.beat_app"
ENTRIES = 200
#: Seconds that the leaders have a bad time.
STORM = 120.0
SEED = 1


@dataclass
class Host:
    """A beat, and its ways to the store and to the broker."""

    number: int
    beat: Beat
    store: Proxy
    broker: Proxy


class Beats:
    """Beats on hosts of their own, a worker that is left alone, and one look at all of it."""

    def __init__(
        self, fleet: Fleet, store_url: str, broker_url: str, make_proxy: Callable[[int], Proxy]
    ) -> None:
        self.fleet = fleet
        self._store_url = store_url
        self._broker_url = broker_url
        self._make_proxy = make_proxy
        self.store: SqlStore = open_store(store_url, "kv_store", 5.0, auto_migrate=True)
        self.hosts: list[Host] = []

    def start(self, count: int) -> None:
        for number in range(count):
            store = self._make_proxy(_port(self._store_url))
            broker = self._make_proxy(_port(self._broker_url))
            self.hosts.append(Host(number, self._beat(number, store, broker), store, broker))
        self.leader()

    def restart(self, host: Host) -> None:
        """A new beat on a host whose beat is dead."""
        host.beat = self._beat(host.number, host.store, host.broker)

    def _beat(self, number: int, store: Proxy, broker: Proxy) -> Beat:
        return self.fleet.start_beat(
            APP,
            host=str(number),
            CELERY_SINGLETON_STORE_URL=_through(self._store_url, store),
            CELERY_BROKER_URL=_through(self._broker_url, broker),
        )

    def leader(self, other_than: Host | None = None) -> Host:
        """The host that leads, as soon as one does."""

        def found() -> Host | None:
            row = self.store.peek("singleton-beat:shop")
            if row is None or not row.held:
                return None
            pid = (row.holder or "").split(":")[1]
            leads = [host for host in self.hosts if str(host.beat.process.pid) == pid]
            return leads[0] if leads and leads[0] is not other_than else None

        return wait_until(found, "a beat leads")

    def states(self) -> dict[str, EntryState]:
        return decode_rows(self.store.entries.load("singleton-beat:shop:"))

    def executed(self) -> dict[str, list[datetime]]:
        found: dict[str, list[datetime]] = {}
        for note in self.fleet.notes("tick"):
            found.setdefault(note["entry"], []).append(datetime.fromisoformat(note["due"]))
        return found

    def wait_for_ticks(self, count: int) -> None:
        before = len(self.fleet.notes("tick"))
        self.fleet.wait_for_notes("tick", before + count)

    def stop(self) -> None:
        """Stop all beats in order, and wait until all that was sent has run."""
        for host in self.hosts:
            host.beat.stop()
        sent = {name: state.total_run_count for name, state in self.states().items()}

        def all_ran() -> bool:
            executed = self.executed()
            return all(len(set(executed.get(name, ()))) >= n for name, n in sent.items())

        wait_until(all_ran, "all that was sent has run", 60)
        with redis.Redis.from_url(self._broker_url) as broker:
            wait_until(lambda: not broker.llen("celery"), "the queue is empty")


@pytest.fixture
def make_beats(
    make_fleet: Callable[..., Fleet],
    broker_url: str,
    postgres_url: str,
    make_proxy: Callable[[int], Proxy],
) -> Iterator[Callable[..., Beats]]:
    made: list[Beats] = []

    def make(schedule: dict[str, dict[str, object]], **settings: object) -> Beats:
        fleet = make_fleet(postgres_url, TEST_SCHEDULE=json.dumps(schedule), **settings)
        made.append(Beats(fleet, postgres_url, broker_url, make_proxy))
        return made[-1]

    yield make
    for beats in made:
        beats.store.close()


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1].split("/")[0])


def _through(url: str, proxy: Proxy) -> str:
    return url.replace(f":{_port(url)}/", f":{proxy.port}/")


# -- what happens to a leader, until another one leads


@contextmanager
def killed(beats: Beats, host: Host) -> Iterator[None]:
    host.beat.close()
    yield
    beats.restart(host)
    host.beat.wait_stands_by()


@contextmanager
def stopped(_beats: Beats, host: Host) -> Iterator[None]:
    """Paused in the midst of whatever it does, and woken up when another one leads."""
    host.beat.process.send_signal(signal.SIGSTOP)
    before = len(host.beat.output)
    yield
    host.beat.process.send_signal(signal.SIGCONT)
    wait_until(lambda: "beat stands by" in host.beat.output[before:], "it stands by")
    after = host.beat.output[before:].split("beat stands by")[0]
    # That which it was about to send when it was stopped.
    assert after.count("Sending due task") <= 1, after


@contextmanager
def cut_off_from_the_store(_beats: Beats, host: Host) -> Iterator[None]:
    host.store.mode = "mute"
    yield
    _heal(host.store)


@contextmanager
def cut_off_from_the_broker(_beats: Beats, host: Host) -> Iterator[None]:
    host.broker.mode = "mute"
    yield
    _heal(host.broker)


@contextmanager
def refused_by_the_broker(_beats: Beats, host: Host) -> Iterator[None]:
    host.broker.mode = "refuse"
    host.broker.cut()
    yield
    _heal(host.broker)


def _heal(proxy: Proxy) -> None:
    """What was on its way is lost, as the connections are."""
    proxy.mode = "pass"
    proxy.cut()


FAULTS = (
    killed,
    stopped,
    cut_off_from_the_store,
    cut_off_from_the_broker,
    refused_by_the_broker,
)


def test_every_tick_is_run_once_whatever_happens_to_the_leader(
    make_beats: Callable[..., Beats],
) -> None:
    """200 entries due every 1 to 3 s, half of which make up for all that they missed, and half for
    the latest; for two minutes the leader has one fault after the other.
    """
    schedule: dict[str, dict[str, object]] = {
        f"e{number}": {
            "task": "ticked",
            "schedule": 1.0 + number % 3,
            "catch_up": "all" if number % 2 else "latest",
        }
        for number in range(ENTRIES)
    }
    beats = make_beats(schedule)
    beats.fleet.start("-P", "threads", "-c", "4", app=APP)
    beats.start(3)
    wait_until(lambda: len(beats.executed()) == ENTRIES, "each entry has run")
    chance = random.Random(SEED)
    faults: list[str] = []
    began = time.monotonic()
    while time.monotonic() - began < STORM:
        for fault in chance.sample(FAULTS, len(FAULTS)):
            host = beats.leader()
            struck = time.monotonic()
            with fault(beats, host):
                beats.leader(other_than=host)
                faults.append(f"{fault.__name__} {time.monotonic() - struck:.1f}")
                beats.wait_for_ticks(ENTRIES)
            if time.monotonic() - began >= STORM:
                break
    beats.leader()
    beats.wait_for_ticks(2 * ENTRIES)
    beats.stop()

    intervals = {
        name: timedelta(seconds=float(str(fields["schedule"]))) for name, fields in schedule.items()
    }
    executed, states = beats.executed(), beats.states()
    found = complaints(states, intervals, executed)
    assert not found, "\n".join(found)
    assert all(states[f"e{number}"].missed_count == 0 for number in range(1, ENTRIES, 2))
    said = "".join(text for _, text in beats.fleet.outputs())
    if any(state.missed_count for state in states.values()):
        assert "beat: ticks were missed, and are not sent" in said
    assert len(faults) >= 8, faults
    logger.warning(
        "%d ticks, %d second copies refused, %d missed; until another led, s: %s",
        sum(len(ticks) for ticks in executed.values()),
        said.count("was done before"),
        sum(state.missed_count for state in states.values()),
        ", ".join(faults),
    )
