"""Tests that every store must pass.

Tests of leases run on all stores. Tests of states run on the stores that have states.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import (
    TAKEN_OVER,
    Acquired,
    Ended,
    Lease,
    Leases,
    NewValue,
    Queued,
    Released,
    Saved,
    SeenTicks,
    Write,
)
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.rows import (
    BRIEF,
    DONE,
    FREED,
    LONG,
    NEW,
    NEWER,
    ROUNDING,
    STALL,
    WAITING,
    WITH_HOLD_PERIOD,
    acquire,
    let_expire,
    peek,
)
from tests.helpers.stores import url_on
from tests.helpers.waiting import wait_until
from tests.helpers.writes import write

HOLD = 0.3


def expires_at(store: Leases, key: str = "k") -> float:
    row = peek(store, key)
    assert row.expires_in is not None
    return row.read_at + row.expires_in


def test_first_acquisition_makes_the_row(store: SqlStore) -> None:
    acquired = acquire(store)
    assert acquired.lease == Lease("k", "a", acquired.lease.fence, LONG)
    assert (acquired.value, acquired.write) == ("null", 0)
    assert acquired.schema_version is None
    assert acquired.history is None


def test_a_held_lease_is_not_acquired(leases: Leases) -> None:
    lease = acquire(leases, "a").lease
    assert leases.acquire("k", "b", LONG, None) is None
    row = peek(leases)
    assert (row.holder, row.task_id, row.fence, row.held) == ("a", "task-a", lease.fence, True)
    assert row.expires_in is not None
    assert 0 < row.expires_in <= LONG + ROUNDING


def test_a_repeated_acquisition_returns_the_same_lease(leases: Leases) -> None:
    """A request whose answer was lost is repeated. The repetition must not raise the fence."""
    first = acquire(leases, "a")
    assert acquire(leases, "a") == first


def test_a_repeated_acquisition_keeps_a_handoff_request_and_a_pending_run(leases: Leases) -> None:
    """A's first acquire request stalls; its copy is answered; C asks A to hand over, and records a
    pending run; the first request is carried out. A must still learn of the handoff and of the
    pending run.
    """
    first = acquire(leases, "a")
    assert leases.requests.request_handoff(peek(leases), "c")
    assert leases.requests.request_run(peek(leases), "w")
    assert acquire(leases, "a").acquired_at == first.acquired_at
    assert leases.renew([first.lease]) == {"k": "c"}
    assert leases.release(first.lease, DONE) == Released("w")


def test_a_repeated_acquisition_never_shortens_the_lease(leases: Leases) -> None:
    """A's acquire request for a brief first life stalls; its copy is answered; A confirms by a
    renewal for a long life; the first request is carried out.
    """
    lease = acquire(leases, "a", BRIEF).lease
    assert leases.renew([replace(lease, ttl=LONG)])
    before = expires_at(leases)
    acquire(leases, "a", BRIEF)
    assert expires_at(leases) == pytest.approx(before, abs=STALL)
    acquire(leases, "a", 2 * LONG)
    assert expires_at(leases) == pytest.approx(before + LONG, abs=LONG / 2)


def test_a_repeated_acquisition_renews_an_expired_lease(leases: Leases) -> None:
    """No other holder has acquired the lease since it expired, so the holder keeps it, with its
    fence.
    """
    first = acquire(leases, "a", BRIEF)
    let_expire(leases)
    again = acquire(leases, "a")
    assert (again.lease.fence, again.write) == (first.lease.fence, first.write)
    assert peek(leases).held


def test_a_repeated_acquisition_keeps_the_write_number(store: SqlStore) -> None:
    """A's first acquire request stalls; its copy is answered; A's writes 1 and 2 are answered, but
    the first copy of write 1 stalls, too; the stalled acquisition is carried out, and then the
    stalled write 1. If the acquisition had set the number back, the old write would be accepted.
    """
    lease = acquire(store, "a").lease
    assert store.save(lease, write(NEW, 1))
    assert store.save(lease, write(NEWER, 2))
    assert acquire(store, "a").write == 2
    assert store.save(lease, write(NEW, 1)) is None
    assert store.release(lease, DONE, write(NEW, 3))


def test_a_fence_is_the_stores_time_in_milliseconds(leases: Leases) -> None:
    """Fences that follow the clock are not repeated after a row was removed or the store lost its
    data.
    """
    acquired = acquire(leases)
    assert acquired.lease.fence / 1000 == pytest.approx(acquired.acquired_at, abs=STALL)


def test_a_fence_grows_by_one_while_the_stores_clock_is_behind_it(store: SqlStore) -> None:
    """The store's clock was set back, so the row's fence is larger than the clock."""
    ahead = acquire(store, "a").lease.fence + 10**9
    store._change(f"UPDATE kv_store SET fence = {ahead}", {})
    assert store.give_back("k", "a")
    assert acquire(store, "b").lease.fence == ahead + 1


def test_fences_grow_within_a_millisecond(leases: Leases) -> None:
    """Many runs may begin and end within the same millisecond."""
    fences = []
    for n in range(50):
        lease = acquire(leases, f"h{n}").lease
        assert leases.release(lease, DONE)
        fences.append(lease.fence)
    assert fences == sorted(set(fences))


def test_a_released_lease_is_acquired_with_a_larger_fence(leases: Leases) -> None:
    first = acquire(leases, "a").lease
    assert leases.release(first, DONE) == FREED
    second = acquire(leases, "b")
    assert second.lease.fence > first.fence
    assert second.write == 0


def test_an_expired_lease_is_taken_over(leases: Leases) -> None:
    """The answer distinguishes a takeover from an orderly handoff: after a takeover its write
    number is -1, not 0.
    """
    first = acquire(leases, "a", BRIEF).lease
    let_expire(leases)
    second = acquire(leases, "b")
    assert second.lease.fence > first.fence
    assert second.write == TAKEN_OVER


# -- give_back


def test_a_lease_is_given_back_by_its_holders_name_alone(leases: Leases) -> None:
    """A's acquisition took effect, but its answer was lost: A does not know its fence."""
    first = acquire(leases, "a").lease
    assert leases.give_back("k", "a") == FREED
    row = peek(leases)
    assert (row.holder, row.task_id, row.acquired_at, row.expires_in) == (None,) * 4
    assert (row.fence, row.run_count, row.last_outcome) == (first.fence, 0, None)
    second = acquire(leases, "b")
    assert second.lease.fence > first.fence
    assert second.write == 0


