"""What every store does. A new store passes all of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from celery_singleton_state.store import SqlStore
from celery_singleton_state.store.base import Acquired, Ended, Lease, NewValue
from tests.waiting import wait_until

LONG = 60.0
BRIEF = 0.2
#: Clocks are floating-point seconds here.
ROUNDING = 0.01
DONE = Ended("succeeded", "[]")


def acquire(store: SqlStore, holder: str = "a", ttl: float = LONG, key: str = "k") -> Acquired:
    acquired = store.acquire(key, holder, ttl, f"task-{holder}")
    assert acquired is not None
    return acquired


def let_run_out(store: SqlStore, key: str = "k") -> None:
    """Wait until the store's own clock says that the lease ran out."""

    def ran_out() -> bool:
        row = store.peek(key)
        return row is not None and row.expires_in is not None and not row.held

    wait_until(ran_out, "the lease runs out")


def test_first_acquisition_makes_the_row(store: SqlStore) -> None:
    acquired = acquire(store)
    assert acquired.lease == Lease("k", "a", 1, LONG)
    assert acquired.value == "null"
    assert acquired.schema_version is None
    assert acquired.history is None


def test_a_held_lease_is_not_acquired(store: SqlStore) -> None:
    acquire(store, "a")
    assert store.acquire("k", "b", LONG, None) is None
    row = store.peek("k")
    assert row is not None
    assert (row.holder, row.task_id, row.fence, row.held) == ("a", "task-a", 1, True)
    assert row.expires_in is not None
    assert 0 < row.expires_in <= LONG + ROUNDING


def test_the_same_holder_is_answered_with_what_it_holds(store: SqlStore) -> None:
    """A request whose answer was lost is repeated, and must not raise the fence again."""
    first = acquire(store, "a")
    assert acquire(store, "a").lease == first.lease


def test_a_released_lease_is_acquired_with_a_larger_fence(store: SqlStore) -> None:
    assert store.release(acquire(store, "a").lease, DONE)
    assert acquire(store, "b").lease.fence == 2


def test_an_expired_lease_is_taken_over(store: SqlStore) -> None:
    acquire(store, "a", BRIEF)
    let_run_out(store)
    assert acquire(store, "b").lease.fence == 2


def test_release_with_a_value_stores_all_of_it(store: SqlStore) -> None:
    lease = acquire(store).lease
    assert store.release(lease, Ended("succeeded", '["h"]'), NewValue('{"n":1}', 3))
    row = store.peek("k")
    assert row is not None
    assert (row.value, row.schema_version, row.history) == ('{"n":1}', 3, '["h"]')
    assert (row.run_count, row.last_outcome) == (1, "succeeded")
    assert (row.holder, row.task_id, row.expires_in, row.held) == (None, None, None, False)
    assert row.last_finished_at is not None
    loaded = acquire(store, "b")
    assert (loaded.value, loaded.schema_version, loaded.history) == ('{"n":1}', 3, '["h"]')


def test_release_without_a_value_leaves_the_state(store: SqlStore) -> None:
    store.release(acquire(store, "a").lease, DONE, NewValue('{"n":1}', 1))
    before = store.peek("k")
    store.release(acquire(store, "b").lease, Ended("failed", "[]"))
    after = store.peek("k")
    assert before is not None
    assert after is not None
    assert (after.value, after.schema_version) == ('{"n":1}', 1)
    assert after.updated_at == before.updated_at
    assert (after.run_count, after.last_outcome) == (2, "failed")


def test_save_stores_and_keeps_the_lease(store: SqlStore) -> None:
    lease = acquire(store).lease
    assert store.save(lease, NewValue('{"n":2}', 1))
    row = store.peek("k")
    assert row is not None
    assert (row.value, row.held, row.run_count) == ('{"n":2}', True, 0)


def test_save_prolongs_the_lease(store: SqlStore) -> None:
    acquire(store, "a", BRIEF)
    assert store.save(Lease("k", "a", 1, LONG), NewValue("{}", 1))
    row = store.peek("k")
    assert row is not None
    assert row.expires_in is not None
    assert row.expires_in > BRIEF


def test_a_late_save_without_a_successor_is_the_only_writer(store: SqlStore) -> None:
    lease = acquire(store, "a", BRIEF).lease
    let_run_out(store)
    assert store.save(lease, NewValue('{"n":1}', 1))
    assert store.release(lease, DONE)


@pytest.mark.parametrize("with_value", [True, False])
def test_a_stale_holder_changes_nothing(store: SqlStore, with_value: bool) -> None:
    """a acquires, is paused past its lease's life; b acquires and saves; a wakes and writes."""
    stale = acquire(store, "a", BRIEF).lease
    let_run_out(store)
    current = acquire(store, "b").lease
    store.save(current, NewValue('{"by":"b"}', 1))
    before = store.peek("k")

    assert not store.save(stale, NewValue('{"by":"a"}', 1))
    assert not store.release(stale, DONE, NewValue('{"by":"a"}', 1) if with_value else None)
    assert store.renew([stale]) == set()

    after = store.peek("k")
    assert before is not None
    assert after is not None
    assert (after.value, after.fence, after.holder) == ('{"by":"b"}', 2, "b")
    assert after.run_count == before.run_count


