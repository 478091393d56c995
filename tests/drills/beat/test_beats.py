"""Beats survive crashes between sending and recording, wrong clocks, lost leases and restarted
servers.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.helpers.beat_hosts import APP, LEADER, Host, Hosts, Schedule
from tests.helpers.fleet import Beat, Fleet
from tests.helpers.servers import Postgres, Proxy, Valkey
from tests.helpers.waiting import wait_until

#: A setting of the heartbeat interval that gives the beat's lease a life of 2 s.
SHORT = {"CELERY_SINGLETON_HEARTBEAT_INTERVAL": "1"}
HOUR = timedelta(hours=1)


def often(task: str = "ticked", entries: int = 5, catch_up: str = "all") -> Schedule:
    return {
        f"e{number}": {"task": task, "schedule": 0.5, "catch_up": catch_up}
        for number in range(entries)
    }


@pytest.mark.parametrize(("task", "runs"), [("ticked", 1), ("plain", 2)])
def test_a_crash_between_sending_and_recording(
    make_hosts: Callable[..., Hosts], task: str, runs: int
) -> None:
    """The leader has sent a tick and dies before it records the tick. The next leader sends the
    tick again, with the same id. A singleton refuses the second copy; a plain task runs it twice.
    """
    hosts = make_hosts(often(task), **SHORT)
    hosts.fleet.start("-P", "solo", app=APP)
    first = hosts.start(TEST_CRASH="e1")
    assert first.beat.process.wait(timeout=30) == -signal.SIGKILL
    hosts.start().beat.wait_leads()
    hosts.wait_for_ticks(10)
    hosts.stop()
    notes = [note for note in hosts.fleet.notes("tick") if note["entry"] == "e1"]
    dues = [datetime.fromisoformat(note["due"]) for note in notes]
    assert dues.count(min(dues)) == runs
    assert len({note["id"] for note in notes if note["due"] == notes[0]["due"]}) == 1
    if task == "ticked":
        assert hosts.complaints() == []


@pytest.fixture
def faketime() -> Iterator[str]:
    """The path of libfaketime, with which a process reads a wrong time from the clock."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        assert os.environ.get("SINGLETON_TEST_FAKETIME") != "required", "no libfaketime"
        pytest.skip("no libfaketime")
    yield str(found[0])
    # Remove the shared memory that killed processes left behind.
    for left in Path("/dev/shm").glob("*faketime_s*_*"):
        if not Path("/proc", left.name.rpartition("_")[2]).exists():
            left.unlink()


def test_a_wrong_clock_does_no_harm(make_hosts: Callable[..., Hosts], faketime: str) -> None:
    """One host's clock is an hour ahead, another host's is an hour behind, and a third host's is
    right. Each host leads in its turn. A tick is due by the store's clock, so all hosts send the
    same ticks at the same times.
    """
    began = datetime.now(UTC)
    hosts = make_hosts(often(), **SHORT)
    hosts.fleet.start("-P", "solo", app=APP)
    off = {"LD_PRELOAD": faketime}
    turns = (off | {"FAKETIME": "+3600s"}, off | {"FAKETIME": "-3600s"}, {})
    for how, environment in zip(("kill", "stop", "stop"), turns, strict=True):
        host = hosts.start(**environment)
        host.beat.wait_leads()
        wrong = logged_at(host) - datetime.now(UTC)
        expected = {"+3600s": HOUR, "-3600s": -HOUR}.get(environment.get("FAKETIME", ""))
        assert abs(wrong - (expected or timedelta(0))) < HOUR / 2
        hosts.wait_for_ticks(20)
        if how == "kill":
            host.beat.close()
        else:
            host.beat.stop()
    hosts.stop()
    assert hosts.complaints() == []
    dues = [due for ticks in hosts.executed().values() for due in ticks]
    assert began - timedelta(seconds=1) < min(dues)
    assert max(dues) < datetime.now(UTC)


def logged_at(host: Host) -> datetime:
    """Return the time that the host's clock showed when its beat logged that it leads."""
    (line,) = (line for line in host.beat.output.splitlines() if "beat leads" in line)
    return datetime.strptime(line[1:20], "%Y-%m-%d %H:%M:%S").astimezone(UTC)


@pytest.mark.parametrize("issue", ["redbeat 230", "redbeat 306"])
def test_a_beat_that_loses_its_lease_stands_by(
    make_hosts: Callable[..., Hosts], issue: str
) -> None:
    """Another holder suddenly has the leader's lease. In such a case RedBeat's beat exits, or is
    never elected again. Our beat stands by, and leads again when the lease is free.
    """
    hosts = make_hosts(often(), **SHORT)
    hosts.fleet.start("-P", "solo", app=APP)
    host = hosts.start()
    hosts.wait_for_ticks(5)
    execute(
        hosts,
        f"UPDATE kv_store SET holder = 'another', fence = fence + 1,"
        f" expires_at = clock_timestamp() + interval '2 seconds' WHERE key = '{LEADER}'",
    )
    wait_until(lambda: "lost the lead" in host.beat.output, "the beat has lost the lead")
    assert hosts.leader() is host
    hosts.wait_for_ticks(10)
    hosts.stop()
    assert hosts.complaints() == []


