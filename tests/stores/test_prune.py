"""What is removed of keys that nobody uses any more, and what never is. Every store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import Ended, NewValue
from celery_singleton_state.store.sql.store import SqlStore, open_transaction
from tests.helpers.rows import BRIEF, DONE, HELD_ON, LONG, WAITING, acquire, let_run_out, peek
from tests.helpers.waiting import wait_until
from tests.helpers.writes import enqueue, write

DAY = 86_400.0
NEW = NewValue('{"n":1}', 1)


def run(store: SqlStore, key: str = "k") -> None:
    """One that has ended."""
    assert store.release(acquire(store, "a", LONG, key).lease, DONE, write(NEW))


def age(store: SqlStore, *columns: str, key: str | None = None) -> None:
    """Nothing has happened for years, as far as these times tell."""
    # UTC, which MariaDB need not be told, and does not understand.
    zone = "" if store.engine.dialect.name == "mysql" else "+00:00"
    for column in columns or ("updated_at", "last_finished_at"):
        which = f" AND {store._sql.key} = '{key}'" if key else ""
        store._change(
            f"UPDATE kv_store SET {column} = '2001-01-01 00:00:00.000{zone}'"
            f" WHERE {column} IS NOT NULL{which}",
            {},
        )


def old(store: SqlStore, *keys: str) -> None:
    """Keys that nobody uses."""
    for key in keys:
        run(store, key)
    age(store)


# -- what is removed


def test_what_nobody_has_used_for_so_long_is_removed(store: SqlStore) -> None:
    old(store, "a:1", "a:2", "b:1")
    run(store, "a:3")
    assert list(store.unused("a:", DAY)) == ["a:1", "a:2"]
    assert sorted(store.prune(["a:2", "a:1", "a:3", "a:4"], DAY)) == ["a:1", "a:2"]
    assert [row.key for row in store.list("")] == ["a:3", "b:1"]


def test_only_what_is_named_is_removed(store: SqlStore) -> None:
    """So that it can be done in batches, and by whoever is told which they are."""
    old(store, *(f"k{n}" for n in range(7)))
    assert sorted(store.prune(["k1", "k2"], DAY)) == ["k1", "k2"]
    assert store.prune([], DAY) == []
    assert list(store.unused("k", DAY)) == ["k0", "k3", "k4", "k5", "k6"]


def test_a_prefix_is_no_pattern(store: SqlStore) -> None:
    old(store, "a%", "ab", "A%")
    assert list(store.unused("a%", DAY)) == ["a%"]


def test_the_age_counts_by_the_stores_clock(store: SqlStore) -> None:
    run(store)
    assert list(store.unused("", LONG)) == []
    wait_until(lambda: list(store.unused("", BRIEF)) == ["k"], "it is unused for so long")
    assert store.prune(["k"], LONG) == []
    assert store.prune(["k"], BRIEF) == ["k"]


@pytest.mark.parametrize("column", ["updated_at", "last_finished_at"])
def test_the_newer_of_both_times_counts(store: SqlStore, column: str) -> None:
    """A run that saved nothing was a use, and so is a state that an operator has set."""
    run(store)
    age(store, column)
    assert list(store.unused("", DAY)) == []
    assert store.prune(["k"], DAY) == []


def test_one_that_never_ended_a_run_is_as_old_as_its_row(store: SqlStore) -> None:
    store.requests.expect({"k": "t"})
    assert store.prune(["k"], DAY) == []
    age(store)
    assert list(store.unused("", DAY)) == ["k"]
    assert store.prune(["k"], DAY) == ["k"]


def test_one_that_was_held_on_is_nobodys_when_the_hold_has_passed(store: SqlStore) -> None:
    store.release(acquire(store).lease, Ended("succeeded", "[]", hold=LONG))
    age(store, "updated_at", "last_finished_at", "hold_until")
    assert list(store.unused("", DAY)) == ["k"]
    assert store.prune(["k"], DAY) == ["k"]


def test_one_whose_queued_message_was_lost_is_nobodys(store: SqlStore) -> None:
    run(store)
    enqueue(store.requests, "k", "t", LONG)
    age(store, "updated_at", "last_finished_at", "queued_until")
    assert store.prune(["k"], DAY) == ["k"]


# -- what never is


def held(store: SqlStore) -> None:
    acquire(store, "b")


def held_late(store: SqlStore) -> None:
    """Without a successor it is still the one who may save."""
    acquire(store, "b", BRIEF)
    let_run_out(store)


def held_on(store: SqlStore) -> None:
    store.release(acquire(store, "b").lease, HELD_ON)


def asked_for(store: SqlStore) -> None:
    """Whoever asked is still to come."""
    lease = acquire(store, "b").lease
    store.requests.request_handoff(peek(store), "c")
    store.release(lease, DONE)


def wanted(store: SqlStore) -> None:
    """The run that is wanted could not be sent."""
    lease = acquire(store, "b").lease
    store.requests.request_run(peek(store), "w")
    store.release(lease, DONE)


def queued(store: SqlStore) -> None:
    enqueue(store.requests, "k", "t", LONG)


IN_USE = [held, held_late, held_on, asked_for, wanted, queued]


@pytest.mark.parametrize("use", IN_USE)
def test_what_is_in_use_is_never_removed(store: SqlStore, use: Callable[[SqlStore], None]) -> None:
    run(store)
    use(store)
    age(store)
    before = store._rows("SELECT * FROM kv_store", {})
    assert list(store.unused("", DAY)) == []
    assert store.prune(["k"], DAY) == []
    assert store._rows("SELECT * FROM kv_store", {}) == before


def test_what_is_no_singletons_is_never_removed(store: SqlStore) -> None:
    """A value that was set aside, and those of the key-value store's users."""
    store.set_aside("k", "kept")
    age(store)
    assert list(store.unused("", DAY)) == []
    assert store.prune(["k"], DAY) == []
    assert acquire(store).value == "kept"


