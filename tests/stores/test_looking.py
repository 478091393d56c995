"""What an operator and the exporter ask of a store, and what an operator changes; every store."""

from __future__ import annotations

import pytest

from celery_singleton_state.store import SqlStore
from celery_singleton_state.store.base import Ended, Lease, NewValue


def run(store: SqlStore, key: str, outcome: str = "succeeded", value: str = '{"n":1}') -> Lease:
    acquired = store.acquire(key, "h:1:a.1", 60, None)
    assert acquired is not None
    assert store.release(acquired.lease, Ended(outcome, f'["{key}"]'), NewValue(value, 2))
    return acquired.lease


def test_a_list_is_of_a_prefix_and_one_more(store: SqlStore) -> None:
    for key in ("a:1", "a:2", "b:1", "b:2"):
        run(store, key)
    assert [row.key for row in store.list("a:", also="b:2")] == ["a:1", "a:2", "b:2"]


def test_a_list_has_the_history_of_what_did_not_succeed(store: SqlStore) -> None:
    run(store, "a:1")
    run(store, "a:2", "failed")
    assert [row.history for row in store.list("a:")] == [None, '["a:2"]']


def test_contents(store: SqlStore) -> None:
    run(store, "a:1")
    run(store, "a:2")
    store.wishes.expect(["a:3"])
    keys = ["a:1", "a:3", "a:4"]
    assert store.contents(keys, values=False) == {"a:1": ('["a:1"]', None), "a:3": (None, None)}
    assert store.contents(keys, values=True) == {
        "a:1": ('["a:1"]', '{"n":1}'),
        "a:3": (None, "null"),
    }
    assert store.contents([], values=True) == {}


def test_what_is_expected_has_a_row_and_what_ran_keeps_its_own(store: SqlStore) -> None:
    run(store, "a:1")
    before = store.peek("a:1")
    store.wishes.expect(["a:1", "a:2"])
    assert store.peek("a:1") == before
    new = store.peek("a:2")
    assert new is not None
    assert (new.fence, new.run_count, new.holder, new.value) == (0, 0, None, "null")
    assert new.updated_at == pytest.approx(new.read_at, abs=60)
    acquired = store.acquire("a:2", "h:1:a.2", 60, None)
    assert acquired is not None
    assert acquired.lease.fence == 1


def test_a_state_is_put_where_nobody_has_the_lease(store: SqlStore) -> None:
    assert store.wishes.put("new", NewValue("1", 3))
    run(store, "free")
    assert store.wishes.put("free", NewValue("2", 4))
    acquired = store.acquire("held", "h:1:a.1", 60, None)
    assert acquired is not None
    assert not store.wishes.put("held", NewValue("3", 4))
    found = {key: store.peek(key) for key in ("new", "free", "held")}
    assert {
        key: (row.value, row.schema_version, row.fence) for key, row in found.items() if row
    } == {
        "new": ("1", 3, 0),
        "free": ("2", 4, 1),
        "held": ("null", None, 1),
    }
    assert found["free"] is not None
    assert found["free"].history == '["free"]'


def test_a_lease_that_ran_out_without_a_successor_keeps_others_from_putting(
    store: SqlStore,
) -> None:
    """Its holder may be late, and is still the only one who may write."""
    acquired = store.acquire("late", "h:1:a.1", 0, None)
    assert acquired is not None
    assert not store.wishes.put("late", NewValue("3", 4))
    assert store.save(acquired.lease, NewValue("4", 4))


def test_a_lease_that_is_held_on_is_let_go(store: SqlStore) -> None:
    acquired = store.acquire("kept", "h:1:a.1", 60, None)
    assert acquired is not None
    row = store.peek("kept")
    assert row is not None
    assert not store.wishes.let_go(row), "a run's lease is not"
    assert store.release(acquired.lease, Ended("succeeded", "[]", hold=60))
    kept = store.peek("kept")
    assert kept is not None
    assert kept.held_on
    assert not store.wishes.put("kept", NewValue("3", 4))
    assert store.wishes.let_go(kept)
    assert not store.wishes.let_go(kept)
    free = store.peek("kept")
    assert free is not None
    assert (free.holder, free.run_count, free.last_outcome) == (None, 1, "succeeded")
    assert store.acquire("kept", "h:1:a.2", 60, None)
