"""What every store does: of leases, every store; of states, those that have any."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from celery_singleton_state.store import SqlStore
from celery_singleton_state.store.base import (
    Acquired,
    Ended,
    Lease,
    Leases,
    NewValue,
    Released,
    Row,
)
from tests.waiting import wait_until

LONG = 60.0
BRIEF = 0.2
HOLD = 0.3
#: Clocks are floating-point seconds here.
ROUNDING = 0.01
DONE = Ended("succeeded", "[]")
HELD_ON = Ended("succeeded", "[]", hold=LONG)
FREED = Released(wanted=None)


def acquire(store: Leases, holder: str = "a", ttl: float = LONG, key: str = "k") -> Acquired:
    acquired = store.acquire(key, holder, ttl, f"task-{holder}")
    assert acquired is not None
    return acquired


def peek(store: Leases, key: str = "k") -> Row:
    row = store.peek(key)
    assert row is not None
    return row


def let_run_out(store: Leases, key: str = "k") -> None:
    """Wait until the store's own clock says that the lease ran out."""

    def ran_out() -> bool:
        row = peek(store, key)
        return row.expires_in is not None and not row.held

    wait_until(ran_out, "the lease runs out")


def test_first_acquisition_makes_the_row(store: SqlStore) -> None:
    acquired = acquire(store)
    assert acquired.lease == Lease("k", "a", 1, LONG)
    assert acquired.value == "null"
    assert acquired.schema_version is None
    assert acquired.history is None


def test_a_held_lease_is_not_acquired(leases: Leases) -> None:
    acquire(leases, "a")
    assert leases.acquire("k", "b", LONG, None) is None
    row = peek(leases)
    assert (row.holder, row.task_id, row.fence, row.held) == ("a", "task-a", 1, True)
    assert row.expires_in is not None
    assert 0 < row.expires_in <= LONG + ROUNDING


def test_the_same_holder_is_answered_with_what_it_holds(leases: Leases) -> None:
    """A request whose answer was lost is repeated, and must not raise the fence again."""
    first = acquire(leases, "a")
    assert acquire(leases, "a").lease == first.lease


def test_a_released_lease_is_acquired_with_a_larger_fence(leases: Leases) -> None:
    assert leases.release(acquire(leases, "a").lease, DONE) == FREED
    assert acquire(leases, "b").lease.fence == 2


def test_an_expired_lease_is_taken_over(leases: Leases) -> None:
    acquire(leases, "a", BRIEF)
    let_run_out(leases)
    assert acquire(leases, "b").lease.fence == 2


def test_release_with_a_value_stores_all_of_it(store: SqlStore) -> None:
    lease = acquire(store).lease
    assert store.release(lease, Ended("succeeded", '["h"]'), NewValue('{"n":1}', 3)) == FREED
    row = peek(store)
    assert (row.value, row.schema_version, row.history) == ('{"n":1}', 3, '["h"]')
    assert (row.run_count, row.last_outcome) == (1, "succeeded")
    assert (row.holder, row.task_id, row.expires_in, row.held) == (None, None, None, False)
    assert row.last_finished_at is not None
    loaded = acquire(store, "b")
    assert (loaded.value, loaded.schema_version, loaded.history) == ('{"n":1}', 3, '["h"]')


def test_release_without_a_value_leaves_the_state(store: SqlStore) -> None:
    store.release(acquire(store, "a").lease, DONE, NewValue('{"n":1}', 1))
    before = peek(store)
    store.release(acquire(store, "b").lease, Ended("failed", "[]"))
    after = peek(store)
    assert (after.value, after.schema_version) == ('{"n":1}', 1)
    assert after.updated_at == before.updated_at
    assert (after.run_count, after.last_outcome) == (2, "failed")


def test_save_stores_and_keeps_the_lease(store: SqlStore) -> None:
    lease = acquire(store).lease
    saved = store.save(lease, NewValue('{"n":2}', 1))
    row = peek(store)
    assert saved is not None
    assert (saved.updated_at, saved.handoff_to) == (row.updated_at, None)
    assert (row.value, row.held, row.run_count) == ('{"n":2}', True, 0)


def test_save_prolongs_the_lease(store: SqlStore) -> None:
    acquire(store, "a", BRIEF)
    assert store.save(Lease("k", "a", 1, LONG), NewValue("{}", 1)) is not None
    row = peek(store)
    assert row.expires_in is not None
    assert row.expires_in > BRIEF


