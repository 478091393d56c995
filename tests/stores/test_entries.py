"""The rows of a schedule's entries. A new store passes all of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine

from celery_singleton_state.lease.lease import clock
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.store.base import Lease, StoreUnavailable
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.rows import BRIEF, DONE, LONG, ROUNDING, acquire, let_run_out, peek
from tests.helpers.servers import Postgres
from tests.helpers.stores import url_on
from tests.helpers.waiting import wait_until

LEADER = "beat:shop"
ENTRIES = "beat:shop:"


def lead(store: SqlStore, holder: str = "a", ttl: float = LONG) -> Lease:
    return acquire(store, holder, ttl, LEADER).lease


def test_what_was_recorded_is_loaded(store: SqlStore) -> None:
    leader = lead(store)
    assert store.entries.load(ENTRIES) == {}
    store.entries.record(leader, {f"{ENTRIES}a": '{"n": 1}', f"{ENTRIES}b": "{}"}, 1, 0)
    store.entries.record(leader, {f"{ENTRIES}b": '{"n": 2}', f"{ENTRIES}c": "{}"}, 2, 1)
    assert store.entries.load(ENTRIES) == {
        f"{ENTRIES}a": '{"n": 1}',
        f"{ENTRIES}b": '{"n": 2}',
        f"{ENTRIES}c": "{}",
    }


def test_only_rows_under_the_prefix_are_loaded(store: SqlStore) -> None:
    leader = lead(store)
    rows = {f"{ENTRIES}a": "1", "beat:shop2:a": "2", "beat:sho": "3", "BEAT:SHOP:a": "4"}
    store.entries.record(leader, rows, 1, 0)
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}a": "1"}


@pytest.mark.parametrize("name", ["a'b", 'a"b\\', "%s {0} :a", "ключ ☃", "a\nb", "*[?]_%"])
def test_any_name_and_value(store: SqlStore, name: str) -> None:
    leader = lead(store)
    store.entries.record(leader, {ENTRIES + name: f"<{name}>"}, 1, 0)
    assert store.entries.load(ENTRIES) == {ENTRIES + name: f"<{name}>"}
    assert store.entries.forget(leader, [ENTRIES + name], 2, 1)
    assert store.entries.load(ENTRIES) == {}


def test_many(store: SqlStore) -> None:
    leader = lead(store)
    rows = {f"{ENTRIES}{number}": str(number) for number in range(5000)}
    store.entries.record(leader, rows, 1, 0)
    assert store.entries.load(ENTRIES) == rows


@pytest.mark.parametrize("rows", [{}, {f"{ENTRIES}a": "1"}])
def test_recording_renews_the_lease(store: SqlStore, rows: dict[str, str]) -> None:
    """By the life of the lease that is given, from the moment of the record."""
    leader = lead(store)
    short = Lease(leader.key, leader.holder, leader.fence, 5.0)
    now = store.entries.record(short, rows, 1, 0)
    row = peek(store, LEADER)
    assert now is not None
    assert row.expires_in is not None
    assert now + 5.0 == pytest.approx(row.read_at + row.expires_in, abs=ROUNDING)
    assert (row.fence, row.holder) == (leader.fence, leader.holder)


def test_its_answer_is_the_stores_time(store: SqlStore) -> None:
    leader = lead(store)
    before = peek(store, LEADER).read_at
    now = store.entries.record(leader, {}, 1, 0)
    assert now is not None
    assert before - ROUNDING <= now <= peek(store, LEADER).read_at + ROUNDING


def test_late_and_without_a_successor_is_still_recorded(store: SqlStore) -> None:
    leader = lead(store, ttl=BRIEF)
    let_run_out(store, LEADER)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1"}, 1, 0) is not None
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}a": "1"}


def test_whoever_was_succeeded_records_and_removes_nothing(store: SqlStore) -> None:
    first = lead(store, "a", BRIEF)
    let_run_out(store, LEADER)
    second = acquire(store, "b", LONG, LEADER)
    order = 1, second.write
    assert store.entries.record(second.lease, {f"{ENTRIES}a": "b's"}, *order) is not None
    late = {f"{ENTRIES}a": "a's", f"{ENTRIES}b": "a's"}
    assert store.entries.record(first, late, 1, 0) is None
    assert not store.entries.forget(first, [f"{ENTRIES}a"], 1, 0)
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}a": "b's"}
    assert peek(store, LEADER).holder == "b"


def test_whoever_gave_back_records_nothing(store: SqlStore) -> None:
    leader = lead(store)
    store.release(leader, DONE)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1"}, 1, 0) is None
    assert store.entries.load(ENTRIES) == {}
    assert peek(store, LEADER).holder is None


def test_another_with_the_same_fence_records_nothing(store: SqlStore) -> None:
    """As after a store was restored from a backup: the holder's name tells the two apart."""
    leader = lead(store)
    other = Lease(leader.key, "other", leader.fence, leader.ttl)
    assert store.entries.record(other, {f"{ENTRIES}a": "1"}, 1, 0) is None
    assert store.entries.load(ENTRIES) == {}


