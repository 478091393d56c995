"""Tests of prune on all stores: it removes the rows of keys that are no longer used, and no row in
use.
"""

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
from tests.helpers.rows import (
    BRIEF,
    DONE,
    LONG,
    WAITING,
    WITH_HOLD_PERIOD,
    acquire,
    let_expire,
    peek,
)
from tests.helpers.waiting import wait_until
from tests.helpers.writes import enqueue, write

DAY = 86_400.0
NEW = NewValue('{"n":1}', 1)


def run(store: SqlStore, key: str = "k") -> None:
    """Let a run begin and end."""
    assert store.release(acquire(store, "a", LONG, key).lease, DONE, write(NEW))


def age(store: SqlStore, *columns: str, key: str | None = None) -> None:
    """Set columns of the rows to a time years ago: by default the times of the last use, in all
    rows.
    """
    # The time is in UTC. MariaDB rejects a suffix that says so, and needs none.
    zone = "" if store.engine.dialect.name == "mysql" else "+00:00"
    for column in columns or ("updated_at", "last_finished_at"):
        which = f" AND {store._sql.key} = '{key}'" if key else ""
        store._change(
            f"UPDATE kv_store SET {column} = '2001-01-01 00:00:00.000{zone}'"
            f" WHERE {column} IS NOT NULL{which}",
            {},
        )


def old(store: SqlStore, *keys: str) -> None:
    """Make rows of keys that have not been used for years."""
    for key in keys:
        run(store, key)
    age(store)


# -- keys that are removed


def test_keys_unused_for_longer_than_the_age_are_removed(store: SqlStore) -> None:
    old(store, "a:1", "a:2", "b:1")
    run(store, "a:3")
    assert list(store.unused("a:", DAY)) == ["a:1", "a:2"]
    assert sorted(store.prune(["a:2", "a:1", "a:3", "a:4"], DAY)) == ["a:1", "a:2"]
    assert [row.key for row in store.list("")] == ["a:3", "b:1"]


def test_only_named_keys_are_removed(store: SqlStore) -> None:
    """The caller can show the unused keys first, and can remove them in batches."""
    old(store, *(f"k{n}" for n in range(7)))
    assert sorted(store.prune(["k1", "k2"], DAY)) == ["k1", "k2"]
    assert store.prune([], DAY) == []
    assert list(store.unused("k", DAY)) == ["k0", "k3", "k4", "k5", "k6"]


def test_a_prefix_is_no_pattern(store: SqlStore) -> None:
    old(store, "a%", "ab", "A%")
    assert list(store.unused("a%", DAY)) == ["a%"]


def test_the_age_is_measured_by_the_stores_clock(store: SqlStore) -> None:
    run(store)
    assert list(store.unused("", LONG)) == []
    wait_until(lambda: list(store.unused("", BRIEF)) == ["k"], "the key is unused for long enough")
    assert store.prune(["k"], LONG) == []
    assert store.prune(["k"], BRIEF) == ["k"]


@pytest.mark.parametrize("column", ["updated_at", "last_finished_at"])
def test_the_newer_of_both_times_counts(store: SqlStore, column: str) -> None:
    """A run that saved nothing counts as a use. A state that an operator has put counts, too."""
    run(store)
    age(store, column)
    assert list(store.unused("", DAY)) == []
    assert store.prune(["k"], DAY) == []


def test_a_key_without_runs_is_as_old_as_its_row(store: SqlStore) -> None:
    store.requests.expect({"k": "t"})
    assert store.prune(["k"], DAY) == []
    age(store)
    assert list(store.unused("", DAY)) == ["k"]
    assert store.prune(["k"], DAY) == ["k"]


def test_a_key_is_removed_after_its_hold_period(store: SqlStore) -> None:
    store.release(acquire(store).lease, Ended("succeeded", "[]", hold=LONG))
    age(store, "updated_at", "last_finished_at", "hold_until")
    assert list(store.unused("", DAY)) == ["k"]
    assert store.prune(["k"], DAY) == ["k"]


def test_a_key_whose_queued_message_was_lost_is_removed(store: SqlStore) -> None:
    run(store)
    enqueue(store.requests, "k", "t", LONG)
    age(store, "updated_at", "last_finished_at", "queued_until")
    assert store.prune(["k"], DAY) == ["k"]


# -- keys that are never removed


def held(store: SqlStore) -> None:
    acquire(store, "b")


def held_late(store: SqlStore) -> None:
    """Hold the lease past its expiry. Without a successor the holder may still save."""
    acquire(store, "b", BRIEF)
    let_expire(store)


def in_hold_period(store: SqlStore) -> None:
    store.release(acquire(store, "b").lease, WITH_HOLD_PERIOD)


def with_handoff_request(store: SqlStore) -> None:
    """Leave a handoff request in a free row; the message that asked is not delivered yet."""
    lease = acquire(store, "b").lease
    store.requests.request_handoff(peek(store), "c")
    store.release(lease, DONE)


def with_pending_run(store: SqlStore) -> None:
    """Leave a pending run in a free row, because it could not be sent."""
    lease = acquire(store, "b").lease
    store.requests.request_run(peek(store), "w")
    store.release(lease, DONE)


def queued(store: SqlStore) -> None:
    enqueue(store.requests, "k", "t", LONG)


IN_USE = [held, held_late, in_hold_period, with_handoff_request, with_pending_run, queued]


