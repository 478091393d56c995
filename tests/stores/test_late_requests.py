"""Requests that are carried out late, on every store: the interleavings of the lease's protocol.

A store carries out a request as soon as the test sends it. So the test sends a late request after
the requests that overtook it. tests/spec/INTERLEAVINGS.md shows what harm each interleaving did
under the former protocol.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import (
    TAKEN_OVER,
    Acquired,
    Ended,
    Leases,
    NewValue,
    Queued,
    Released,
    Row,
    Store,
    Write,
)
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.stores import url_on
from tests.helpers.waiting import wait_until

LONG, FIRST, BRIEF = 600.0, 8.0, 0.2
DONE = Ended("succeeded", "[]")
HOUR = 3_600_000


def acquire(store: Leases, holder: str = "a", ttl: float = LONG, task: str = "m") -> Acquired:
    acquired = store.acquire("k", holder, ttl, task)
    assert acquired is not None
    return acquired


def peek(store: Leases) -> Row:
    row = store.peek("k")
    assert row is not None
    return row


def let_expire(store: Leases) -> None:
    """Wait until the lease has expired by the store's own clock."""
    wait_until(lambda: not peek(store).held, "the lease expires")


def write(number: int, seen: int) -> Write:
    """Return write ``number`` of a run. The value that it stores differs from that of any other
    write.
    """
    return Write(number, seen, NewValue(f'{{"write":{number}}}', 1))


def value(number: int) -> str:
    """Return the value that write ``number`` of a run stores."""
    return write(number, 0).new.value


# -- writes


def test_a_late_save_does_not_overwrite_a_newer_one(store: SqlStore) -> None:
    """Save 1 stalls; the run repeats it, and is answered; save 2 is answered; then the first copy
    of save 1 is carried out.
    """
    lease = acquire(store).lease
    assert store.save(lease, write(1, seen=0))
    assert store.save(lease, write(2, seen=1))
    before = peek(store)
    assert store.save(lease, write(1, seen=0)) is None
    after = peek(store)
    assert (after.value, after.write) == (value(2), 2)
    assert after.updated_at == before.updated_at


def test_a_late_save_does_not_overwrite_a_transaction(store: SqlStore) -> None:
    """Save 1 stalls and is given up; a transaction with write 2 commits; then save 1 is carried
    out.
    """
    lease = acquire(store).lease
    with store.transaction() as transaction:
        assert transaction.save(lease, write(2, seen=0))
    assert store.save(lease, write(1, seen=0)) is None
    assert peek(store).value == value(2)


def test_a_late_release_does_not_save_over_a_newer_write(store: SqlStore) -> None:
    """A release with a state names the writes that it has seen, like every write. The store refuses
    a release whose number is behind the row's, and the run keeps the lease.
    """
    lease = acquire(store).lease
    assert store.save(lease, write(2, seen=0))
    assert store.release(lease, DONE, write(1, seen=0)) is None
    row = peek(store)
    assert (row.value, row.holder, row.run_count) == (value(2), "a", 0)


def test_a_late_save_after_the_end_of_its_run_is_refused(store: SqlStore) -> None:
    """Save 1 stalls, and the run gives it up; the run saves and releases. Save 1 is carried out
    while the row is free, and once more when the next run has the lease.
    """
    lease = acquire(store).lease
    assert store.release(lease, DONE, write(2, seen=0))
    assert store.save(lease, write(1, seen=0)) is None
    acquire(store, "b")
    assert store.save(lease, write(1, seen=0)) is None
    assert peek(store).value == value(2)


def test_a_repeated_write_succeeds_and_counts_once(store: SqlStore) -> None:
    """Each write is carried out, and its answer is lost. Its repetition succeeds. The repetition of
    a release is refused, because the lease is free.
    """
    lease = acquire(store).lease
    for _ in range(2):
        assert store.save(lease, write(1, seen=0))
    for _ in range(2):
        with store.transaction() as transaction:
            assert transaction.save(lease, write(2, seen=1))
    assert store.release(lease, DONE, write(3, seen=2))
    assert store.release(lease, DONE, write(3, seen=2)) is None
    row = peek(store)
    assert (row.value, row.write, row.run_count) == (value(3), 3, 1)


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_write_succeeds_after_a_write_with_an_unknown_outcome(
    store: SqlStore, carried_out: bool
) -> None:
    """Save 1 is carried out or not; the run gets no answer, and continues. Save 2 must succeed in
    both cases: if it needed save 1, a healthy run would be lost.
    """
    lease = acquire(store).lease
    if carried_out:
        assert store.save(lease, write(1, seen=0))
    assert store.save(lease, write(2, seen=0))
    assert peek(store).value == value(2)