def test_giving_back_answers_with_the_pending_run(leases: Leases) -> None:
    acquire(leases, "a")
    assert leases.requests.request_run(peek(leases), "w")
    assert leases.give_back("k", "a") == Released("w")


def test_a_late_lease_without_a_successor_is_given_back(leases: Leases) -> None:
    acquire(leases, "a", BRIEF)
    let_expire(leases)
    assert leases.give_back("k", "a") == FREED
    assert peek(leases).holder is None


def test_only_the_holder_gives_back(leases: Leases) -> None:
    """A's lease expires; B takes it over; A gives its lease back, gets no answer, and repeats the
    request.
    """
    acquire(leases, "a", BRIEF)
    let_expire(leases)
    lease = acquire(leases, "b").lease
    before = peek(leases)
    assert leases.give_back("k", "a") is None
    assert leases.give_back("k", "a") is None
    assert leases.give_back("other", "a") is None
    after = peek(leases)
    assert (after.holder, after.fence, after.acquired_at) == ("b", lease.fence, before.acquired_at)
    assert after.held


def test_a_lease_is_given_back_once(leases: Leases) -> None:
    lease = acquire(leases, "a").lease
    assert leases.give_back("k", "a") == FREED
    assert leases.give_back("k", "a") is None
    assert leases.renew([lease]) == {}
    assert leases.release(lease, DONE) is None


def test_giving_back_does_not_end_a_hold_period(leases: Leases) -> None:
    """In a hold period the former holder has no rights to the lease any more."""
    lease = acquire(leases, "a").lease
    assert leases.release(lease, WITH_HOLD_PERIOD)
    assert leases.give_back("k", "a") is None
    assert peek(leases).in_hold_period


def test_giving_back_leaves_the_state(store: SqlStore) -> None:
    lease = acquire(store, "a").lease
    assert store.save(lease, write(NEW))
    before = peek(store)
    assert store.give_back("k", "a") == FREED
    after = peek(store)
    assert (after.value, after.schema_version) == (NEW.value, NEW.schema_version)
    assert after.updated_at == before.updated_at
    assert store.save(lease, write(NEWER, 2)) is None


# -- the task