def test_a_late_save_without_a_successor_is_the_only_writer(store: SqlStore) -> None:
    lease = acquire(store, "a", BRIEF).lease
    let_run_out(store)
    assert store.save(lease, NewValue('{"n":1}', 1)) is not None
    assert store.release(lease, DONE) == FREED


@pytest.mark.parametrize("with_value", [True, False])
def test_a_stale_holder_changes_nothing(store: SqlStore, with_value: bool) -> None:
    """a acquires, is paused past its lease's life; b acquires and saves; a wakes and writes."""
    stale = acquire(store, "a", BRIEF).lease
    let_run_out(store)
    current = acquire(store, "b").lease
    store.save(current, NewValue('{"by":"b"}', 1))
    before = peek(store)

    assert store.save(stale, NewValue('{"by":"a"}', 1)) is None
    assert store.release(stale, DONE, NewValue('{"by":"a"}', 1) if with_value else None) is None
    assert store.renew([stale]) == {}

    after = peek(store)
    assert (after.value, after.fence, after.holder) == ('{"by":"b"}', 2, "b")
    assert after.run_count == before.run_count


@pytest.mark.parametrize(
    "wrong",
    [Lease("k", "a", 2, LONG), Lease("k", "b", 1, LONG), Lease("j", "a", 1, LONG)],
    ids=["fence", "holder", "key"],
)
def test_fence_holder_and_key_must_all_match(store: SqlStore, wrong: Lease) -> None:
    acquire(store, "a")
    assert store.save(wrong, NewValue("{}", 1)) is None
    assert store.release(wrong, DONE) is None
    assert store.renew([wrong]) == {}


def test_release_is_done_once(store: SqlStore) -> None:
    lease = acquire(store).lease
    assert store.release(lease, DONE) == FREED
    assert store.release(lease, DONE) is None
    assert store.save(lease, NewValue("{}", 1)) is None
    assert store.renew([lease]) == {}


@pytest.mark.parametrize("new", [None, NewValue('{"n":1}', 1)], ids=["", "with a value"])
def test_a_lease_that_is_held_on_is_not_acquired(store: SqlStore, new: NewValue | None) -> None:
    acquired = acquire(store, "a")
    assert store.release(acquired.lease, HELD_ON, new) == FREED
    assert store.acquire("k", "b", LONG, None) is None
    row = peek(store)
    assert (row.held, row.held_on, row.holder, row.task_id) == (True, True, "a (held on)", None)
    assert (row.run_count, row.last_outcome) == (1, "succeeded")
    assert row.value == (new.value if new else "null")
    assert row.expires_in is not None
    ends_at = row.read_at + row.expires_in
    assert ends_at == pytest.approx(acquired.acquired_at + LONG, abs=ROUNDING)


def test_a_lease_that_is_held_on_is_free_when_the_hold_has_passed(leases: Leases) -> None:
    first = acquire(leases, "a")
    leases.release(first.lease, Ended("succeeded", "[]", hold=HOLD))
    second = wait_until(lambda: leases.acquire("k", "b", LONG, None), "the hold passes")
    assert second.lease.fence == 2
    assert second.acquired_at - first.acquired_at >= HOLD - ROUNDING
    row = peek(leases)
    assert (row.held, row.held_on, row.holder) == (True, False, "b")


def test_a_hold_that_is_over_leaves_the_row_free(leases: Leases) -> None:
    """It counts from the acquisition: a run that took longer has nothing to hold on to."""
    acquired = acquire(leases, "a")
    wait_until(
        lambda: peek(leases).read_at - acquired.acquired_at > HOLD, "the run takes longer than HOLD"
    )
    assert leases.release(acquired.lease, Ended("succeeded", "[]", hold=HOLD)) == FREED
    row = peek(leases)
    assert (row.held, row.held_on, row.holder, row.task_id) == (False, False, None, None)
    assert acquire(leases, "b").lease.fence == 2