def test_a_write_is_refused_if_the_database_lost_the_write_before(store: SqlStore) -> None:
    """Write 2 is answered; a fail-over loses it, and the row's number is 1 again. Write 3 would
    store a state that counts the lost write as done.
    """
    lease = acquire(store).lease
    assert store.save(lease, write(1, seen=0))
    for lost in (
        store.save(lease, write(3, seen=2)),
        store.release(lease, DONE, write(3, seen=2)),
    ):
        assert lost is None
    with store.transaction() as transaction:
        assert transaction.save(lease, write(3, seen=2)) is None
    assert peek(store).value == value(1)
    # A release without a state is accepted: it overwrites nothing.
    assert store.release(lease, Ended("failed", "[]"))


def test_the_first_number_tells_a_takeover_from_a_handoff(leases: Leases) -> None:
    """The write number that acquire answers is 0 in a new row and after an orderly handoff. It is
    -1 if the last holder let its lease expire. It is 0 after a hold period, because the last holder
    had released the lease.
    """
    first = acquire(leases, "a")
    assert (first.write, peek(leases).write) == (0, 0)
    leases.release(first.lease, DONE)
    second = acquire(leases, "b", BRIEF)
    assert (second.write, peek(leases).write) == (0, 0)
    let_expire(leases)
    third = acquire(leases, "c")
    assert (third.write, peek(leases).write) == (TAKEN_OVER, TAKEN_OVER)
    leases.release(third.lease, Ended("succeeded", "[]", hold=BRIEF))
    fourth = wait_until(lambda: leases.acquire("k", "d", LONG, None), "the hold period ends")
    assert fourth.write == 0


def test_a_run_that_took_over_an_expired_lease_can_write(store: SqlStore) -> None:
    """The run's first write names -1 as seen, which is the number that acquire answered."""
    acquire(store, "a", BRIEF)
    let_expire(store)
    second = acquire(store, "b")
    assert store.save(second.lease, write(1, seen=0)) is None
    assert store.save(second.lease, write(1, seen=second.write))
    assert store.release(second.lease, DONE, write(2, seen=1))


# -- a COMMIT whose outcome is unknown


def test_written_tells_whether_a_write_was_carried_out(store: SqlStore) -> None:
    lease = acquire(store).lease
    assert store.written(lease, 1) is False
    with store.transaction() as transaction:
        transaction.save(lease, write(1, seen=0))
    assert store.written(lease, 1) is True
    assert store.written(lease, 2) is False
    assert store.written(replace(lease, fence=lease.fence + 1), 1) is None
    assert store.written(replace(lease, holder="b"), 1) is None
    assert store.written(replace(lease, key="other"), 1) is None
    store.release(lease, DONE)
    assert store.written(lease, 1) is None


@pytest.fixture(params=["postgresql", "pgbouncer", "mariadb"])
def server_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlStore]:
    """Open a store whose database has row locks."""
    url = url_on(request.param, request, tmp_path)
    opened = open_store(url, "kv_store", io_timeout=10.0, pool_size=4, auto_migrate=True)
    yield opened
    opened.close()


@pytest.mark.parametrize("commits", [True, False])
def test_written_waits_for_the_outcome_of_a_transaction(
    server_store: SqlStore, commits: bool
) -> None:
    """The transaction's save was carried out; its COMMIT is not carried out yet; the run asks
    whether the save took effect. If the question did not wait for the row's lock, the answer would
    be no, the run would continue, and then the COMMIT would be carried out.
    """
    store = server_store
    lease = acquire(store).lease
    asked = threading.Event()

    def ask() -> bool | None:
        asked.set()
        return store.written(lease, 1)

    class RolledBack(Exception):
        """An error that ends the transaction without a COMMIT."""

    with ThreadPoolExecutor(1) as pool:
        answer: Any = None
        try:
            with store.transaction() as transaction:
                transaction.save(lease, write(1, seen=0))
                answer = pool.submit(ask)
                asked.wait()
                wait_until(lambda: waiting_statements(store), "the question waits for the lock")
                assert not answer.done()
                if not commits:
                    raise RolledBack
        except RolledBack:
            pass
        assert answer.result() is commits


