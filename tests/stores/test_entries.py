"""The rows of a schedule's entries. Every store with states must pass these tests."""

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
from tests.helpers.rows import BRIEF, DONE, LONG, ROUNDING, STALL, acquire, let_expire, peek
from tests.helpers.servers import Postgres
from tests.helpers.stores import url_on
from tests.helpers.waiting import wait_until

LEADER = "beat:shop"
ENTRIES = "beat:shop:"


def lead(store: SqlStore, holder: str = "a", ttl: float = LONG) -> Lease:
    return acquire(store, holder, ttl, LEADER).lease


def test_recorded_entries_are_loaded(store: SqlStore) -> None:
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
def test_entries_may_have_any_name_and_value(store: SqlStore, name: str) -> None:
    leader = lead(store)
    store.entries.record(leader, {ENTRIES + name: f"<{name}>"}, 1, 0)
    assert store.entries.load(ENTRIES) == {ENTRIES + name: f"<{name}>"}
    assert store.entries.forget(leader, [ENTRIES + name], 2, 1)
    assert store.entries.load(ENTRIES) == {}


def test_many_entries_are_recorded_at_once(store: SqlStore) -> None:
    leader = lead(store)
    rows = {f"{ENTRIES}{number}": str(number) for number in range(5000)}
    store.entries.record(leader, rows, 1, 0)
    assert store.entries.load(ENTRIES) == rows


@pytest.mark.parametrize("rows", [{}, {f"{ENTRIES}a": "1"}])
def test_recording_renews_the_lease(store: SqlStore, rows: dict[str, str]) -> None:
    """When a leader records entries, its lease is extended to its ``ttl``, counted from the store's
    time of the record.
    """
    leader = lead(store)
    short = Lease(leader.key, leader.holder, leader.fence, 20.0)
    now = store.entries.record(short, rows, 1, 0)
    row = peek(store, LEADER)
    assert now is not None
    assert row.expires_in is not None
    assert now + 20.0 == pytest.approx(row.read_at + row.expires_in, abs=STALL)
    assert (row.fence, row.holder) == (leader.fence, leader.holder)


def test_a_record_answers_with_the_stores_time(store: SqlStore) -> None:
    leader = lead(store)
    before = peek(store, LEADER).read_at
    now = store.entries.record(leader, {}, 1, 0)
    assert now is not None
    assert before - ROUNDING <= now <= peek(store, LEADER).read_at + ROUNDING


def test_an_expired_leader_without_a_successor_records(store: SqlStore) -> None:
    leader = lead(store, ttl=BRIEF)
    let_expire(store, LEADER)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1"}, 1, 0) is not None
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}a": "1"}


def test_a_leader_with_a_successor_records_and_removes_nothing(store: SqlStore) -> None:
    first = lead(store, "a", BRIEF)
    let_expire(store, LEADER)
    second = acquire(store, "b", LONG, LEADER)
    order = 1, second.write
    assert store.entries.record(second.lease, {f"{ENTRIES}a": "b's"}, *order) is not None
    late = {f"{ENTRIES}a": "a's", f"{ENTRIES}b": "a's"}
    assert store.entries.record(first, late, 1, 0) is None
    assert not store.entries.forget(first, [f"{ENTRIES}a"], 1, 0)
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}a": "b's"}
    assert peek(store, LEADER).holder == "b"


def test_a_leader_that_has_released_records_nothing(store: SqlStore) -> None:
    leader = lead(store)
    store.release(leader, DONE)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1"}, 1, 0) is None
    assert store.entries.load(ENTRIES) == {}
    assert peek(store, LEADER).holder is None


def test_another_holder_with_the_same_fence_records_nothing(store: SqlStore) -> None:
    """Two holders can get the same fence after a store was restored from a backup. Their names
    differ.
    """
    leader = lead(store)
    other = Lease(leader.key, "other", leader.fence, leader.ttl)
    assert store.entries.record(other, {f"{ENTRIES}a": "1"}, 1, 0) is None
    assert store.entries.load(ENTRIES) == {}


def test_only_the_named_entries_are_forgotten(store: SqlStore) -> None:
    leader = lead(store)
    store.entries.record(leader, {f"{ENTRIES}a": "1", f"{ENTRIES}b": "2", f"{ENTRIES}c": "3"}, 1, 0)
    gone = [f"{ENTRIES}a", f"{ENTRIES}c", f"{ENTRIES}unknown"]
    assert store.entries.forget(leader, gone, 2, 1)
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}b": "2"}


