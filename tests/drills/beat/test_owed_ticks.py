"""Beats that owe many ticks after a pause, with real brokers and workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from celery_singleton_state.beat.entry import ON_TIME
from celery_singleton_state.beat.entry_state import EntryState, decode_rows
from celery_singleton_state.keys import row_key
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import Ended
from tests.helpers.beat_hosts import APP, LEADER, Hosts
from tests.helpers.fleet import Fleet
from tests.helpers.waiting import wait_until

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
#: An hour of the day that is half a day from now, so that no daily tick becomes due during the
#: tests.
FAR_HOUR = (datetime.now(UTC).hour + 12) % 24
#: A daily entry whose owed ticks are all sent, however long no beat has run, and however late they
#: are.
CLOSE_DAY = {
    "task": "close_day",
    "schedule": ["5", str(FAR_HOUR)],
    "catch_up": "all",
    "skip_if_older_than": None,
    "args": [],
}
EVERY_MINUTE = CLOSE_DAY | {"schedule": 60.0}


def owe(hosts: Hosts, name: str, count: int, every: timedelta) -> list[datetime]:
    """Let an entry fall behind: run a beat until it has stored its rows, then change the entry's
    row so that the next leader owes ``count`` ticks.

    :returns: these ticks.
    """
    host = hosts.start()
    host.beat.wait_leads()
    wait_until(lambda: name in hosts.states(), "the entry has a row")
    host.beat.stop()
    state = hosts.states()[name]
    assert state.next_tick is not None
    owed = [state.next_tick - number * every for number in range(count, 0, -1)]
    value = msgspec.json.encode(msgspec.structs.replace(state, next_tick=owed[0])).decode()
    leader = hosts.store.acquire(LEADER, "by hand", 60, None)
    assert leader is not None
    key = row_key(f"{LEADER}:", name)
    assert hosts.store.entries.record(leader.lease, {key: value}, 1, leader.write)
    hosts.store.give_back(LEADER, "by hand")
    assert decode_rows({key: value})[name].next_tick == owed[0]
    return owed


def closed(hosts: Hosts, name: str) -> list[datetime]:
    return hosts.executed().get(name, [])


@pytest.mark.parametrize("task", ["close_day", "close_day_waiting"])
def test_each_owed_day_is_closed(make_hosts: Callable[..., Hosts], task: str) -> None:
    """The example of docs/beat.md, with default settings and four runs at the same time."""
    hosts = make_hosts({"close-day": CLOSE_DAY | {"task": task}})
    hosts.fleet.start("-P", "threads", "-c", "4", app=APP)
    owed = owe(hosts, "close-day", 4, DAY)
    hosts.start()
    wait_until(lambda: len(closed(hosts, "close-day")) >= 4, "all days are closed")
    hosts.stop()
    assert closed(hosts, "close-day") == owed
    answer = hosts.fleet.command("singleton", "show", task, "--json", app=APP)
    assert answer.returncode == 0, answer.stderr
    shown = json.loads(answer.stdout)
    (done,) = shown["ticks_done"]["shop:close-day"]["done"]
    assert done["until"] == owed[-1].isoformat()
    assert hosts.states()["close-day"].missed_count == 0


def test_300_owed_ticks_run_in_order_with_on_conflict_wait(
    make_hosts: Callable[..., Hosts],
) -> None:
    """All 300 owed ticks run in order, although the row's history holds only 16 runs. The leader is
    killed twice.
    """
    hosts = make_hosts(
        {"all": EVERY_MINUTE | {"task": "close_day_waiting"}}, CELERY_SINGLETON_HEARTBEAT_INTERVAL=1
    )
    hosts.fleet.start("-P", "threads", "-c", "4", app=APP)
    owed = owe(hosts, "all", 300, MINUTE)
    for count in (80, 160):
        host = hosts.start()
        wait_until(lambda: len(closed(hosts, "all")) >= count, "some ticks are closed", 60)  # noqa: B023
        host.beat.close()
    hosts.start()
    wait_until(lambda: len(closed(hosts, "all")) >= 300, "all ticks are closed", 60)
    hosts.stop()
    assert closed(hosts, "all")[:300] == owed


def test_a_beat_that_owes_1000_ticks_of_one_entry_and_has_1000_others(
    make_hosts: Callable[..., Hosts],
) -> None:
    """All owed ticks of the one entry run in order, and no other entry is late by more than its
    interval.
    """
    every = timedelta(seconds=20)
    others: dict[str, Any] = {
        f"o{number}": {"task": "plain", "schedule": every.total_seconds()} for number in range(1000)
    }
    hosts = make_hosts({"all": EVERY_MINUTE, **others})
    for _ in range(2):
        hosts.fleet.start("-P", "threads", "-c", "4", app=APP)
    owed = owe(hosts, "all", 1000, MINUTE)
    began = datetime.now(UTC)
    hosts.start()
    wait_until(lambda: len(closed(hosts, "all")) >= 1000, "all ticks are closed", 120)
    wait_until(lambda: datetime.now(UTC) > began + every, "all others were due", 60)
    wait_until(lambda: len(hosts.executed()) == 1001, "all others have run", 60)
    hosts.stop()
    assert closed(hosts, "all")[:1000] == owed
    notes = [note for note in hosts.fleet.notes("tick") if note["entry"] != "all"]
    assert len({note["entry"] for note in notes}) == 1000
    assert max(note["late"] for note in notes) < every.total_seconds()
    assert not [state for state in hosts.states().values() if state.missed_count]


def test_20000_owed_ticks_of_a_task_that_is_no_singleton(make_hosts: Callable[..., Hosts]) -> None:
    """The ticks of another entry are sent in time, as if no tick were owed, and none of them is
    dropped as too old.
    """
    every = timedelta(seconds=3)
    other = {"task": "plain", "schedule": every.total_seconds()}
    backlog = EVERY_MINUTE | {"task": "plain", "args": ["all"]}
    hosts = make_hosts({"all": backlog, "other": other})
    owe(hosts, "all", 20_000, MINUTE)
    before = hosts.states()["other"].total_run_count
    seen: list[EntryState] = []
    host = hosts.start()

    def all_sent() -> bool:
        states = hosts.states()
        # The first tick after the pause catches up and is late; later ticks must not be late.
        if states["other"].total_run_count > before + 1:
            seen.append(states["other"])
        return states["all"].total_run_count >= 20_000 and len(seen) > 0

    wait_until(all_sent, "all ticks are sent", 120)
    host.beat.stop()
    assert {state.missed_count for state in seen} == {seen[0].missed_count}
    assert all(late(state) < every for state in seen)


def late(state: EntryState) -> timedelta:
    """Return how late the newest tick of an entry was when it was sent."""
    assert state.last_run_at
    assert state.last_tick
    return state.last_run_at - state.last_tick


MINUTES = {
    "latest": {"catch_up": "latest"},
    "all": {"catch_up": "all"},
    "all of them": {"catch_up": "all", "skip_if_older_than": None},
    "none": {"catch_up": "none"},
    "ten minutes": {"catch_up": "all", "skip_if_older_than": 600},
    "last run": {"next_from": "last_run", "skip_if_older_than": None},
}


@pytest.mark.fleet(app=APP)
def test_after_a_pause_of_an_hour_each_entry_follows_its_rules(
    make_fleet: Callable[..., Fleet], fleet_store: str
) -> None:
    """The stored schedule is made an hour older, as if no beat had run for an hour.

    Then a beat leads. It sends the ticks that each entry's rules ask for, in order.
    """
    schedule = {
        name: {"task": "plain", "schedule": 60.0, **rules} for name, rules in MINUTES.items()
    }
    fleet = make_fleet(TEST_SCHEDULE=json.dumps(schedule))
    before = fleet.start_beat()
    before.wait_for("6 entries, 6 of them new")
    before.stop()
    first = move_back(fleet_store, timedelta(hours=1))
    after = fleet.start_beat()
    after.wait_for("beat leads")
    fleet.start("-P", "solo")
    began = led_since(fleet_store)
    sent: dict[str, list[datetime]] = {}

    def read() -> bool:
        sent.clear()
        for note in fleet.notes("tick"):
            sent.setdefault(note["entry"], []).append(datetime.fromisoformat(note["due"]))
        caught_up = {name for name, dues in sent.items() if dues[-1] > began - MINUTE}
        return "last run" in sent and caught_up >= MINUTES.keys() - {"none", "last run"}

    wait_until(read, "each entry has caught up")
    caught_up_at = datetime.now(UTC)
    assert sent["latest"][0] > began - MINUTE
    assert sent["all of them"][0] == first["all of them"]
    assert sent["last run"][0] == first["last run"]
    for name, patience in {"all": 5 * MINUTE, "ten minutes": 10 * MINUTE}.items():
        assert began - patience <= sent[name][0] < caught_up_at - patience + MINUTE
    for name in ("all", "all of them", "ten minutes"):
        steps = {later - earlier for earlier, later in pairwise(sent[name])}
        assert steps == {MINUTE}
    on_time = began - timedelta(seconds=ON_TIME)
    assert all(due > on_time for due in sent.get("none", []))
    assert all(dues == sorted(dues) for dues in sent.values())
    assert "of none from" in after.output
    assert "of latest from" in after.output


def led_since(store_url: str) -> datetime:
    store = open_store(store_url, "kv_store", 5.0)
    row = store.peek(LEADER)
    store.close()
    assert row is not None
    assert row.acquired_at is not None
    return datetime.fromtimestamp(row.acquired_at, UTC)


def move_back(store_url: str, by: timedelta) -> dict[str, datetime]:
    """Make the whole stored schedule older by ``by``. Return a dict that maps each entry to its
    next tick.
    """
    store = open_store(store_url, "kv_store", 5.0)
    lease = store.acquire(LEADER, "the test", 60, None)
    assert lease is not None
    rows = store.entries.load(f"{LEADER}:")
    older = {
        name: replace(state, next_tick=state.next_tick - by)
        for name, state in decode_rows(rows).items()
        if state.next_tick is not None
    }
    keys = {f"{LEADER}:{name}": state for name, state in older.items()}
    document = {key: msgspec.json.encode(state).decode() for key, state in keys.items()}
    store.entries.record(lease.lease, document, 1, lease.write)
    store.release(lease.lease, Ended("succeeded", "[]"))
    store.close()
    return {name: state.next_tick for name, state in older.items() if state.next_tick}