def waiting_statements(store: SqlStore) -> int:
    """Return how many statements wait for a lock, as the server reports it."""
    if store.engine.dialect.name == "postgresql":
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    else:
        # MariaDB refreshes this table only ten times a second, so the number can be a little late.
        query = "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
    return int(store._rows(query, {})[0][0])


# -- acquire, and leases that no process knows of


def test_a_repeated_acquire_keeps_the_handoff_request(leases: Leases) -> None:
    """Acquire is carried out, and its answer is lost; another message asks the holder to hand over;
    the holder repeats acquire. The row must keep the handoff request.
    """
    lease = acquire(leases).lease
    assert leases.requests.request_handoff(peek(leases), "b")
    assert acquire(leases).lease == lease
    assert leases.renew([lease]) == {"k": "b"}


def test_a_repeated_acquire_never_shortens_the_lease(leases: Leases) -> None:
    """An acquire for the first life stalls; its copy is answered; the run confirms for its long
    life; the first copy is carried out. If this copy set the first life again, the lease would
    expire early, and a second body would begin while the first still trusts its lease.
    """
    lease = replace(acquire(leases, ttl=FIRST).lease, ttl=LONG)
    assert leases.renew([lease])
    acquire(leases, ttl=FIRST)
    expires_in = peek(leases).expires_in
    assert expires_in is not None
    assert expires_in > LONG / 2


def test_a_repeated_acquire_keeps_number_and_time(store: SqlStore) -> None:
    """An acquire stalls; its copy is answered; saves 1 and 2 are answered; the first copy of the
    acquire is carried out, and then a late copy of save 1. If the write number were 0 again, the
    late save would be accepted, and the run's next save would be refused.
    """
    first = acquire(store)
    store.save(first.lease, write(1, seen=0))
    store.save(first.lease, write(2, seen=1))
    before = peek(store)
    again = acquire(store)
    assert (again.lease, again.acquired_at, again.write) == (first.lease, first.acquired_at, 2)
    after = peek(store)
    assert (after.write, after.acquired_at) == (before.write, before.acquired_at)
    assert store.save(first.lease, write(1, seen=0)) is None
    assert store.save(first.lease, write(3, seen=2))


def test_a_late_acquire_holds_for_the_first_life_at_most(leases: Leases) -> None:
    """An acquire stalls; its copy is answered; the run confirms, ends and releases; the first copy
    of the acquire is carried out. This copy takes the free lease for a run that has ended. The late
    copy of the confirmation names an older fence, and must not extend this lease.
    """
    lease = replace(acquire(leases, ttl=FIRST).lease, ttl=LONG)
    assert leases.renew([lease])
    assert leases.release(lease, DONE)
    late = acquire(leases, ttl=FIRST)
    assert late.lease.fence > lease.fence
    assert leases.renew([lease]) == {}
    expires_in = peek(leases).expires_in
    assert expires_in is not None
    assert expires_in <= FIRST + 0.01


def test_a_lease_is_given_back_by_the_holders_name_alone(leases: Leases) -> None:
    """Both answers to acquire are lost, so the holder knows no fence. It repeats ``give_back``
    until the store answers. A late copy of this request must not free the next holder's lease.
    """
    acquire(leases, "a")
    assert leases.requests.request_run(peek(leases), "{}")
    before = peek(leases)
    assert leases.give_back("k", "b") is None
    assert leases.give_back("k", "a") == Released(wanted="{}")
    row = peek(leases)
    assert (row.holder, row.task_id, row.expires_in, row.acquired_at) == (None,) * 4
    # Giving back the lease without a run does not count as the end of a run.
    assert (row.run_count, row.history, row.fence) == (0, None, before.fence)
    assert leases.give_back("k", "a") is None
    acquire(leases, "b")
    assert leases.give_back("k", "a") is None
    assert peek(leases).holder == "b"
    assert leases.give_back("nothing", "a") is None