def test_a_late_record_overwrites_no_newer_entry(store: SqlStore) -> None:
    """A's first record stalls; its copy is answered, and so is A's second record; then the first
    copy is carried out. The entry must keep the state of the second record.
    """
    leader = lead(store)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1", f"{ENTRIES}b": "1"}, 1, 0)
    assert store.entries.record(leader, {f"{ENTRIES}a": "2"}, 2, 1)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1", f"{ENTRIES}b": "1"}, 1, 0) is None
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}a": "2", f"{ENTRIES}b": "1"}


def test_a_late_removal_removes_nothing(store: SqlStore) -> None:
    """A's request to remove an entry stalls; its copy is answered; the entry returns to the
    schedule, and is recorded; the first copy is carried out.
    """
    leader = lead(store)
    assert store.entries.forget(leader, [f"{ENTRIES}a"], 1, 0)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1"}, 2, 1)
    assert not store.entries.forget(leader, [f"{ENTRIES}a"], 1, 0)
    assert store.entries.load(ENTRIES) == {f"{ENTRIES}a": "1"}
    assert peek(store, LEADER).write == 2


def test_a_repeated_removal_succeeds(store: SqlStore) -> None:
    """A removal is repeated because its answer was lost."""
    leader = lead(store)
    assert store.entries.record(leader, {f"{ENTRIES}a": "1"}, 1, 0)
    for _ in range(2):
        assert store.entries.forget(leader, [f"{ENTRIES}a"], 2, 1)
    assert store.entries.load(ENTRIES) == {}


def test_removing_no_entries_is_a_write(store: SqlStore) -> None:
    leader = lead(store)
    assert store.entries.forget(leader, [], 1, 0)
    assert peek(store, LEADER).write == 1


@pytest.mark.parametrize("server", ["postgresql", "mariadb"])
def test_a_removal_that_fails_half_way_changes_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, server: str
) -> None:
    """A's request changes the leader's row, and then waits for an entry's row. Another transaction
    has locked that row for longer than A waits. After the failure the leader's row must not say
    that the request took effect, and no entry may be missing. A repeats the request, and it
    succeeds.
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
    """Change the entry that an earlier ``record()`` has stored."""
    return store.entries.record(leader, {f"{ENTRIES}a": "2"}, 2, 1) is not None


def forget(store: SqlStore, leader: Lease) -> bool:
    """Remove the entry that an earlier ``record()`` has stored."""
    return store.entries.forget(leader, [f"{ENTRIES}a"], 2, 1)


@pytest.mark.parametrize("change", [record, forget])
def test_a_record_that_waits_for_the_next_leader_is_refused(
    shared_store_url: str, change: Change
) -> None:
    """A led, and its lease has expired; B's acquisition has changed the row and is not committed;
    A's record begins, and waits for the row; B commits. A must see the new row, and change nothing.
    """
    store = open_store(shared_store_url, "kv_store", 5.0, 4, auto_migrate=True)
    first = lead(store, "a", BRIEF)
    assert store.entries.record(first, {f"{ENTRIES}a": "1"}, 1, 0)
    let_expire(store, LEADER)
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
def test_an_acquisition_waits_for_a_record_in_progress(
    postgres_url: str, change: Change, left: dict[str, str]
) -> None:
    """A's lease has expired. A's record has changed the leader's row, and waits for an entry's row,
    which a third transaction has locked. B asks for the lease, and must wait. The third transaction
    ends. A's record takes effect. If it renewed A's lease, A still leads and B is refused; a
    removal renews nothing, so B gets the lease.
    """
    store = open_store(postgres_url, "kv_store", 5.0, 4, auto_migrate=True)
    first = lead(store, "a", BRIEF)
    store.entries.record(first, {f"{ENTRIES}a": "1"}, 1, 0)
    let_expire(store, LEADER)
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


def test_each_verb_is_one_statement_except_a_removal(postgres: Postgres, postgres_url: str) -> None:
    options = "?application_name=entries&options=-c%20log_statement%3Dall"
    migrate_url(postgres_url, "kv_store")
    store = open_store(postgres_url + options, "kv_store", 5.0)
    leader = lead(store)
    # Open the connection first, so that its statements are not counted.
    assert store.entries.forget(leader, [], 1, 0)
    before = len(postgres.statements_of("entries"))
    entries = {f"{ENTRIES}{number}": "1" for number in range(100)}
    assert store.entries.record(leader, entries, 2, 1)
    store.entries.load(ENTRIES)
    assert store.entries.forget(leader, [f"{ENTRIES}1"], 3, 2)
    forgetting = ["BEGIN", "UPDATE", "DELETE", "COMMIT"]
    assert postgres.statements_of("entries")[before:] == ["WITH", "SELECT", *forgetting]
    store.close()