def test_a_row_names_its_task(leases: Leases) -> None:
    """The request that makes the row names the task. Each run names it again. A refused request
    changes no name.
    """
    leases.requests.expect({"expected": "t1"})
    assert leases.requests.claim("claimed", "id", LONG, 0, task="t1")
    leases.requests.dequeue("dequeued", "id", task="t1")
    assert leases.acquire("acquired", "a", LONG, None, task="t1")
    keys = ("acquired", "claimed", "dequeued", "expected")
    assert [(row.key, row.task) for row in leases.list("")] == [(key, "t1") for key in keys]
    assert leases.acquire("acquired", "b", LONG, None, task="t2") is None
    leases.requests.expect({"expected": "t2"})
    assert not leases.requests.claim("claimed", "other", LONG, 0, task="t2")
    leases.requests.dequeue("dequeued", "id", task="t2")
    assert [peek(leases, key).task for key in keys] == ["t1"] * 4
    for key in keys[1:]:
        assert leases.acquire(key, "b", LONG, None, task="t2")
        assert peek(leases, key).task == "t2"


def test_a_row_keeps_its_task_if_a_request_names_none(leases: Leases) -> None:
    first = leases.acquire("k", "a", LONG, None, task="größe\0")
    assert first is not None
    leases.release(first.lease, DONE)
    acquire(leases, "b")
    assert peek(leases).task == "größe\0"
    assert acquire(leases, "c", key="other").lease
    assert peek(leases, "other").task is None


def test_a_state_from_outside_names_the_task_of_a_new_row(store: SqlStore) -> None:
    assert store.requests.put("k", None, NEW, "t")
    assert peek(store).task == "t"


# -- the state


def test_release_with_a_value_stores_all_of_it(store: SqlStore) -> None:
    lease = acquire(store).lease
    new = write(NewValue('{"n":1}', 3))
    assert store.release(lease, Ended("succeeded", '["h"]'), new) == FREED
    row = peek(store)
    assert (row.value, row.schema_version, row.history) == ('{"n":1}', 3, '["h"]')
    assert (row.run_count, row.last_outcome) == (1, "succeeded")
    assert (row.holder, row.task_id, row.expires_in, row.held) == (None, None, None, False)
    assert row.last_finished_at is not None
    loaded = acquire(store, "b")
    assert (loaded.value, loaded.schema_version, loaded.history) == ('{"n":1}', 3, '["h"]')


def test_a_release_keeps_or_replaces_the_finished_ticks(leases: Leases) -> None:
    """A release that names no finished ticks, for example an operator's, keeps the finished ticks
    in the row. This also holds for leases without a state.
    """
    leases.release(acquire(leases).lease, replace(DONE, ticks_done='{"e":[]}'))
    assert peek(leases).ticks_done == '{"e":[]}'
    second = acquire(leases, "b")
    assert second.ticks_done == '{"e":[]}'
    assert acquire(leases, "b").ticks_done == '{"e":[]}'
    leases.release(second.lease, Ended("lost", "[]"))
    assert peek(leases).ticks_done == '{"e":[]}'
    third = acquire(leases, "c")
    leases.give_back("k", "c")
    assert peek(leases).ticks_done == third.ticks_done == '{"e":[]}'
    leases.release(acquire(leases, "d").lease, replace(DONE, ticks_done="{}"))
    assert peek(leases).ticks_done == "{}"


def test_a_beat_reads_lease_and_finished_ticks_of_rows(leases: Leases) -> None:
    """A beat reads for each key: is the lease held, by which task, and which ticks are finished. An
    expired lease is not held; a hold period has no task.
    """
    leases.release(acquire(leases, "a", key="free").lease, replace(DONE, ticks_done='{"e":[]}'))
    acquire(leases, "b", key="held")
    acquire(leases, "c", BRIEF, key="late")
    leases.release(acquire(leases, "d", key="kept").lease, WITH_HOLD_PERIOD)
    let_expire(leases, "late")
    assert leases.ticks(["free", "held", "late", "kept", "none"]) == {
        "free": SeenTicks(False, None, '{"e":[]}'),
        "held": SeenTicks(True, "task-b", None),
        "late": SeenTicks(False, "task-c", None),
        "kept": SeenTicks(True, None, None),
    }
    assert leases.ticks([]) == {}