def test_give_back_does_not_end_a_hold_period(leases: Leases) -> None:
    """A release with a hold period is carried out, and its answer is lost. The process then gives
    back the lease that it may still hold.
    """
    leases.release(acquire(leases).lease, Ended("succeeded", "[]", hold=LONG))
    assert leases.give_back("k", "a") is None
    assert peek(leases).in_hold_period


def test_a_late_renewal_does_not_extend_another_runs_lease(leases: Leases) -> None:
    """A parent renews the lease of a child whose run has ended. By now the lease is free, or
    another run has it.
    """
    lease = acquire(leases, "a").lease
    leases.release(lease, DONE)
    assert leases.renew([lease]) == {}
    acquire(leases, "b", FIRST)
    assert leases.renew([lease]) == {}
    expires_in = peek(leases).expires_in
    assert expires_in is not None
    assert expires_in <= FIRST + 0.01


def test_an_operators_release_is_not_taken_for_the_runs_own(leases: Leases) -> None:
    """The run's release stalls; an operator releases the lease, which leaves a history entry with
    the run's fence and holder; the run repeats its release, and is refused. This entry has another
    outcome than the run, so the run must not conclude that its own release took effect.
    """
    lease = acquire(leases).lease
    assert leases.release(lease, Ended("lost", '["lost"]'))
    assert leases.release(lease, Ended("succeeded", '["succeeded"]')) is None
    row = peek(leases)
    assert (row.history, row.last_outcome, row.run_count) == ('["lost"]', "lost", 1)


# -- fences


def clock() -> int:
    """Return the time in milliseconds since 1970, by this machine's clock, which the servers use,
    too.
    """
    return int(time.time() * 1000)


def set_fence(store: Any, fence: int) -> None:
    """Set the row's fence, as if the store's clock had been ahead or behind when the fence was
    given.
    """
    if isinstance(store, SqlStore):
        store._change(f"UPDATE {store.table.fullname} SET fence = {fence}", {})
    else:
        with store._scripts._make_client() as client:
            client.hset("k", "fence", fence)


def test_a_fence_is_the_stores_clock(leases: Leases) -> None:
    before = clock()
    fence = acquire(leases).lease.fence
    assert before - 2 <= fence <= clock() + 2


def test_a_fence_is_not_given_twice_after_the_row_was_removed(leases: Leases) -> None:
    """A run writes to another system with its fence, and ends. Its row is removed: pruned, or lost
    with a wiped Redis. The new row must get another fence, so that late requests of that run stay
    harmless.
    """
    first = acquire(leases).lease
    leases.release(first, DONE)
    wait_until(lambda: clock() > first.fence + 2, "the clock moves on")
    assert leases.prune(["k"], 0.0) == ["k"]
    second = acquire(leases, "b").lease
    assert second.fence > first.fence
    assert leases.renew([first]) == {}


def test_a_fence_is_not_given_twice_after_an_older_row_came_back(leases: Leases) -> None:
    """A fail-over loses commits, or a backup is restored: the row has an older fence than the last
    one that was given. The next fence must not be the row's fence + 1.
    """
    first = acquire(leases).lease
    leases.release(first, DONE)
    wait_until(lambda: clock() > first.fence + 2, "the clock moves on")
    set_fence(leases, first.fence - HOUR)
    assert acquire(leases, "b").lease.fence > first.fence


def test_a_fence_grows_by_one_after_the_clock_was_set_back(leases: Leases) -> None:
    """The row's fence is an hour ahead of the clock, so the next fence is the row's fence + 1."""
    leases.release(acquire(leases).lease, DONE)
    ahead = clock() + HOUR
    set_fence(leases, ahead)
    for number in (1, 2):
        lease = acquire(leases, f"b{number}").lease
        assert lease.fence == ahead + number
        leases.release(lease, DONE)


# -- enqueue_once and pending runs


def claim(leases: Leases, task_id: str, number: int) -> bool:
    return leases.requests.claim("k", task_id, LONG, number)


