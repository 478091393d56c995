"""The requests of operators and of the exporter, on all stores.

They list and read rows, put a state, and end a hold period.
"""

from __future__ import annotations

import pytest

from celery_singleton_state.store.base import Ended, Lease, NewValue, Row
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.writes import write


def run(store: SqlStore, key: str, outcome: str = "succeeded", value: str = '{"n":1}') -> Lease:
    acquired = store.acquire(key, "h:1:a.1", 60, None)
    assert acquired is not None
    assert store.release(acquired.lease, Ended(outcome, f'["{key}"]'), write(NewValue(value, 2)))
    return acquired.lease


def test_a_list_has_a_prefixs_keys_and_one_named_key(store: SqlStore) -> None:
    for key in ("a:1", "a:2", "b:1", "b:2"):
        run(store, key)
    assert [row.key for row in store.list("a:", also="b:2")] == ["a:1", "a:2", "b:2"]


def test_a_list_has_the_history_only_of_failed_singletons(store: SqlStore) -> None:
    run(store, "a:1")
    run(store, "a:2", "failed")
    assert [row.history for row in store.list("a:")] == [None, '["a:2"]']


def test_contents_have_history_and_value(store: SqlStore) -> None:
    run(store, "a:1")
    run(store, "a:2")
    store.requests.expect({"a:3": "a"})
    keys = ["a:1", "a:3", "a:4"]
    assert store.contents(keys, values=False) == {"a:1": ('["a:1"]', None), "a:3": (None, None)}
    assert store.contents(keys, values=True) == {
        "a:1": ('["a:1"]', '{"n":1}'),
        "a:3": (None, "null"),
    }
    assert store.contents([], values=True) == {}


def test_an_expected_singleton_gets_a_row_and_an_old_row_stays(store: SqlStore) -> None:
    run(store, "a:1")
    before = store.peek("a:1")
    store.requests.expect({"a:1": "a", "a:2": "a"})
    assert store.peek("a:1") == before
    new = store.peek("a:2")
    assert new is not None
    assert (new.fence, new.run_count, new.holder, new.value) == (0, 0, None, "null")
    assert new.updated_at == pytest.approx(new.read_at, abs=60)
    acquired = store.acquire("a:2", "h:1:a.2", 60, None)
    assert acquired is not None
    assert acquired.write == 0


def put(store: SqlStore, key: str, value: str, version: int) -> bool:
    """Put a state, as an operator does that has just seen the row."""
    return store.requests.put(key, store.peek(key), NewValue(value, version))


def test_a_state_is_put_if_the_lease_is_free(store: SqlStore) -> None:
    assert put(store, "new", "1", 3)
    free = run(store, "free")
    assert put(store, "free", "2", 4)
    acquired = store.acquire("held", "h:1:a.1", 60, None)
    assert acquired is not None
    assert not put(store, "held", "3", 4)
    found = {key: store.peek(key) for key in ("new", "free", "held")}
    assert {
        key: (row.value, row.schema_version, row.fence) for key, row in found.items() if row
    } == {
        "new": ("1", 3, 0),
        "free": ("2", 4, free.fence),
        "held": ("null", None, acquired.lease.fence),
    }
    assert found["free"] is not None
    assert found["free"].history == '["free"]'


def test_a_put_is_refused_while_an_expired_lease_has_no_successor(
    store: SqlStore,
) -> None:
    """The holder of the expired lease is still the only one that may write the state."""
    acquired = store.acquire("late", "h:1:a.1", 0, None)
    assert acquired is not None
    assert not put(store, "late", "3", 4)
    assert store.save(acquired.lease, write(NewValue("4", 4)))


def row_of(store: SqlStore, key: str) -> Row:
    row = store.peek(key)
    assert row is not None
    return row


def test_a_put_does_not_overwrite_a_state_that_was_not_seen(store: SqlStore) -> None:
    """Two operators see the same row, or no row, and each puts a state: the second put is refused.
    Then an operator sees a row, a run saves, and the operator's put is refused.
    """
    assert store.requests.put("new", None, NewValue("1", 1))
    assert not store.requests.put("new", None, NewValue("2", 1))
    seen = row_of(store, "new")
    assert store.requests.put("new", seen, NewValue("3", 1))
    assert not store.requests.put("new", seen, NewValue("1", 1))
    seen = row_of(store, "new")
    run(store, "new", value="4")
    assert not store.requests.put("new", seen, NewValue("5", 1))
    row = row_of(store, "new")
    assert (row.value, row.schema_version) == ("4", 2)


def test_a_put_is_refused_after_a_run_that_saved_nothing(store: SqlStore) -> None:
    """The row has changed since the operator saw it, although the state has not."""
    run(store, "k")
    seen = row_of(store, "k")
    acquired = store.acquire("k", "h:1:a.2", 60, None)
    assert acquired is not None
    assert store.release(acquired.lease, Ended("succeeded", "[]"))
    assert not store.requests.put("k", seen, NewValue("5", 1))
    assert store.requests.put("k", row_of(store, "k"), NewValue("5", 1))


@pytest.mark.parametrize("made", ["expected", "queued", "set aside"])
def test_a_state_is_put_into_a_row_that_had_no_run(store: SqlStore, made: str) -> None:
    """The row was made before any run: by an expected singleton, a claim, or a value that was set
    aside.
    """
    if made == "expected":
        store.requests.expect({"k": "t"})
    elif made == "queued":
        assert store.requests.claim("k", "t", 60, 0)
    else:
        store.set_aside("k", "0")
    assert put(store, "k", "1", 1)
    row = row_of(store, "k")
    assert (row.value, row.write, row.run_count) == ("1", 1, 0)


def test_a_hold_period_is_ended_early(store: SqlStore) -> None:
    acquired = store.acquire("kept", "h:1:a.1", 60, None)
    assert acquired is not None
    row = store.peek("kept")
    assert row is not None
    assert not store.requests.release_early(row), "a run's own lease cannot be released early"
    assert store.release(acquired.lease, Ended("succeeded", "[]", hold=60))
    kept = store.peek("kept")
    assert kept is not None
    assert kept.in_hold_period
    assert not put(store, "kept", "3", 4)
    assert store.requests.release_early(kept)
    assert not store.requests.release_early(kept)
    free = store.peek("kept")
    assert free is not None
    assert (free.holder, free.run_count, free.last_outcome) == (None, 1, "succeeded")
    assert store.acquire("kept", "h:1:a.2", 60, None)