def test_release_without_a_value_leaves_the_state(store: SqlStore) -> None:
    store.release(acquire(store, "a").lease, DONE, write(NEW))
    before = peek(store)
    store.release(acquire(store, "b").lease, Ended("failed", "[]"))
    after = peek(store)
    assert (after.value, after.schema_version) == ('{"n":1}', 1)
    assert after.updated_at == before.updated_at
    assert (after.run_count, after.last_outcome) == (2, "failed")


def test_save_stores_and_keeps_the_lease(store: SqlStore) -> None:
    lease = acquire(store).lease
    assert store.save(lease, write(NEW)) == Saved(handoff_to=None)
    row = peek(store)
    assert (row.value, row.held, row.run_count, row.write) == (NEW.value, True, 0, 1)
    assert row.updated_at == pytest.approx(row.read_at, abs=LONG)


def test_save_renews_the_lease(store: SqlStore) -> None:
    lease = acquire(store, "a", BRIEF).lease
    assert store.save(replace(lease, ttl=LONG), write(NEW)) is not None
    row = peek(store)
    assert row.expires_in is not None
    assert row.expires_in > BRIEF


def test_a_late_save_without_a_successor_is_the_only_writer(store: SqlStore) -> None:
    lease = acquire(store, "a", BRIEF).lease
    let_expire(store)
    assert store.save(lease, write(NEW)) is not None
    assert store.release(lease, DONE) == FREED


# -- the order of writes


def save(store: SqlStore, lease: Lease, write: Write) -> bool:
    return store.save(lease, write) is not None


def save_in_transaction(store: SqlStore, lease: Lease, write: Write) -> bool:
    with store.transaction() as transaction:
        return transaction.save(lease, write) is not None


def release(store: SqlStore, lease: Lease, write: Write) -> bool:
    return store.release(lease, DONE, write) is not None


def release_with_hold_period(store: SqlStore, lease: Lease, write: Write) -> bool:
    return store.release(lease, WITH_HOLD_PERIOD, write) is not None


def record(store: SqlStore, lease: Lease, write: Write) -> bool:
    return store.entries.record(lease, {"k:a": "1"}, write.number, write.seen) is not None


def forget(store: SqlStore, lease: Lease, write: Write) -> bool:
    return store.entries.forget(lease, ["k:a"], write.number, write.seen)


EACH_WRITE = pytest.mark.parametrize(
    "carry_out", [save, save_in_transaction, release, release_with_hold_period, record, forget]
)
CarryOut = Callable[[SqlStore, Lease, Write], bool]


@EACH_WRITE
def test_a_late_write_is_refused(store: SqlStore, carry_out: CarryOut) -> None:
    """A's write 1 stalls; its copy is answered, and so is A's write 2; then the first copy of write
    1 is carried out.
    """
    lease = acquire(store).lease
    assert store.save(lease, write(NEW, 1))
    assert store.save(lease, write(NEWER, 2))
    before = peek(store)
    assert not carry_out(store, lease, write(NEW, 1))
    after = peek(store)
    assert replace(after, read_at=before.read_at, expires_in=before.expires_in) == before
    assert store.entries.load("k:") == {}


@EACH_WRITE
def test_a_write_after_writes_with_an_unknown_outcome_is_carried_out(
    store: SqlStore, carry_out: CarryOut
) -> None:
    """A's write 1 is answered. Its writes 2 and 3 are not answered; one of them was carried out."""
    lease = acquire(store).lease
    assert store.save(lease, write(NEW, 1))
    assert store.save(lease, write(NEW, 2))
    assert carry_out(store, lease, write(NEWER, 4, seen=1))
    assert peek(store).write == 4


@EACH_WRITE
def test_a_write_after_a_write_that_the_store_lost_is_refused(
    store: SqlStore, carry_out: CarryOut
) -> None:
    """A's writes 1 and 2 are answered; a fail-over loses write 2; A's write 3 names write 2 as
    seen.
    """
    lease = acquire(store).lease
    assert store.save(lease, write(NEW, 1))
    before = peek(store)
    assert not carry_out(store, lease, write(NEWER, 3, seen=2))
    after = peek(store)
    assert (after.value, after.write, after.holder) == (before.value, before.write, "a")