def test_a_late_claim_does_not_count_a_finished_message_as_queued(leases: Leases) -> None:
    """A sender's claim of the queue stalls; its copy is answered; the message is sent, runs and
    ends; the first copy of the claim is carried out.
    """
    number = leases.requests.queued("k").number
    assert claim(leases, "m", number)
    assert claim(leases, "m", number), "repeated while it counts"
    assert leases.requests.queued("k").task_id == "m"
    lease = acquire(leases, task="m").lease
    assert not claim(leases, "m", number)
    leases.release(lease, DONE)
    assert not claim(leases, "m", number)
    assert leases.requests.queued("k").task_id is None


@pytest.mark.parametrize("known", [True, False], ids=["known", "a new singleton"])
def test_a_late_claim_of_a_message_that_was_dequeued_is_refused(
    leases: Leases, known: bool
) -> None:
    """A claim stalls, and its sender gives it up; the message is sent without a claim; it is
    revoked, and its worker dequeues it; the claim is carried out. This also holds for a singleton
    that has never run.
    """
    if known:
        leases.release(acquire(leases).lease, DONE)
    number = leases.requests.queued("k").number
    leases.requests.dequeue("k", "m")
    assert not claim(leases, "m", number)
    assert leases.requests.queued("k").task_id is None


def test_one_of_two_claims_is_accepted(leases: Leases) -> None:
    """Two senders see that no message is queued, and both claim."""
    number = leases.requests.queued("k").number
    assert claim(leases, "m1", number)
    assert not claim(leases, "m2", number)
    assert leases.requests.queued("k") == Queued(number + 1, "m1")


def test_dequeue_leaves_another_message_queued(leases: Leases) -> None:
    assert claim(leases, "m1", leases.requests.queued("k").number)
    leases.requests.dequeue("k", "m2")
    assert leases.requests.queued("k").task_id == "m1"
    leases.requests.dequeue("k", "m1")
    assert leases.requests.queued("k").task_id is None


def test_a_direct_call_leaves_the_queued_message(leases: Leases) -> None:
    """An acquisition removes only the acquiring message from the queue, and a direct call has no
    message.
    """
    assert claim(leases, "m1", leases.requests.queued("k").number)
    leases.release(acquire(leases, task="direct").lease, DONE)
    assert leases.requests.queued("k").task_id == "m1"


def test_a_late_pending_run_does_not_replace_a_newer_one(leases: Leases) -> None:
    """A's request for a pending run stalls, and A gives it up, because its message is retried; B's
    pending run is recorded; then A's request is carried out while the same holder runs.
    """
    acquire(leases)
    row = peek(leases)
    assert leases.requests.request_run(row, "newer")
    assert not leases.requests.request_run(row, "older")
    assert leases.requests.wanted("k") == "newer"
    assert leases.requests.request_run(peek(leases), "newest")
    assert peek(leases).wanted == "newest"


def test_only_the_pending_run_that_was_sent_is_removed(leases: Leases) -> None:
    """A run sends the pending run; its request to remove this pending run stalls; a newer pending
    run is recorded; then the request is carried out.
    """
    acquire(leases)
    assert leases.requests.request_run(peek(leases), "older")
    assert leases.requests.request_run(peek(leases), "newer")
    leases.requests.pending_run_sent("k", "older")
    assert leases.requests.wanted("k") == "newer"
    leases.requests.pending_run_sent("k", "newer")
    assert leases.requests.wanted("k") is None


# -- the leader of a schedule, and operators


def test_a_late_record_does_not_overwrite_newer_times(store: Store) -> None:
    """The leader's first record stalls; its second record is answered; then the first record is
    carried out. The leader removes an entry; then the second record is carried out again.
    """
    leader = acquire(store).lease
    entries = store.entries
    assert entries.record(leader, {"e:a": "2", "e:b": "2"}, number=2, seen=0)
    assert entries.record(leader, {"e:a": "1"}, number=1, seen=0) is None
    assert entries.load("e:") == {"e:a": "2", "e:b": "2"}
    assert entries.record(leader, {"e:a": "2"}, number=2, seen=0), "repeated"
    assert entries.forget(leader, ["e:b"], number=3, seen=2)
    assert entries.record(leader, {"e:b": "2"}, number=2, seen=0) is None
    assert not entries.forget(leader, ["e:a"], number=2, seen=0)
    assert entries.load("e:") == {"e:a": "2"}
    assert peek(store).write == 3