def test_a_row_says_since_when_it_is_held_and_when_it_was_read(leases: Leases) -> None:
    """Both by the leases's clock, which is this machine's in the tests."""
    asked_at = time.time()
    acquired = acquire(leases)
    row = peek(leases)
    assert row.acquired_at == acquired.acquired_at
    assert asked_at - ROUNDING <= acquired.acquired_at <= row.read_at <= time.time() + ROUNDING
    leases.renew([acquired.lease])
    later = peek(leases)
    assert later.acquired_at == row.acquired_at
    assert later.read_at >= row.read_at
    leases.release(acquired.lease, DONE)
    assert peek(leases).acquired_at is None


def test_renew_prolongs_many_by_their_own_lives(leases: Leases) -> None:
    held = [acquire(leases, "a", BRIEF, key).lease for key in ("k1", "k2", "k3")]
    longer = [Lease(each.key, "a", 1, LONG * n) for n, each in enumerate(held[:2], 1)]
    assert leases.renew([*longer, Lease("k3", "b", 1, LONG)]) == {"k1": None, "k2": None}
    lives = [row.expires_in or 0 for row in leases.list("k")]
    assert BRIEF < lives[0] <= LONG + ROUNDING < lives[1] <= 2 * LONG + ROUNDING
    assert lives[2] <= BRIEF + ROUNDING


def test_renew_of_nothing(leases: Leases) -> None:
    assert leases.renew([]) == {}


def test_renew_does_not_change_the_state(store: SqlStore) -> None:
    lease = acquire(store).lease
    store.save(lease, NewValue('{"n":1}', 1))
    before = peek(store)
    store.renew([lease])
    after = peek(store)
    assert (after.value, after.updated_at) == (before.value, before.updated_at)


def test_peek_of_nothing(leases: Leases) -> None:
    assert leases.peek("k") is None


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


def test_one_of_many_threads_acquires(leases: Leases) -> None:
    """All ask for a free lease at the same moment: one is answered, and then the next."""
    barrier = threading.Barrier(8)

    def ask(n: int) -> Acquired | None:
        barrier.wait()
        return leases.acquire("k", f"h{n}", LONG, None)

    with ThreadPoolExecutor(8) as pool:
        for fence in range(1, 6):
            winners = [found for found in pool.map(ask, range(8)) if found]
            assert [winner.lease.fence for winner in winners] == [fence]
            leases.release(winners[0].lease, DONE)


def test_a_transaction_commits_rows_and_state(store: SqlStore) -> None:
    lease = acquire(store).lease
    with store.transaction() as transaction:
        transaction.connection.exec_driver_sql("CREATE TABLE written (n integer)")
        transaction.connection.exec_driver_sql("INSERT INTO written VALUES (7)")
        assert transaction.save(lease, NewValue('{"n":7}', 1)) is not None
    with store.transaction() as transaction:
        found = transaction.connection.exec_driver_sql("SELECT n FROM written").scalar()
    row = peek(store)
    assert (found, row.value) == (7, '{"n":7}')


def test_a_transaction_that_raises_leaves_neither(store: SqlStore) -> None:
    lease = acquire(store).lease
    with store.transaction() as transaction:
        transaction.connection.exec_driver_sql("CREATE TABLE written (n integer)")

    def fail() -> None:
        with store.transaction() as transaction:
            transaction.connection.exec_driver_sql("INSERT INTO written VALUES (7)")
            transaction.save(lease, NewValue('{"n":7}', 1))
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    with store.transaction() as transaction:
        count = transaction.connection.exec_driver_sql("SELECT count(*) FROM written").scalar()
    row = peek(store)
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
        saved = transaction.save(lease, NewValue("{}", 1))
    assert saved is not None
    assert (saved.updated_at, saved.handoff_to) == (peek(store).updated_at, None)


def test_check_accepts_the_table(leases: Leases) -> None:
    leases.check()


def test_a_lease_that_is_held_on_is_its_holders_no_more(store: SqlStore) -> None:
    """a's release took effect and its answer was lost: the repeat must not end the hold, nor a
    renewal that was under way prolong it.
    """
    lease = acquire(store, "a").lease
    store.release(lease, HELD_ON)
    before = peek(store)
    assert store.release(lease, DONE) is None
    assert store.save(lease, NewValue("{}", 1)) is None
    assert store.renew([lease]) == {}
    assert store.acquire(lease.key, lease.holder, 60, None) is None
    after = peek(store)
    assert (after.held_on, after.run_count, after.value) == (True, 1, before.value)