@pytest.mark.parametrize("carry_out", [save, save_in_transaction, record, forget])
def test_a_repeated_write_is_carried_out_again(store: SqlStore, carry_out: CarryOut) -> None:
    """A write is repeated because its answer was lost."""
    lease = acquire(store).lease
    assert carry_out(store, lease, write(NEW))
    assert carry_out(store, lease, write(NEW))
    assert peek(store).write == 1


@EACH_WRITE
def test_the_first_write_after_a_takeover_is_accepted(store: SqlStore, carry_out: CarryOut) -> None:
    """The first write names as ``seen`` the number that the acquisition answered: -1 after a
    takeover.
    """
    acquire(store, "a", BRIEF)
    let_expire(store)
    acquired = acquire(store, "b")
    assert carry_out(store, acquired.lease, write(NEW, 1, seen=acquired.write))


def test_a_release_without_a_value_names_no_write(store: SqlStore) -> None:
    """A run whose last transaction has an unknown outcome releases without a value, because it does
    not know which state is stored.
    """
    lease = acquire(store).lease
    assert store.save(lease, write(NEW, 1))
    assert store.release(lease, DONE) == FREED
    assert (peek(store).value, peek(store).write) == (NEW.value, 1)


# -- written


def test_written_tells_whether_a_write_took_effect(store: SqlStore) -> None:
    lease = acquire(store).lease
    assert store.written(lease, 1) is False
    assert store.save(lease, write(NEW, 1))
    assert store.written(lease, 1) is True
    assert store.written(lease, 2) is False
    assert store.save(lease, write(NEW, 3, seen=1))
    assert store.written(lease, 2) is True, "a newer write did, so this one was not refused"


def test_after_a_takeover_nothing_is_written_yet(store: SqlStore) -> None:
    acquire(store, "a", BRIEF)
    let_expire(store)
    assert store.written(acquire(store, "b").lease, 1) is False


def test_written_answers_for_an_expired_lease_without_a_successor(store: SqlStore) -> None:
    lease = acquire(store, "a", BRIEF).lease
    assert store.save(lease, write(NEW, 1))
    let_expire(store)
    assert store.written(lease, 1) is True


def test_written_answers_nothing_to_a_former_holder(store: SqlStore) -> None:
    """A asks about its write after its run has ended, and again after B has written: it learns
    nothing.
    """
    lease = acquire(store, "a").lease
    assert store.release(lease, DONE, write(NEW, 1))
    assert store.written(lease, 1) is None
    assert store.save(acquire(store, "b").lease, write(NEW, 1))
    assert store.written(lease, 1) is None
    assert store.written(replace(lease, key="other"), 1) is None


@pytest.mark.parametrize("server", ["postgresql", "mariadb", "pgbouncer"])
def test_written_waits_for_a_commit_in_progress(
    request: pytest.FixtureRequest, tmp_path: Path, server: str
) -> None:
    """A's transaction has saved, but its COMMIT is not carried out yet; A asks whether its write
    took effect; the COMMIT is carried out. A must not get "no" as the answer.
    """
    url = url_on(server, request, tmp_path)
    store = open_store(url, "kv_store", 10.0, pool_size=8, auto_migrate=True)
    lease = acquire(store).lease
    waiting = WAITING[store.engine.dialect.name]
    with ThreadPoolExecutor(1) as pool:
        with store.transaction() as transaction:
            assert transaction.save(lease, write(NEW, 1))
            asked = pool.submit(store.written, lease, 1)
            wait_until(lambda: store._rows(waiting, {})[0][0] > 0, "the question waits for a lock")
            assert not asked.done()
        assert asked.result() is True
    store.close()


def test_a_row_of_an_older_release_of_the_package_is_used(store: SqlStore) -> None:
    """Such a row has a small number as its fence, and no write number and no queue number."""
    assert store.release(acquire(store, "a").lease, DONE, write(NEW))
    column = store._sql.write
    store._change(f"UPDATE kv_store SET fence = 3, {column} = NULL, queue = NULL", {})
    assert store.requests.queued("k") == Queued(0, None)
    row = peek(store)
    assert (row.fence, row.write) == (3, 0)
    assert store.requests.put("k", row, NEWER)
    assert store.requests.claim("k", "task-b", LONG, 0)
    store._change(f"UPDATE kv_store SET {column} = NULL, queue = NULL", {})
    store.requests.dequeue("k", "other")
    acquired = acquire(store, "b")
    assert (acquired.value, acquired.write) == (NEWER.value, 0)
    assert acquired.lease.fence / 1000 == pytest.approx(acquired.acquired_at, abs=STALL)
    assert store.requests.queued("k") == Queued(2, "task-b")
    assert store.save(acquired.lease, Write(1, acquired.write, NEW))