def test_a_record_is_refused_if_the_database_lost_the_record_before(store: Store) -> None:
    leader = acquire(store).lease
    assert store.entries.record(leader, {"e:a": "1"}, number=1, seen=0)
    assert store.entries.record(leader, {"e:a": "3"}, number=3, seen=2) is None
    assert not store.entries.forget(leader, ["e:a"], number=3, seen=2)
    assert store.entries.load("e:") == {"e:a": "1"}


def test_a_leader_that_took_over_an_expired_lease_can_record(store: Store) -> None:
    acquire(store, "a", BRIEF)
    let_expire(store)
    leader = acquire(store, "b")
    assert store.entries.record(leader.lease, {}, number=1, seen=leader.write)


NEW, NEWER = NewValue('{"put":1}', 1), NewValue('{"put":2}', 1)


def test_a_late_put_does_not_overwrite_a_newer_state(store: Store) -> None:
    """An operator's put stalls; a run saves, or another operator puts a state; then the first put
    is carried out.
    """
    store.release(acquire(store).lease, DONE)
    row = peek(store)
    assert store.requests.put("k", row, NEWER)
    assert not store.requests.put("k", row, NEW)
    row = peek(store)
    store.release(acquire(store, "b").lease, DONE, write(1, seen=0))
    assert not store.requests.put("k", row, NEW)
    assert peek(store).value == value(1)


def test_a_late_put_of_a_new_singleton_is_refused(store: Store) -> None:
    """The operator saw no row. Before the put is carried out, a run or another operator makes the
    row.
    """
    assert store.requests.put("k", None, NEWER)
    assert not store.requests.put("k", None, NEW)
    store.release(acquire(store).lease, DONE)
    assert not store.requests.put("k", None, NEW)
    assert peek(store).value == NEWER.value


def test_put_leaves_a_running_singleton_alone(store: Store) -> None:
    """A put is refused while a run has the lease, even if it has expired, because the run may still
    write.
    """
    acquire(store, "a", BRIEF)
    assert not store.requests.put("k", peek(store), NEW)
    let_expire(store)
    assert not store.requests.put("k", peek(store), NEW)
    assert peek(store).value == "null"


def test_a_row_of_an_older_release_can_be_acquired(store: SqlStore) -> None:
    """A row from an older release of the package has no numbers: ``write`` and ``queue`` are
    null.
    """
    store.release(acquire(store).lease, DONE)
    store._change(f"UPDATE {store.table.fullname} SET {store._sql.write} = NULL, queue = NULL", {})
    assert peek(store).write == 0
    assert claim(store, "m", store.requests.queued("k").number)
    assert store.requests.put("k", peek(store), NEW)
    acquired = acquire(store, "b")
    assert store.save(acquired.lease, write(1, acquired.write))


def test_a_put_that_found_no_row_does_not_overwrite_a_new_run(mariadb_url: str) -> None:
    """A put finds no row, and so locks none; a run acquires the lease, which makes the row; the put
    writes. It must be refused.
    """
    store = open_store(mariadb_url, "kv_store", 10.0, auto_migrate=True)
    gate, url = "DO GET_LOCK('gate', 10);\nINSERT", sa.make_url(mariadb_url)
    assert store._sql.put.count("INSERT") == 1
    store._sql.put = store._sql.put.replace("INSERT", gate)
    other = pymysql.connect(host=url.host, port=url.port, user=url.username, database=url.database)
    with closing(other), other.cursor() as cursor, ThreadPoolExecutor(1) as pool:
        cursor.execute("SELECT GET_LOCK('gate', 10)")
        putting = pool.submit(store.requests.put, "k", None, NewValue('{"n":9}', 1))
        waiting = "SELECT count(*) FROM information_schema.processlist WHERE state = 'User lock'"

        def is_at_the_gate() -> bool:
            cursor.execute(waiting)
            return cursor.fetchone() == (1,)

        wait_until(is_at_the_gate, "the put has read the row")
        acquired = store.acquire("k", "a", 60.0, None)
        cursor.execute("SELECT RELEASE_LOCK('gate')")
        assert not putting.result(30)
    assert acquired is not None
    row = store.peek("k")
    assert row is not None
    assert (row.value, row.write, row.holder) == ("null", 0, "a")
    store.close()
