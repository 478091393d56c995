"""Failovers of the Redis server that keeps the leases.

In one failover the replica has not received a lease: this breaks P1, but not P2. In the other
failover the old server is demoted and stays alive.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery

from celery_singleton_state import HeartbeatFailed
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.sentinel import Replica, Sentinel
from tests.helpers.servers import Proxy, Valkey, running
from tests.helpers.waiting import wait_until


@pytest.fixture
def master() -> Iterator[Valkey]:
    yield from running(Valkey)


@pytest.fixture
def link(master: Valkey, make_proxy: Callable[[int], Proxy]) -> Proxy:
    """A proxy between the master and its replica."""
    return make_proxy(master.port)


@pytest.fixture
def replica(link: Proxy) -> Iterator[Replica]:
    yield from running(lambda: Replica(link.port))


@pytest.fixture
def sentinel(master: Valkey, replica: Replica) -> Iterator[Sentinel]:
    yield from running(lambda: Sentinel(master))


def test_a_failover_that_loses_leases(
    make_fleet: Callable[..., Fleet],
    postgres_url: str,
    client: Callable[[], Celery],
    tmp_path: Path,
    master: Valkey,
    link: Proxy,
    replica: Replica,
    sentinel: Sentinel,
) -> None:
    """A's lease is acquired while the replica receives nothing. The master dies, and the replica
    takes its place, without A's lease. B acquires it. Now two bodies run, until A's next renewal is
    refused and A's body is interrupted. A singleton with a state, whose lease was acquired at the
    same time, runs through all of this alone, and saves.

    A's next renewal is far away, because B must begin before A's renewal, but B's first attempt may
    find no master yet.
    """
    fleet = make_fleet(
        postgres_url,
        CELERY_SINGLETON_LEASE_URL=sentinel.url,
        CELERY_SINGLETON_HEARTBEAT_INTERVAL="12",
        CELERY_SINGLETON_HEARTBEAT_THRESHOLD="3",
    )
    app, go = client(), tmp_path / "go"
    fleet.start("-c", "4")
    link.mode = "mute"
    first = app.send_task("held", (str(go),))
    stateful = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter", 2)
    master.stop(signal.SIGKILL)
    wait_until(lambda: sentinel.master_port() == replica.port, "the replica is the master")
    with redis.Redis(port=replica.port) as server:
        assert not server.exists("singleton-state:held")

    second = app.send_task("held", (str(go),))
    fleet.wait_for_notes("enter", 3)
    error = outcome(first)
    assert isinstance(error, HeartbeatFailed)
    assert "its renewal was refused" in error.detail
    entered = [note for note in fleet.notes("enter") if note["task"] == "held"]
    left = [note for note in fleet.notes("leave") if note["task"] == "held"]
    assert len(entered) == 2
    assert len(left) == 1
    assert entered[1]["at"] < left[0]["at"], "the two bodies must overlap for a while"
    assert outcome(app.send_task("increment")) is None, (
        "the singleton with a state always has one run"
    )
    go.touch()
    assert outcome(second) == "held"
    assert outcome(stateful) == 1


def test_a_demotion_costs_no_run_its_lease(
    make_fleet: Callable[..., Fleet],
    postgres_url: str,
    client: Callable[[], Celery],
    make_proxy: Callable[[int], Proxy],
    tmp_path: Path,
    master: Valkey,
    replica: Replica,
) -> None:
    """Eight runs hold leases, and each thread of the worker has a connection to the primary. The
    primary becomes a replica, stays alive and closes no connection. Then its host name leads to the
    new primary.

    All leases are renewed at the new primary, all runs succeed, and the next runs begin in each
    thread.
    """
    name = make_proxy(master.port)
    fleet = make_fleet(postgres_url, CELERY_SINGLETON_LEASE_URL=f"redis://127.0.0.1:{name.port}/0")
    app, go = client(), tmp_path / "go"
    worker = fleet.start("--pool", "threads", "-c", "8")
    with (
        redis.Redis(port=master.port, decode_responses=True) as old,
        redis.Redis(port=replica.port, decode_responses=True) as new,
    ):
        # Pause the server until each thread waits for an answer, so that each thread makes a
        # connection.
        old.client_pause(60_000, all=False)
        runs = [app.send_task("sent_once", (number, str(go))) for number in range(8)]
        wait_until(lambda: old.info("clients")["blocked_clients"] >= 8, "all acquire at once")
        old.client_unpause()
        fleet.wait_for_notes("enter", 8)
        keys = list(old.scan_iter("singleton-state:*"))
        assert len(keys) == 8
        wait_until(lambda: new.exists(*keys) == 8, "the replica has all leases")
        new.replicaof("NO", "ONE")
        name.target = replica.port
        old.replicaof("127.0.0.1", replica.port)
        before = {key: new.hget(key, "expires_at") for key in keys}
        wait_until(
            lambda: all(new.hget(key, "expires_at") != before[key] for key in keys),
            "all leases are renewed at the new primary",
        )
    go.touch()
    assert [outcome(run) for run in runs] == list(range(8))
    runs = [app.send_task("sent_once", (number,)) for number in range(64)]
    assert [outcome(run) for run in runs] == list(range(64))
    assert worker.output.count("read only replica") <= 1, (
        "only one call of the heartbeat may be refused"
    )