# -- writes that must be refused


@pytest.mark.parametrize("with_value", [True, False])
def test_a_stale_holder_changes_nothing(store: SqlStore, with_value: bool) -> None:
    """A acquires, and is paused until its lease has expired; B acquires and saves; A resumes and
    writes.
    """
    stale = acquire(store, "a", BRIEF).lease
    let_expire(store)
    current = acquire(store, "b").lease
    store.save(current, write(NewValue('{"by":"b"}', 1)))
    before = peek(store)

    late = write(NewValue('{"by":"a"}', 1))
    assert store.save(stale, late) is None
    assert store.release(stale, DONE, late if with_value else None) is None
    assert store.renew([stale]) == {}

    after = peek(store)
    assert (after.value, after.fence, after.holder) == ('{"by":"b"}', current.fence, "b")
    assert after.run_count == before.run_count


@pytest.mark.parametrize(
    "change",
    [
        lambda lease: replace(lease, fence=lease.fence + 1),
        lambda lease: replace(lease, fence=lease.fence - 1),
        lambda lease: replace(lease, holder="b"),
        lambda lease: replace(lease, key="j"),
    ],
    ids=["larger fence", "smaller fence", "holder", "key"],
)
def test_fence_holder_and_key_must_all_match(
    store: SqlStore, change: Callable[[Lease], Lease]
) -> None:
    wrong = change(acquire(store, "a").lease)
    assert store.save(wrong, write(NEW)) is None
    assert store.written(wrong, 1) is None
    assert store.release(wrong, DONE) is None
    assert store.renew([wrong]) == {}


def test_release_is_done_once(store: SqlStore) -> None:
    lease = acquire(store).lease
    assert store.release(lease, DONE) == FREED
    assert store.release(lease, DONE) is None
    assert store.save(lease, write(NEW)) is None
    assert store.renew([lease]) == {}


@pytest.mark.parametrize("new", [None, NEW], ids=["", "with a value"])
def test_a_lease_is_not_acquired_in_its_hold_period(store: SqlStore, new: NewValue | None) -> None:
    acquired = acquire(store, "a")
    assert store.release(acquired.lease, WITH_HOLD_PERIOD, write(new) if new else None) == FREED
    assert store.acquire("k", "b", LONG, None) is None
    row = peek(store)
    assert (row.held, row.in_hold_period, row.holder, row.task_id) == (True, True, None, None)
    assert (row.run_count, row.last_outcome) == (1, "succeeded")
    assert row.value == (new.value if new else "null")
    assert row.expires_in is not None
    ends_at = row.read_at + row.expires_in
    assert ends_at == pytest.approx(acquired.acquired_at + LONG, abs=STALL)


def test_a_lease_is_free_after_its_hold_period(leases: Leases) -> None:
    first = acquire(leases, "a")
    leases.release(first.lease, Ended("succeeded", "[]", hold=HOLD))
    second = wait_until(lambda: leases.acquire("k", "b", LONG, None), "the hold period ends")
    assert second.lease.fence > first.lease.fence
    assert second.write == 0, "the run released its lease"
    assert second.acquired_at - first.acquired_at >= HOLD - ROUNDING
    row = peek(leases)
    assert (row.held, row.in_hold_period, row.holder) == (True, False, "b")


def test_a_run_longer_than_its_hold_period_leaves_the_row_free(leases: Leases) -> None:
    """The hold period counts from the acquisition. It has ended already when a longer run
    releases.
    """
    acquired = acquire(leases, "a")
    wait_until(
        lambda: peek(leases).read_at - acquired.acquired_at > HOLD, "the run takes longer than HOLD"
    )
    assert leases.release(acquired.lease, Ended("succeeded", "[]", hold=HOLD)) == FREED
    row = peek(leases)
    assert (row.held, row.in_hold_period, row.holder, row.task_id) == (False, False, None, None)
    assert acquire(leases, "b").lease.fence > acquired.lease.fence


def test_a_row_has_the_times_of_acquisition_and_of_reading(leases: Leases) -> None:
    """Both times come from the store's clock, which in the tests is the clock of the test's
    machine.
    """
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