@pytest.mark.parametrize(
    "wrong",
    [Lease("k", "a", 2, LONG), Lease("k", "b", 1, LONG), Lease("j", "a", 1, LONG)],
    ids=["fence", "holder", "key"],
)
def test_fence_holder_and_key_must_all_match(store: SqlStore, wrong: Lease) -> None:
    acquire(store, "a")
    assert not store.save(wrong, NewValue("{}", 1))
    assert not store.release(wrong, DONE)
    assert store.renew([wrong]) == set()


def test_release_is_done_once(store: SqlStore) -> None:
    lease = acquire(store).lease
    assert store.release(lease, DONE)
    assert not store.release(lease, DONE)
    assert not store.save(lease, NewValue("{}", 1))
    assert store.renew([lease]) == set()


def test_renew_prolongs_many_by_their_own_lives(store: SqlStore) -> None:
    leases = [acquire(store, "a", BRIEF, key).lease for key in ("k1", "k2", "k3")]
    longer = [Lease(each.key, "a", 1, LONG * n) for n, each in enumerate(leases[:2], 1)]
    assert store.renew([*longer, Lease("k3", "b", 1, LONG)]) == {"k1", "k2"}
    lives = [row.expires_in or 0 for row in store.list("k")]
    assert BRIEF < lives[0] <= LONG + ROUNDING < lives[1] <= 2 * LONG + ROUNDING
    assert lives[2] <= BRIEF + ROUNDING


def test_renew_of_nothing(store: SqlStore) -> None:
    assert store.renew([]) == set()


def test_renew_does_not_change_the_state(store: SqlStore) -> None:
    lease = acquire(store).lease
    store.save(lease, NewValue('{"n":1}', 1))
    before = store.peek("k")
    store.renew([lease])
    after = store.peek("k")
    assert before is not None
    assert after is not None
    assert (after.value, after.updated_at) == (before.value, before.updated_at)


def test_peek_of_nothing(store: SqlStore) -> None:
    assert store.peek("k") is None


def test_list_is_by_prefix_and_shows_singletons_only(store: SqlStore) -> None:
    for key in ("a:2", "a:1", "A:3", "b:1", "a%"):
        acquire(store, "h", LONG, key)
    store.set_aside("a:kept", "broken")
    assert [row.key for row in store.list("a:")] == ["a:1", "a:2"]
    assert [row.key for row in store.list("a%")] == ["a%"]


def test_set_aside_keeps_the_first_value(store: SqlStore) -> None:
    store.set_aside("q", "broken")
    store.set_aside("q", "other")
    acquired = acquire(store, key="q")
    assert acquired.value == "broken"


@pytest.mark.parametrize(
    "value",
    ['{"t":"' + "ä😀" + '"}', '{"t":"\\u0000"}', '{"t":"' + "x" * 5_000_000 + '"}', "{'%s :a}"],
    ids=["unicode", "nul", "5 MB", "placeholders"],
)
def test_values_come_back_as_they_were(store: SqlStore, value: str) -> None:
    store.release(acquire(store).lease, DONE, NewValue(value, 1))
    assert acquire(store, "b").value == value


def test_one_of_many_threads_acquires(store: SqlStore) -> None:
    """All ask for a free lease at the same moment: one is answered, and then the next."""
    barrier = threading.Barrier(8)

    def ask(n: int) -> Acquired | None:
        barrier.wait()
        return store.acquire("k", f"h{n}", LONG, None)

    with ThreadPoolExecutor(8) as pool:
        for fence in range(1, 6):
            winners = [found for found in pool.map(ask, range(8)) if found]
            assert [winner.lease.fence for winner in winners] == [fence]
            store.release(winners[0].lease, DONE)


def test_a_transaction_commits_rows_and_state(store: SqlStore) -> None:
    lease = acquire(store).lease
    with store.transaction() as transaction:
        transaction.connection.exec_driver_sql("CREATE TABLE lines (n integer)")
        transaction.connection.exec_driver_sql("INSERT INTO lines VALUES (7)")
        assert transaction.save(lease, NewValue('{"n":7}', 1)) is not None
    with store.transaction() as transaction:
        found = transaction.connection.exec_driver_sql("SELECT n FROM lines").scalar()
    row = store.peek("k")
    assert row is not None
    assert (found, row.value) == (7, '{"n":7}')


def test_a_transaction_that_raises_leaves_neither(store: SqlStore) -> None:
    lease = acquire(store).lease
    with store.transaction() as transaction:
        transaction.connection.exec_driver_sql("CREATE TABLE lines (n integer)")

    def fail() -> None:
        with store.transaction() as transaction:
            transaction.connection.exec_driver_sql("INSERT INTO lines VALUES (7)")
            transaction.save(lease, NewValue('{"n":7}', 1))
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    with store.transaction() as transaction:
        count = transaction.connection.exec_driver_sql("SELECT count(*) FROM lines").scalar()
    row = store.peek("k")
    assert row is not None
    assert (count, row.value) == (0, "null")


def test_a_transaction_of_a_stale_holder_is_told_so(store: SqlStore) -> None:
    stale = acquire(store, "a", BRIEF).lease
    let_run_out(store)
    acquire(store, "b")
    with store.transaction() as transaction:
        assert transaction.save(stale, NewValue('{"by":"a"}', 1)) is None


def test_a_transactions_save_is_known_by_its_moment(store: SqlStore) -> None:
    lease = acquire(store).lease
    with store.transaction() as transaction:
        saved_at = transaction.save(lease, NewValue("{}", 1))
    row = store.peek("k")
    assert row is not None
    assert row.updated_at == saved_at


def test_check_accepts_the_table(store: SqlStore) -> None:
    store.check()