def test_only_what_is_named_is_forgotten(store: SqlStore) -> None:
    leader = lead(store)
    store.entries.record(leader, {f"{ENTRIES}a": "1", f"{ENTRIES}b": "2", f"{ENTRIES}c": "3"}, 1, 0)
    gone = [f"{ENTRIES}a", f"{ENTRIES}c", f"{ENTRIES}unknown"]
    assert store.entries.forget(leader, gone, 2, 1)
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}b": "2"}


def test_a_late_record_takes_no_entry_back(store: SqlStore) -> None:
    """A's first record stays under way; its copy is answered, and so is the second record; the
    first copy is carried out. The entry's last time must not go back.
    """
    leader = lead(store)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1", f"{ENTRIES}b": "1"}, 1, 0)
    assert store.entries.record(leader, {f"{ENTRIES}a": "2"}, 2, 1)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1", f"{ENTRIES}b": "1"}, 1, 0) is None
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}a": "2", f"{ENTRIES}b": "1"}


def test_a_late_forgetting_removes_nothing(store: SqlStore) -> None:
    """A removes an entry, and the request stays under way; its copy is answered; the entry comes
    back into the schedule and is recorded; the first copy is carried out.
    """
    leader = lead(store)
    assert store.entries.forget(leader, [f"{ENTRIES}a"], 1, 0)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1"}, 2, 1)
    assert not store.entries.forget(leader, [f"{ENTRIES}a"], 1, 0)
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}a": "1"}
    assert peek(store, LEADER).write == 2


def test_a_repeated_forgetting_succeeds(store: SqlStore) -> None:
    """Its answer was lost."""
    leader = lead(store)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1"}, 1, 0)
    for _ in range(2):
        assert store.entries.forget(leader, [f"{ENTRIES}a"], 2, 1)
    assert store.entries.load(ENTRIES) == {}


def test_forgetting_nothing_is_a_write(store: SqlStore) -> None:
    leader = lead(store)
    assert store.entries.forget(leader, [], 1, 0)
    assert peek(store, LEADER).write == 1


@pytest.mark.parametrize("server", ["postgresql", "mariadb"])
def test_a_forgetting_that_fails_half_way_leaves_all_as_it_was(
    request: pytest.FixtureRequest, tmp_path: Path, server: str
) -> None:
    """A's request passes the leader's row and then waits for an entry's, which somebody has locked
    for longer than A waits; the lock is given up. The leader's row must not say that the request
    took effect, and no entry is gone. A repeats it.
    """
    url = url_on(server, request, tmp_path)
    store = open_store(url, "kv_store", 1.0, 4, auto_migrate=True)
    leader = lead(store)
    rows = {f"{ENTRIES}a": "1", f"{ENTRIES}b": "2"}
    assert store.entries.record(leader, rows, 1, 0)
    other = create_engine(url)
    with other.connect() as connection:
        locked = f"WHERE {store._sql.key} = '{ENTRIES}b'"
        connection.exec_driver_sql(f"SELECT * FROM kv_store {locked} FOR UPDATE")
        with pytest.raises(StoreUnavailable):
            store.entries.forget(leader, list(rows), 2, 1)
    other.dispose()
    assert store.written(leader, 2) is False
    assert store.entries.load(ENTRIES) == rows
    assert store.entries.forget(leader, list(rows), 2, 1)
    assert store.entries.load(ENTRIES) == {}
    store.close()