# -- what comes after


def test_a_key_that_is_used_again_begins_anew(store: SqlStore) -> None:
    old(store, "k")
    store.prune(["k"], DAY)
    assert store.peek("k") is None
    again = acquire(store, "b")
    found = (again.value, again.schema_version, again.history, again.write)
    assert found == ("null", None, None, 0)


def test_a_run_from_before_is_refused_and_its_fence_does_not_come_again(store: SqlStore) -> None:
    """a acquires and is paused past its lease's life; b acquires and releases; years later the key
    is removed; c acquires, with a fence that nobody had before; a wakes up and writes.
    """
    stale = acquire(store, "a", BRIEF).lease
    let_run_out(store)
    between = acquire(store, "b").lease
    store.release(between, DONE)
    wait_until(lambda: peek(store).read_at * 1000 > between.fence + 1, "the store's clock goes on")
    age(store)
    assert store.prune(["k"], DAY) == ["k"]
    assert store.save(stale, write(NEW)) is None
    current = acquire(store, "c").lease
    assert stale.fence < between.fence < current.fence
    assert store.save(stale, write(NEW)) is None
    assert store.release(stale, DONE, write(NEW)) is None
    assert store.renew([stale]) == {}
    assert store.entries.record(stale, {}, 1, 0) is None
    assert store.written(stale, 1) is None
    assert store.give_back("k", "a") is None
    row = peek(store)
    assert (row.value, row.holder, row.run_count) == ("null", "c", 0)
    assert store.release(current, DONE, write(NEW))


# -- at the same time


def test_runs_that_begin_meanwhile_keep_their_rows(store: SqlStore) -> None:
    """Prune goes over many keys, a few at a time; runs acquire the same keys from the other end.
    Whoever is first: each run is its row's holder until it ends, from the old state or from none.
    """
    keys = [f"k{n:02}" for n in range(40)]
    old(store, *keys)
    fences = {row.key: row.fence for row in store.list("k")}

    def use(key: str) -> bool:
        acquired = acquire(store, "b", LONG, key)
        assert acquired.lease.fence > fences[key]
        assert acquired.value in {"null", NEW.value}
        assert store.save(acquired.lease, write(NewValue('{"n":2}', 1)))
        assert store.release(acquired.lease, DONE)
        return acquired.value == "null"

    with ThreadPoolExecutor(2) as pool:
        used = pool.map(use, keys[::-1])
        removed = [key for n in range(0, 40, 5) for key in store.prune(keys[n : n + 5], DAY)]
        begun_anew = [key for key, anew in zip(keys[::-1], used, strict=True) if anew]
    assert sorted(begun_anew) == sorted(removed)
    assert [row.key for row in store.list("k")] == keys
    assert {row.run_count for row in store.list("k")} <= {1, 2}


@pytest.fixture
def shared_store(shared_store_url: str) -> Iterator[SqlStore]:
    opened = open_store(shared_store_url, "kv_store", 10.0, 8, auto_migrate=True)
    yield opened
    opened.close()