@pytest.mark.parametrize("use", IN_USE)
def test_a_key_in_use_is_never_removed(store: SqlStore, use: Callable[[SqlStore], None]) -> None:
    run(store)
    use(store)
    age(store)
    before = store._rows("SELECT * FROM kv_store", {})
    assert list(store.unused("", DAY)) == []
    assert store.prune(["k"], DAY) == []
    assert store._rows("SELECT * FROM kv_store", {}) == before


def test_rows_of_no_singleton_are_never_removed(store: SqlStore) -> None:
    """Values that were set aside, and values of the key-value store's users, stay."""
    store.set_aside("k", "kept")
    age(store)
    assert list(store.unused("", DAY)) == []
    assert store.prune(["k"], DAY) == []
    assert acquire(store).value == "kept"


# -- after a removal


def test_a_key_that_is_used_again_begins_anew(store: SqlStore) -> None:
    old(store, "k")
    store.prune(["k"], DAY)
    assert store.peek("k") is None
    again = acquire(store, "b")
    found = (again.value, again.schema_version, again.history, again.write)
    assert found == ("null", None, None, 0)


def test_an_old_run_is_refused_after_its_row_was_removed(store: SqlStore) -> None:
    """A acquires, and is paused until its lease has expired; B acquires and releases; years later
    the key is removed; C acquires, and gets a new fence; A resumes and writes.
    """
    stale = acquire(store, "a", BRIEF).lease
    let_expire(store)
    between = acquire(store, "b").lease
    store.release(between, DONE)
    wait_until(lambda: peek(store).read_at * 1000 > between.fence + 1, "the store's clock advances")
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


# -- prune while runs begin


def test_runs_that_begin_during_prune_keep_their_rows(store: SqlStore) -> None:
    """Prune goes through many keys, a few at a time. Meanwhile runs acquire the same keys, in the
    opposite order. Each run must keep its row until it ends, and begin with the old state or with
    none.
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
def uncommitted(store: SqlStore, statement: str, named: dict[str, Any]) -> Iterator[Any]:
    """Carry out a statement, yield the rows that it returns, and commit it when the block ends."""
    # Remove the transaction that MariaDB's statements contain, because this function commits.
    own = r"SET TRANSACTION.*;\s*|START TRANSACTION;\s*|;\s*COMMIT\s*$"
    with open_transaction(store.engine) as connection:
        cursor = connection.connection.cursor()
        cursor.execute(re.sub(own, "", statement), named)
        yield store._sql.rows(cursor)
        cursor.close()


def wait_until_blocked(store: SqlStore, statement: Future[object]) -> None:
    waiting = WAITING.get(store.engine.dialect.name)
    # On SQLite the second statement waits for the file's lock, which no query can see: do not wait
    # for it.
    if waiting:
        wait_until(lambda: store._rows(waiting, {})[0][0] > 0, "the statement waits for a lock")
    assert not statement.done()


def test_prune_leaves_a_row_that_is_being_acquired(shared_store: SqlStore) -> None:
    """A run's acquisition has changed the row, and is not committed; prune is called for this key
    and another; the acquisition commits. On SQLite prune waits for the file, and then finds the row
    held. Other databases let prune skip the locked row without waiting.
    """
    store = shared_store
    old(store, "k", "other")
    before = peek(store).fence
    named = {"key": "k", "holder": "b", "ttl": LONG, "task_id": None, "rank": 0}
    named |= {"sent": None, "of_clock": None, "task": "t"}
    with ThreadPoolExecutor(1) as pool:
        with uncommitted(store, store._sql.acquire, named):
            pruned = pool.submit(store.prune, ["k", "other"], DAY)
            if store.engine.dialect.name != "sqlite":
                assert pruned.result() == ["other"]
        assert pruned.result() == ["other"]
    assert store.prune(["k"], DAY) == []
    row = peek(store)
    assert (row.holder, row.value) == ("b", NEW.value)
    assert row.fence > before


def test_an_acquisition_that_waits_for_prune_makes_a_new_row(shared_store: SqlStore) -> None:
    """Prune has removed the row, and is not committed; a run asks for the key, and waits; prune
    commits. The run must not get the removed row: it makes a new row, and holds it.
    """
    store = shared_store
    old(store, "k")
    # A fence is a time in milliseconds. Move this one back, because the row must look old.
    store._change("UPDATE kv_store SET fence = fence - 1000", {})
    before = peek(store).fence
    with ThreadPoolExecutor(1) as pool:
        named = {"keys": '["k"]', "older_than": DAY}
        with uncommitted(store, store._sql.prune, named) as pruned:
            assert list(pruned) == [("k",)]
            asked: Future[object] = pool.submit(acquire, store, "b")
            wait_until_blocked(store, asked)
        acquired = asked.result()
    row = peek(store)
    assert (row.holder, row.value, row.run_count) == ("b", "null", 0)
    assert row.fence > before
    assert store.save(acquired.lease, write(NEW))


@pytest.mark.parametrize("ends", [False, True], ids=["", "and ends"])
def test_an_acquisition_after_prunes_snapshot_keeps_its_row(postgres_url: str, ends: bool) -> None:
    """On PostgreSQL, prune has taken its snapshot, and has not locked a row yet; a run acquires the
    key; prune continues with its snapshot, in which the row is unused. It must check the row again.

    To stop prune at this point, its statement is given an advisory lock to wait for.
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