def test_entries_are_no_singletons(store: SqlStore) -> None:
    leader = lead(store)
    store.entries.record(leader, {f"{ENTRIES}a": "1"}, 1, 0)
    assert [row.key for row in store.list("beat:")] == [LEADER]
    assert store.peek(f"{ENTRIES}a") is None


Change = Callable[[SqlStore, Lease], bool]


def record(store: SqlStore, leader: Lease) -> bool:
    """Both change the entry that an earlier record has left."""
    return store.entries.record(leader, {f"{ENTRIES}a": "2"}, 2, 1) is not None


def forget(store: SqlStore, leader: Lease) -> bool:
    return store.entries.forget(leader, [f"{ENTRIES}a"], 2, 1)


@pytest.mark.parametrize("change", [record, forget])
def test_a_record_that_waits_for_the_next_leader_is_refused(
    shared_store_url: str, change: Change
) -> None:
    """A leads, its lease has run out; B's acquisition has taken the row and not committed; A's
    record begins, and waits; B's commits. A must see what became of the row, and change nothing.
    """
    store = open_store(shared_store_url, "kv_store", 5.0, 4, auto_migrate=True)
    first = lead(store, "a", BRIEF)
    assert store.entries.record(first, {f"{ENTRIES}a": "1"}, 1, 0)
    let_run_out(store, LEADER)
    other = create_engine(shared_store_url)
    with other.connect() as connection, ThreadPoolExecutor(1) as pool:
        if store.engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.exec_driver_sql(
            f"UPDATE kv_store SET holder = 'b', fence = fence + 1"
            f" WHERE {store._sql.key} = '{LEADER}'"
        )
        answer = pool.submit(change, store, first)
        end = clock() + 0.3
        wait_until(lambda: clock() > end, "the record has begun and waits")
        assert not answer.done()
        connection.commit()
        assert answer.result() is False
    other.dispose()
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}a": "1"}
    store.close()


@pytest.mark.parametrize(("change", "left"), [(record, {f"{ENTRIES}a": "2"}), (forget, {})])
def test_who_asks_for_the_lease_waits_for_a_record_on_its_way(
    postgres_url: str, change: Change, left: dict[str, str]
) -> None:
    """A's lease has run out; its record has passed the leader's row, and waits for an entry's,
    which a third one has locked; B asks for the lease, and must wait; the lock is given up. A's
    record is stored, and its lease lives again where the record prolongs it. B is told what came of
    it: that A leads, or that B does.
    """
    store = open_store(postgres_url, "kv_store", 5.0, 4, auto_migrate=True)
    first = lead(store, "a", BRIEF)
    store.entries.record(first, {f"{ENTRIES}a": "1"}, 1, 0)
    let_run_out(store, LEADER)
    with (
        psycopg.connect(postgres_url.replace("+psycopg", "")) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        other.execute(f"SELECT * FROM kv_store WHERE key = '{ENTRIES}a' FOR UPDATE")
        changed = pool.submit(change, store, first)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as watch:

            def waits(count: int) -> bool:
                row = watch.execute(waiting).fetchone()
                return row is not None and row[0] == count

            wait_until(lambda: waits(1), "the record waits for the entry")
            acquired = pool.submit(store.acquire, LEADER, "b", LONG, None)
            wait_until(lambda: waits(2), "the next leader waits for the record")
        other.rollback()
        assert changed.result() is True
        assert (acquired.result() is None) == (change is record)
    assert store.entries.load(ENTRIES) == left
    store.close()


def test_each_verb_is_one_statement_but_for_the_rare_one(
    postgres: Postgres, postgres_url: str
) -> None:
    options = "?application_name=entries&options=-c%20log_statement%3Dall"
    migrate_url(postgres_url, "kv_store")
    store = open_store(postgres_url + options, "kv_store", 5.0)
    leader = lead(store)
    assert store.entries.forget(leader, [], 1, 0)  # connects
    before = len(postgres.statements_of("entries"))
    entries = {f"{ENTRIES}{number}": "1" for number in range(100)}
    assert store.entries.record(leader, entries, 2, 1)
    store.entries.load(ENTRIES)
    assert store.entries.forget(leader, [f"{ENTRIES}1"], 3, 2)
    forgetting = ["BEGIN", "UPDATE", "DELETE", "COMMIT"]
    assert postgres.statements_of("entries")[before:] == ["WITH", "SELECT", *forgetting]
    store.close()