def test_renew_extends_each_lease_by_its_own_life(leases: Leases) -> None:
    held = [acquire(leases, "a", BRIEF, key).lease for key in ("k1", "k2", "k3")]
    longer = [replace(each, ttl=LONG * n) for n, each in enumerate(held[:2], 1)]
    others = replace(held[2], holder="b", ttl=LONG)
    assert leases.renew([*longer, others]) == {"k1": None, "k2": None}
    lives = [row.expires_in or 0 for row in leases.list("k")]
    assert BRIEF < lives[0] <= LONG + ROUNDING < lives[1] <= 2 * LONG + ROUNDING
    assert lives[2] <= BRIEF + ROUNDING


def test_renew_of_nothing(leases: Leases) -> None:
    assert leases.renew([]) == {}


def test_renew_does_not_change_the_state(store: SqlStore) -> None:
    lease = acquire(store).lease
    store.save(lease, write(NEW))
    before = peek(store)
    store.renew([lease])
    after = peek(store)
    assert (after.value, after.updated_at) == (before.value, before.updated_at)
    assert after.write == before.write


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
    store.release(acquire(store).lease, DONE, write(NewValue(value, 1)))
    assert acquire(store, "b").value == value


def test_one_of_many_threads_acquires(leases: Leases) -> None:
    """All threads ask for a free lease at once. One thread gets the lease, and releases it; then
    all threads ask again, and again one thread gets the lease.
    """
    barrier = threading.Barrier(8)

    def ask(n: int) -> Acquired | None:
        barrier.wait()
        return leases.acquire("k", f"h{n}", LONG, None)

    with ThreadPoolExecutor(8) as pool:
        fences = [0]
        for _ in range(5):
            (winner,) = (found for found in pool.map(ask, range(8)) if found)
            fences.append(winner.lease.fence)
            leases.release(winner.lease, DONE)
        assert fences == sorted(set(fences))


def test_a_transaction_commits_rows_and_state(store: SqlStore) -> None:
    lease = acquire(store).lease
    with store.transaction() as transaction:
        transaction.connection.exec_driver_sql("CREATE TABLE written (n integer)")
        transaction.connection.exec_driver_sql("INSERT INTO written VALUES (7)")
        assert transaction.save(lease, write(NewValue('{"n":7}', 1))) is not None
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
            transaction.save(lease, write(NewValue('{"n":7}', 1)))
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    with store.transaction() as transaction:
        count = transaction.connection.exec_driver_sql("SELECT count(*) FROM written").scalar()
    row = peek(store)
    assert (count, row.value, row.write) == (0, "null", 0)


def test_a_stale_holders_save_in_a_transaction_is_refused(store: SqlStore) -> None:
    stale = acquire(store, "a", BRIEF).lease
    let_expire(store)
    acquire(store, "b")
    with store.transaction() as transaction:
        assert transaction.save(stale, write(NEW)) is None


def test_written_finds_a_transactions_save_by_its_number(store: SqlStore) -> None:
    """This also works after an earlier transaction, with another number, was rolled back."""
    lease = acquire(store).lease

    def save_and_fail() -> None:
        with store.transaction() as transaction:
            assert transaction.save(lease, write(NEW, 1))
            raise LookupError

    with pytest.raises(LookupError):
        save_and_fail()
    assert store.written(lease, 1) is False
    with store.transaction() as transaction:
        assert transaction.save(lease, write(NEWER, 2, seen=0)) == Saved(handoff_to=None)
    assert store.written(lease, 2) is True
    assert (peek(store).value, peek(store).write) == (NEWER.value, 2)


def test_check_accepts_the_table(leases: Leases) -> None:
    leases.check()


def test_a_former_holder_cannot_change_a_hold_period(store: SqlStore) -> None:
    """A's release took effect, but its answer was lost. The repeated release must not end the hold
    period, and a renewal that was in flight must not extend it.
    """
    lease = acquire(store, "a").lease
    store.release(lease, WITH_HOLD_PERIOD)
    before = peek(store)
    assert store.release(lease, DONE) is None
    assert store.save(lease, write(NEW)) is None
    assert store.renew([lease]) == {}
    assert store.written(lease, 1) is None
    assert store.acquire(lease.key, lease.holder, 60, None) is None
    after = peek(store)
    assert (after.in_hold_period, after.run_count, after.value) == (True, 1, before.value)