@contextmanager
def on_its_way(store: SqlStore, statement: str, named: dict[str, Any]) -> Iterator[Any]:
    """The answer of a statement that has done its work, and is committed when the block ends."""
    # MariaDB's bring their own transaction.
    own = r"SET TRANSACTION.*;\s*|START TRANSACTION;\s*|;\s*COMMIT\s*$"
    with open_transaction(store.engine) as connection:
        cursor = connection.connection.cursor()
        cursor.execute(re.sub(own, "", statement), named)
        yield store._sql.rows(cursor)
        cursor.close()


def wait_until_blocked(store: SqlStore, statement: Future[object]) -> None:
    waiting = WAITING.get(store.engine.dialect.name)
    if waiting:  # on SQLite whoever is second waits for the file
        wait_until(lambda: store._rows(waiting, {})[0][0] > 0, "the statement waits for a lock")
    assert not statement.done()


def test_a_run_that_is_beginning_keeps_its_row(shared_store: SqlStore) -> None:
    """A run's acquisition has changed the row and is not committed; prune comes, for this key and
    another; the acquisition commits. On SQLite prune waits for the file, and then finds the row
    held; elsewhere it passes over the row and waits for nobody.
    """
    store = shared_store
    old(store, "k", "other")
    before = peek(store).fence
    named = {"key": "k", "holder": "b", "ttl": LONG, "task_id": None, "rank": 0}
    named |= {"sent": None, "of_clock": None, "task": "t"}
    with ThreadPoolExecutor(1) as pool:
        with on_its_way(store, store._sql.acquire, named):
            pruned = pool.submit(store.prune, ["k", "other"], DAY)
            if store.engine.dialect.name != "sqlite":
                assert pruned.result() == ["other"]
        assert pruned.result() == ["other"]
    assert store.prune(["k"], DAY) == []
    row = peek(store)
    assert (row.holder, row.value) == ("b", NEW.value)
    assert row.fence > before


def test_a_run_that_meets_prune_on_its_way_begins_anew(shared_store: SqlStore) -> None:
    """Prune has removed the row and is not committed; a run asks for the key, and waits; prune
    commits. The run must not take a row that is gone: it makes a new one, and holds it.
    """
    store = shared_store
    old(store, "k")
    # A fence is a moment in milliseconds, and this row's must have been a while ago, too.
    store._change("UPDATE kv_store SET fence = fence - 1000", {})
    before = peek(store).fence
    with ThreadPoolExecutor(1) as pool:
        named = {"keys": '["k"]', "older_than": DAY}
        with on_its_way(store, store._sql.prune, named) as pruned:
            assert list(pruned) == [("k",)]
            asked: Future[object] = pool.submit(acquire, store, "b")
            wait_until_blocked(store, asked)
        acquired = asked.result()
    row = peek(store)
    assert (row.holder, row.value, row.run_count) == ("b", "null", 0)
    assert row.fence > before
    assert store.save(acquired.lease, write(NEW))


@pytest.mark.parametrize("ends", [False, True], ids=["", "and ends"])
def test_a_run_that_begins_after_prune_has_looked_keeps_its_row(
    postgres_url: str, ends: bool
) -> None:
    """PostgreSQL: prune has taken its snapshot, and has not locked a row yet; a run acquires the
    key; prune goes on with what it sees, a row that nobody uses. It must look at it anew.

    A lock of nobody's row, asked for by the statement itself, is what prune waits for in between.
    """
    store = open_store(postgres_url, "kv_store", 10.0, 8, auto_migrate=True)
    old(store, "k", "other")
    before = peek(store).fence
    gate = "AND (SELECT pg_advisory_lock(1)) IS NOT NULL AND"
    assert store._sql.prune.count("AND fence") == 1
    store._sql.prune = store._sql.prune.replace("AND fence", f"{gate} fence")
    with (
        psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        other.execute("SELECT pg_advisory_lock(1)")
        pruned: Future[object] = pool.submit(store.prune, ["k", "other"], DAY)
        wait_until_blocked(store, pruned)
        lease = acquire(store, "b").lease
        assert not ends or store.release(lease, DONE)
        other.execute("SELECT pg_advisory_unlock(1)")
        assert pruned.result() == ["other"]
    assert peek(store).value == NEW.value
    assert peek(store).fence == lease.fence > before
    assert ends or store.save(lease, write(NEW))
    store.close()