def test_redbeat_163_an_emptied_store_repeats_no_tick(
    make_hosts: Callable[..., Hosts],
) -> None:
    """The table is emptied while the leader runs, as by a failover to an empty server. In such a
    case RedBeat's leader exits, and its stand-by leads an empty schedule.

    Our schedule comes from the app, and its intervals are aligned as before. No tick runs twice,
    although all records of the first ticks are lost.
    """
    hosts = make_hosts(often(), **SHORT)
    hosts.fleet.start("-P", "solo", app=APP)
    host = hosts.start()
    hosts.wait_for_ticks(5)
    hosts.start().beat.wait_stands_by()
    execute(hosts, "DELETE FROM kv_store")
    wait_until(lambda: "lost the lead" in host.beat.output, "the beat has lost the lead")
    hosts.leader()
    hosts.wait_for_ticks(20)
    hosts.stop()
    for ticks in hosts.executed().values():
        assert len(ticks) == len(set(ticks))
        assert {(tick - ticks[0]) % timedelta(seconds=0.5) for tick in ticks} == {timedelta(0)}


def test_redbeat_92_a_dead_leader_is_succeeded_in_seconds(
    make_hosts: Callable[..., Hosts],
) -> None:
    """The leader is killed, and the other beat leads, with default settings. The benchmark
    ``takeover`` measures how many seconds this takes.
    """
    hosts = make_hosts(often())
    hosts.fleet.start("-P", "solo", app=APP)
    first = hosts.start()
    hosts.wait_for_ticks(5)
    hosts.start().beat.wait_stands_by()
    first.beat.close()
    assert hosts.leader(other_than=first)
    hosts.wait_for_ticks(20)
    hosts.stop()
    assert hosts.complaints() == []


def execute(hosts: Hosts, statement: str) -> None:
    with hosts.store.engine.connect() as connection:
        connection.execute(sa.text(statement))


def test_servers_are_killed_under_all_beats(
    make_fleet: Callable[..., Fleet],
    make_proxy: Callable[[int], Proxy],
    own_postgres: Postgres,
    own_valkey: Valkey,
) -> None:
    """The store is killed, then the broker, and each is started again while the beats run. The
    workers start only after that, so that the test does not count messages which kombu's Redis
    transport loses when its server dies.
    """
    # Catch up on the latest tick only: with "all", the next tick of an entry would wait until a
    # worker has ended the previous tick.
    schedule = often(catch_up="latest")
    fleet = make_fleet(
        own_postgres.create_database("shop"), TEST_SCHEDULE=json.dumps(schedule), **SHORT
    )
    fleet.environment["CELERY_BROKER_URL"] = fleet.environment["CELERY_RESULT_BACKEND"] = (
        own_valkey.url
    )
    store_url = own_postgres.url("shop")
    with closing(Hosts(fleet, schedule, store_url, own_valkey.url, make_proxy)) as hosts:
        kill_both(hosts, own_postgres, own_valkey)


def kill_both(hosts: Hosts, own_postgres: Postgres, own_valkey: Valkey) -> None:
    beats = [hosts.start().beat for _ in range(2)]
    hosts.leader()
    hosts.wait_for_sent(10)
    own_postgres.stop(signal.SIGKILL)
    for beat in beats:
        beat.wait_for("beat waits for the store")
    own_postgres.start()
    hosts.store.engine.dispose()
    hosts.wait_for_sent(10)
    own_valkey.stop(signal.SIGKILL)
    wait_until(
        lambda: any("beat waits for the broker" in beat.output for beat in beats),
        "the broker is missed",
    )
    own_valkey.start()
    hosts.wait_for_sent(20)
    assert [beat.process.poll() for beat in beats] == [None, None]
    hosts.fleet.start("-P", "solo", app=APP)
    hosts.stop()
    assert hosts.complaints() == []


@pytest.mark.fleet(store="postgresql", app=APP)
def test_stopping_a_beat_while_it_sends_loses_no_tick(make_fleet: Callable[..., Fleet]) -> None:
    """300 entries are due at once, each second. The leader is stopped while it sends. At most one
    tick is sent twice.
    """
    schedule = {
        f"e{number}": {"task": "plain", "schedule": 1.0, "catch_up": "all"} for number in range(300)
    }
    fleet = make_fleet(TEST_SCHEDULE=json.dumps(schedule))
    one = fleet.start_beat()
    one.wait_leads()
    other = fleet.start_beat()
    other.wait_stands_by()
    wait_until(lambda: senders_of_any(one) > 400, "it sends")
    os.kill(one.process.pid, signal.SIGTERM)
    one.process.wait(timeout=30)
    other.wait_leads()
    wait_until(lambda: senders_of_any(other) > 700, "the other one sends")
    other.stop()
    fleet.start("-P", "threads", "-c", "2")
    sent = senders_of_any(one) + senders_of_any(other)
    # Each beat may have been stopped after it logged a tick and before it sent the tick.
    notes = fleet.wait_for_notes("tick", sent - 2)
    ticks: dict[str, list[datetime]] = {}
    for note in notes:
        ticks.setdefault(note["entry"], []).append(datetime.fromisoformat(note["due"]))
    doubled = len(notes) - len({note["id"] for note in notes})
    # If a tick's message was in flight when the signal came, the tick may be sent again.
    assert doubled <= 1
    for dues in ticks.values():
        steps = {later - earlier for earlier, later in pairwise(sorted(set(dues)))}
        assert steps == {timedelta(seconds=1)}


def senders_of_any(beat: Beat) -> int:
    return beat.output.count("Sending due task")
