"""Requests to a row that do not come from its holder, on all stores.

They are handoff requests, requests for pending runs, and claims of the queue.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from celery_singleton_state.store.base import Ended, Lease, Leases, NewValue, Queued, Released, Row
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.rows import (
    BRIEF,
    DONE,
    FREED,
    LONG,
    ROUNDING,
    STALL,
    WITH_HOLD_PERIOD,
    acquire,
    let_expire,
    peek,
)
from tests.helpers.waiting import wait_until
from tests.helpers.writes import enqueue, write

NEW = NewValue('{"n":1}', 1)


def peek_later(store: Leases) -> Row:
    """Return the row as it is, and wait until the store's clock has advanced, so that no later
    write gets the same times.
    """
    before = peek(store)
    wait_until(
        lambda: peek(store).read_at - before.read_at > ROUNDING, "the store's clock advances"
    )
    return before


# -- requests to a holder that has ended


def released(store: Leases) -> Row:
    """Let A acquire and release; return the row as it was while A held it."""
    lease = acquire(store, "a").lease
    seen = peek(store)
    store.release(lease, DONE)
    return seen


def expired(store: Leases) -> Row:
    acquire(store, "a", BRIEF)
    seen = peek(store)
    let_expire(store)
    return seen


def taken_over(store: Leases) -> Row:
    seen = expired(store)
    acquire(store, "b")
    return seen


def in_hold_period(store: Leases) -> Row:
    lease = acquire(store, "a").lease
    seen = peek(store)
    store.release(lease, WITH_HOLD_PERIOD)
    return seen


@pytest.mark.parametrize("verb", ["request_handoff", "request_run"])
@pytest.mark.parametrize("gone", [released, expired, taken_over, in_hold_period])
def test_a_request_to_a_former_holder_is_refused(
    leases: Leases, gone: Callable[[SqlStore], Row], verb: str
) -> None:
    """C finds the lease held by A; A releases, or dies and B takes over; C sends its request by the
    row that it saw, and must learn that the request was refused.
    """
    assert getattr(leases.requests, verb)(gone(leases), "c") is False


def test_a_request_to_the_predecessor_does_not_reach_the_successor(leases: Leases) -> None:
    """C finds the lease held by A; A releases; B acquires; C sends its request by the row that it
    saw. C's request must not affect B.
    """
    seen = released(leases)
    successor = acquire(leases, "b").lease
    assert not leases.requests.request_handoff(seen, "c")
    assert not leases.requests.request_run(seen, "w")
    assert leases.renew([successor]) == {"k": None}
    assert leases.release(successor, DONE) == FREED


# -- requests in a hold period, when there is no holder


def test_the_newest_message_is_next_after_a_hold_period(leases: Leases) -> None:
    """In the hold period after A's run first B and then C ask for the lease. B is the older
    message: it must not get the lease when it is free, and a late request of B's must not overtake
    C's.
    """
    leases.release(acquire(leases, "a").lease, WITH_HOLD_PERIOD)
    seen = peek(leases)
    assert seen.in_hold_period
    assert leases.requests.request_handoff(seen, "b", seen.next_rank)
    newest = peek(leases).next_rank
    assert leases.requests.request_handoff(seen, "c", newest)
    assert not leases.requests.request_handoff(seen, "b", seen.next_rank)
    assert (peek(leases).handoff_to, peek(leases).holder) == ("c", None)
    assert leases.acquire("k", "b", LONG, None, seen.next_rank) is None
    assert leases.requests.release_early(peek(leases))
    assert leases.acquire("k", "b", LONG, None, seen.next_rank) is None
    acquired = leases.acquire("k", "c", LONG, None, newest)
    assert acquired is not None
    assert leases.renew([acquired.lease]) == {"k": None}, "c is not asked to hand over to itself"


def test_only_the_hold_period_that_was_seen_is_ended(leases: Leases) -> None:
    """An operator sees the hold period after A's run; this hold period ends; B runs, and another
    one begins; the operator's request must not end the new hold period.
    """
    leases.release(acquire(leases, "a").lease, WITH_HOLD_PERIOD)
    seen = peek(leases)
    assert leases.requests.release_early(seen)
    running = acquire(leases, "b")
    assert not leases.requests.release_early(seen)
    leases.release(running.lease, WITH_HOLD_PERIOD)
    assert not leases.requests.release_early(seen)
    assert peek(leases).in_hold_period


# -- request_handoff


def test_the_holder_learns_which_message_asks_for_a_handoff(store: SqlStore) -> None:
    """Each answer to the holder until its release names the message, because any answer may be
    lost.
    """
    lease = acquire(store, "a").lease
    assert store.requests.request_handoff(peek(store), "b") is True
    assert store.renew([lease]) == {"k": "b"}
    saved = store.save(lease, write(NEW))
    assert saved is not None
    assert saved.handoff_to == "b"
    with store.transaction() as transaction:
        committed = transaction.save(lease, write(NEW, 2))
    assert committed is not None
    assert committed.handoff_to == "b"


def test_a_renewal_of_many_leases_answers_handoffs_of_each(leases: Leases) -> None:
    held = [acquire(leases, "a", LONG, key).lease for key in ("k1", "k2")]
    leases.requests.request_handoff(peek(leases, "k2"), "b")
    assert leases.renew(held) == {"k1": None, "k2": "b"}


def test_a_handoff_request_changes_nothing_else(leases: Leases) -> None:
    acquire(leases, "a")
    before = peek_later(leases)
    leases.requests.request_handoff(before, "b", before.next_rank, "sent")
    leases.requests.request_run(before, "w")
    after = peek(leases)
    assert (after.wanted, after.handoff_to, after.newest_sent) == ("w", "b", "sent")
    assert (before.newest, after.newest, after.rank) == (0, before.next_rank, before.next_rank)
    times = {"read_at": before.read_at, "expires_in": before.expires_in}
    asked = {"wanted": None, "handoff_to": None, "newest": 0, "newest_sent": before.newest_sent}
    assert replace(after, **asked, **times) == before


def test_the_next_holder_is_not_asked_to_hand_over(leases: Leases) -> None:
    """A is asked to hand over, and releases. The next holder, which may be the message that asked,
    must not find the request in the row.
    """
    lease = acquire(leases, "a").lease
    leases.requests.request_handoff(peek(leases), "b")
    leases.release(lease, DONE)
    assert leases.renew([acquire(leases, "b").lease]) == {"k": None}


# -- which message is the newest


def test_a_late_older_message_does_not_stop_the_holder(leases: Leases) -> None:
    """B and C find the lease held by A; C's handoff request is answered; then B's request, which
    stalled, is carried out.
    """
    lease = acquire(leases, "a").lease
    seen_by_b = peek(leases)
    assert leases.requests.request_handoff(peek(leases), "c", seen_by_b.next_rank + 5, "sent c")
    assert not leases.requests.request_handoff(seen_by_b, "b", seen_by_b.next_rank, "sent b")
    assert leases.renew([lease]) == {"k": "c"}
    row = peek(leases)
    assert (row.handoff_to, row.newest_sent) == ("c", "sent c")


def test_two_messages_do_not_get_the_same_rank(leases: Leases) -> None:
    """Both messages saw the same row, and so ask with the same rank. The store accepts only the
    first message, which may repeat its request, because its answer may have been lost.
    """
    acquire(leases, "a")
    seen = peek(leases)
    rank = seen.next_rank
    assert leases.requests.request_handoff(seen, "b", rank)
    assert not leases.requests.request_handoff(seen, "c", rank)
    assert leases.requests.request_handoff(seen, "b", rank)
    assert peek(leases).handoff_to == "b"


def test_of_two_messages_that_asked_the_newer_gets_the_lease(leases: Leases) -> None:
    """First B and then C ask A to hand over; A's run ends; B tries to acquire before C."""
    lease = acquire(leases, "a").lease
    ranks = []
    for who in ("b", "c"):
        ranks.append(peek(leases).next_rank)
        assert leases.requests.request_handoff(peek(leases), who, ranks[-1])
    leases.release(lease, DONE)
    older, newer = ranks
    assert older < newer == peek(leases).rank
    assert leases.acquire("k", "b", LONG, "task-b", older, None) is None
    assert peek(leases).holder is None
    taken = leases.acquire("k", "c", LONG, "task-c", newer, "sent c")
    assert taken is not None
    assert taken.lease.fence > newer
    assert leases.acquire("k", "c", LONG, "task-c", newer, "sent c") == taken, "repeated"
    assert peek(leases).newest_sent == "sent c"


def test_a_message_that_acquires_outranks_all_that_asked(leases: Leases) -> None:
    """B asks A to hand over, with a rank ahead of the store's clock; A's run ends; C finds the
    lease free, gets a fence above B's rank, runs and ends; B tries to acquire, and is refused.
    """
    lease = acquire(leases, "a").lease
    rank = peek(leases).next_rank + 3_600_000
    assert leases.requests.request_handoff(peek(leases), "b", rank, "sent b")
    leases.release(lease, DONE)
    newer = acquire(leases, "c").lease
    assert newer.fence == rank + 1
    assert peek(leases).newest_sent is None
    leases.release(newer, DONE)
    assert leases.acquire("k", "b", LONG, "task-b", rank, "sent b") is None
    again = leases.acquire("k", "c2", LONG, "task-c", newer.fence, None)
    assert again is not None, "a retry of the newest message"


@pytest.mark.parametrize("ends", [True, False], ids=["ran", "waits"])
def test_a_message_that_was_overtaken_is_not_the_newest(leases: Leases, ends: bool) -> None:
    """First B and then C are sent, from the same host. C is delivered first and runs, or asks A to
    hand over; then the lease is free, and B is delivered. B is refused.
    """
    sent_by_b, sent_by_c = f"host:{9:020d}", f"host:{10:020d}"
    lease = acquire(leases, "a").lease
    if ends:
        leases.release(lease, DONE)
        newer = leases.acquire("k", "c", LONG, "task-c", 0, sent_by_c)
        assert newer is not None
        lease = newer.lease
    else:
        rank = peek(leases).next_rank
        assert leases.requests.request_handoff(peek(leases), "c", rank, sent_by_c)
    leases.release(lease, DONE)
    assert leases.acquire("k", "b", LONG, "task-b", 0, sent_by_b) is None
    assert peek(leases).holder is None
    again = leases.acquire("k", "c2", LONG, "task-c", 0, sent_by_c)
    assert again is not None, "a copy of the newest message"
    leases.release(again.lease, DONE)
    elsewhere = leases.acquire("k", "d", LONG, "task-d", 0, f"another-host:{1:020d}")
    assert elsewhere is not None, "clocks of two hosts are not compared"


# -- pending runs


@pytest.mark.parametrize("ended", [DONE, WITH_HOLD_PERIOD], ids=["freed", "hold period"])
@pytest.mark.parametrize("new", [None, NEW], ids=["", "with a value"])
def test_the_release_returns_the_pending_run(
    store: SqlStore, ended: Ended, new: NewValue | None
) -> None:
    lease = acquire(store, "a").lease
    assert store.requests.request_run(peek(store), '{"n":1}') is True
    assert peek(store).wanted == '{"n":1}'
    assert store.release(lease, ended, write(new) if new else None) == Released('{"n":1}')


def test_the_newest_pending_run_is_kept(leases: Leases) -> None:
    lease = acquire(leases, "a").lease
    for pending_run in ("w1", "w2"):
        assert leases.requests.request_run(peek(leases), pending_run)
    assert leases.release(lease, DONE) == Released("w2")


def test_a_late_pending_run_does_not_replace_a_newer_one(leases: Leases) -> None:
    """B's request for pending run w1, by A's row as B saw it, stalls; C sees the row, and records
    w2; the request for w1 is carried out. The pending run must be C's.
    """
    lease = acquire(leases, "a").lease
    seen_by_b = peek(leases)
    assert leases.requests.request_run(peek(leases), "w2")
    assert not leases.requests.request_run(seen_by_b, "w1")
    assert leases.release(lease, DONE) == Released("w2")


def test_a_replaced_pending_run_does_not_come_back(leases: Leases) -> None:
    """B's request for pending run w1 stalls; its copy is answered; C records w2; the first copy is
    carried out.
    """
    acquire(leases, "a")
    seen_by_b = peek(leases)
    assert leases.requests.request_run(seen_by_b, "w1")
    assert leases.requests.request_run(peek(leases), "w2")
    assert not leases.requests.request_run(seen_by_b, "w1")
    assert leases.requests.wanted("k") == "w2"


def test_a_pending_run_replaces_only_a_pending_run_that_was_seen(leases: Leases) -> None:
    """A pending run that was seen can be replaced, unless it has been sent since."""
    leases.release(acquire(leases, "a").lease, DONE)
    lease = acquire(leases, "b").lease
    assert leases.requests.request_run(peek(leases), "w1")
    seen = peek(leases)
    assert seen.wanted == "w1"
    leases.requests.pending_run_sent("k", "w1")
    assert not leases.requests.request_run(seen, "w2"), "it was sent meanwhile"
    assert leases.requests.request_run(replace(seen, wanted=None), "w2")
    assert leases.release(lease, DONE) == Released("w2")


def test_a_pending_run_stays_until_it_was_sent(leases: Leases) -> None:
    """A dies between its release and sending the pending run: the next release must return it
    again.
    """
    lease = acquire(leases, "a").lease
    leases.requests.request_run(peek(leases), "w")
    assert leases.release(lease, DONE) == Released("w")
    assert leases.release(acquire(leases, "b").lease, DONE) == Released("w")
    leases.requests.pending_run_sent("k", "w")
    assert leases.release(acquire(leases, "c").lease, DONE) == FREED


def test_a_newer_pending_run_survives_the_removal_of_an_older_one(leases: Leases) -> None:
    """A releases and gets pending run w1; B acquires; C records w2; A has sent w1, and removes it;
    B releases, and must get w2.
    """
    lease = acquire(leases, "a").lease
    leases.requests.request_run(peek(leases), "w1")
    assert leases.release(lease, DONE) == Released("w1")
    successor = acquire(leases, "b").lease
    leases.requests.request_run(peek(leases), "w2")
    leases.requests.pending_run_sent("k", "w1")
    assert leases.release(successor, DONE) == Released("w2")


def test_a_pending_run_outlives_the_holder(leases: Leases) -> None:
    """C records a pending run while A holds the lease; A dies; B takes over, and gets the pending
    run when it releases.
    """
    lease = acquire(leases, "a").lease
    leases.requests.request_run(peek(leases), "w")
    leases.renew([replace(lease, ttl=BRIEF)])
    let_expire(leases)
    assert leases.release(acquire(leases, "b").lease, DONE) == Released("w")


def test_a_pending_run_is_either_returned_or_refused(leases: Leases) -> None:
    """C finds the lease held by A, and records a pending run while A releases. If C is first, A's
    release returns the pending run. If A is first, C is refused. A pending run that is accepted and
    not returned would be a lost run.
    """
    barrier = threading.Barrier(2)

    def release(lease: Lease) -> Released | None:
        barrier.wait()
        return leases.release(lease, DONE)

    with ThreadPoolExecutor(1) as pool:
        for n in range(10):
            answer = pool.submit(release, acquire(leases, f"h{n}").lease)
            seen, pending_run = peek(leases), f"w{n}"
            barrier.wait()
            taken = leases.requests.request_run(seen, pending_run)
            assert answer.result() == Released(pending_run if taken else None)
            leases.requests.pending_run_sent("k", pending_run)


# -- queued, claim, dequeue


def test_a_message_is_queued_once(leases: Leases) -> None:
    """A sender may repeat its claim, because it does not know which answer was lost."""
    assert enqueue(leases.requests, "k", "t1", LONG) == "t1"
    assert enqueue(leases.requests, "k", "t2", LONG) == "t1"
    assert enqueue(leases.requests, "k", "t1", LONG) == "t1"


def test_keys_have_queues_of_their_own(leases: Leases) -> None:
    assert enqueue(leases.requests, "k1", "t1", LONG) == "t1"
    assert enqueue(leases.requests, "k2", "t2", LONG) == "t2"


def test_no_message_is_queued_beside_a_running_message(leases: Leases) -> None:
    acquire(leases, "a")
    assert enqueue(leases.requests, "k", "t", LONG) == "task-a"


def test_a_message_is_queued_beside_a_direct_call(leases: Leases) -> None:
    """The sender gets the id of a message that runs, but a direct call has no message id."""
    assert leases.acquire("k", "a", LONG, None) is not None
    assert enqueue(leases.requests, "k", "t", LONG) == "t"


def test_a_message_is_queued_in_a_hold_period(leases: Leases) -> None:
    leases.release(acquire(leases, "a").lease, WITH_HOLD_PERIOD)
    assert enqueue(leases.requests, "k", "t", LONG) == "t"


def test_a_message_is_queued_after_a_run_that_died(leases: Leases) -> None:
    acquire(leases, "a", BRIEF)
    let_expire(leases)
    assert enqueue(leases.requests, "k", "t", LONG) == "t"


def test_a_message_that_runs_is_no_longer_queued(leases: Leases) -> None:
    enqueue(leases.requests, "k", "task-a", LONG)
    lease = acquire(leases, "a").lease
    assert enqueue(leases.requests, "k", "t", LONG) == "task-a"
    leases.release(lease, DONE)
    assert enqueue(leases.requests, "k", "t", LONG) == "t"


def test_a_message_stays_queued_while_another_runs(leases: Leases) -> None:
    """An older or requeued message can run after this message was sent and before this message
    runs.
    """
    enqueue(leases.requests, "k", "t1", LONG)
    lease = acquire(leases, "a").lease
    assert enqueue(leases.requests, "k", "t2", LONG) == "t1"
    leases.release(lease, DONE)
    assert enqueue(leases.requests, "k", "t2", LONG) == "t1"


def test_a_message_that_is_refused_the_lease_stays_queued(leases: Leases) -> None:
    """The broker will deliver the message again."""
    enqueue(leases.requests, "k", "task-b", LONG)
    acquire(leases, "a")
    assert leases.acquire("k", "b", LONG, "task-b") is None
    assert enqueue(leases.requests, "k", "t", LONG) == "task-b"


def test_dequeue_removes_its_own_message_only(leases: Leases) -> None:
    enqueue(leases.requests, "k", "t1", LONG)
    leases.requests.dequeue("k", "t2")
    assert enqueue(leases.requests, "k", "t2", LONG) == "t1"
    leases.requests.dequeue("k", "t1")
    assert enqueue(leases.requests, "k", "t2", LONG) == "t2"


def test_a_lost_message_counts_as_queued_for_its_life_only(leases: Leases) -> None:
    enqueue(leases.requests, "k", "t1", BRIEF)
    wait_until(lambda: enqueue(leases.requests, "k", "t2", LONG) == "t2", "its life ends")
    assert enqueue(leases.requests, "k", "t1", LONG) == "t2"


def claim(store: Leases, task_id: str, number: int) -> bool:
    return store.requests.claim("k", task_id, LONG, number)


def test_one_of_two_claims_for_the_same_queue_is_refused(leases: Leases) -> None:
    """Both senders see that no message is queued, and both claim."""
    seen = leases.requests.queued("k")
    assert seen == Queued(0, None)
    assert claim(leases, "t1", seen.number)
    assert not claim(leases, "t2", seen.number)
    assert leases.requests.queued("k") == Queued(1, "t1")


def test_a_repeated_claim_succeeds(leases: Leases) -> None:
    """The claim is repeated because its answer was lost. The queue's number grows only once."""
    assert claim(leases, "t", 0)
    assert claim(leases, "t", 0)
    assert leases.requests.queued("k") == Queued(1, "t")


def test_a_first_claim_is_no_repetition(leases: Leases) -> None:
    """Two callers use the same task id. Both see that no message is queued; one claims; then the
    other claims, and must be refused.
    """
    assert leases.requests.claim("k", "t", LONG, 0, first=True)
    assert not leases.requests.claim("k", "t", LONG, 0, first=True)
    assert leases.requests.claim("k", "t", LONG, 0), "the first caller repeats it"
    assert leases.requests.queued("k") == Queued(1, "t")


def test_a_claim_can_replace_the_queued_message_that_was_seen(leases: Leases) -> None:
    """A sender may replace a queued message if it knows that this message has ended, or if it sends
    this same message again.
    """
    assert claim(leases, "t1", 0)
    assert leases.requests.claim("k", "t2", LONG, 1, first=True)
    assert leases.requests.queued("k") == Queued(2, "t2")
    assert leases.requests.claim("k", "t2", 2 * LONG, 2, first=True)
    queued_in = peek(leases).queued_in
    assert queued_in is not None
    assert queued_in > LONG


def test_queued_tells_whether_the_message_runs(leases: Leases) -> None:
    lease = acquire(leases, "a").lease
    seen = leases.requests.queued("k")
    assert (seen.task_id, seen.running) == ("task-a", True)
    assert claim(leases, "t", seen.number)
    seen = leases.requests.queued("k")
    assert (seen.task_id, seen.running) == ("t", False)
    leases.requests.dequeue("k", "t")
    leases.release(lease, WITH_HOLD_PERIOD)
    seen = leases.requests.queued("k")
    assert (seen.task_id, seen.running) == (None, False)


def test_a_row_names_the_queued_message(leases: Leases) -> None:
    assert claim(leases, "t", 0)
    row = peek(leases)
    assert (row.queue, row.queued_task_id) == (1, "t")
    assert row.queued_in == pytest.approx(LONG, abs=5)
    leases.requests.dequeue("k", "t")
    row = peek(leases)
    assert (row.queue, row.queued_task_id) == (2, None)


def test_a_row_names_a_queued_message_only_while_it_counts(leases: Leases) -> None:
    assert leases.requests.claim("k", "t", BRIEF, 0)
    wait_until(lambda: peek(leases).queued_task_id is None, "its life ends")


def ran(store: Leases, task_id: str) -> None:
    acquired = store.acquire("k", "b", LONG, task_id)
    assert acquired is not None
    store.release(acquired.lease, DONE)


def runs(store: Leases, task_id: str) -> None:
    assert store.acquire("k", "b", LONG, task_id)


def dropped(store: Leases, task_id: str) -> None:
    """Let a worker drop the message, because it was revoked or has expired."""
    store.requests.dequeue("k", task_id)


@pytest.mark.parametrize("ended", [ran, runs, dropped])
@pytest.mark.parametrize("before", ["no row", "a row", "a queue"])
def test_a_late_claim_for_a_message_that_ran_or_ended_is_refused(
    leases: Leases, before: str, ended: Callable[[Leases, str], None]
) -> None:
    """t's claim stalls; its copy is answered, and t is sent; t runs, or is dropped; the first copy
    of the claim is carried out. A finished message must not keep other messages out.
    """
    if before != "no row":
        ran(leases, "t0")
    if before == "a queue":
        enqueue(leases.requests, "k", "t0", LONG)
        ran(leases, "t0")
    number = leases.requests.queued("k").number
    assert claim(leases, "t", number)
    ended(leases, "t")
    assert not claim(leases, "t", number)
    assert leases.requests.queued("k").task_id == ("t" if ended is runs else None)


@pytest.mark.parametrize("row", [False, True], ids=["no row", "a row"])
def test_a_claim_that_comes_after_its_message_was_dropped_is_refused(
    leases: Leases, row: bool
) -> None:
    """t's only claim stalls, and its sender gives it up; the message is sent without a claim, and
    dropped; the claim is carried out.
    """
    if row:
        ran(leases, "t0")
    number = leases.requests.queued("k").number
    leases.requests.dequeue("k", "t")
    assert not claim(leases, "t", number)
    assert leases.requests.queued("k") == Queued(number + 1, None)


def test_a_claim_that_comes_after_it_has_expired_is_refused(leases: Leases) -> None:
    """t1's claim is carried out, and expires; a copy of this claim is carried out. Then t2 claims,
    and another copy of t1's claim is carried out.
    """
    assert leases.requests.claim("k", "t1", BRIEF, 0)
    wait_until(lambda: leases.requests.queued("k").task_id is None, "its life ends")
    assert not leases.requests.claim("k", "t1", LONG, 0)
    assert claim(leases, "t2", 1)
    assert not claim(leases, "t1", 0)
    assert leases.requests.queued("k") == Queued(2, "t2")


def test_a_claim_after_the_queue_has_changed_is_refused(leases: Leases) -> None:
    """t2's sender sees that no message is queued; t1 is queued, sent, and runs; then t2's claim is
    carried out.
    """
    number = leases.requests.queued("k").number
    enqueue(leases.requests, "k", "t1", LONG)
    ran(leases, "t1")
    assert not claim(leases, "t2", number)
    assert enqueue(leases.requests, "k", "t2", LONG) == "t2"


def test_a_repeated_acquisition_leaves_the_queue(leases: Leases) -> None:
    """A's acquire request for task-a stalls; its copy is answered; the body requeues its own
    message, and claims the queue for it; the first copy is carried out.
    """
    lease = acquire(leases, "a").lease
    number = leases.requests.queued("k").number
    assert claim(leases, "task-a", number)
    assert acquire(leases, "a").lease == lease
    assert leases.requests.queued("k") == Queued(number + 1, "task-a")


def test_dequeue_before_the_first_run(store: SqlStore) -> None:
    """Dequeue makes the row. The new row must not look as if a run had acquired it."""
    store.requests.dequeue("k", "t")
    row = peek(store)
    assert (row.value, row.schema_version, row.run_count, row.holder) == ("null", None, 0, None)
    acquired = acquire(store, "a")
    assert (acquired.value, acquired.write) == ("null", 0)


def test_a_claim_changes_nothing_else(leases: Leases) -> None:
    leases.release(acquire(leases, "a").lease, DONE)
    before = peek_later(leases)
    enqueue(leases.requests, "k", "t", LONG)
    assert replace(peek(leases), read_at=before.read_at) == before


def test_a_claim_before_the_first_run(store: SqlStore) -> None:
    """A claim makes the row. The new row must not look as if a run had acquired it."""
    enqueue(store.requests, "k", "t", LONG)
    row = peek(store)
    assert (row.value, row.schema_version, row.run_count) == ("null", None, 0)
    assert (row.holder, row.task_id, row.expires_in, row.held) == (None, None, None, False)
    acquired = acquire(store, "a")
    assert (acquired.value, acquired.write) == ("null", 0)
    assert acquired.lease.fence / 1000 == pytest.approx(acquired.acquired_at, abs=STALL)


def test_a_claim_on_a_value_that_never_was_leased(store: SqlStore) -> None:
    store.set_aside("k", "kept")
    assert enqueue(store.requests, "k", "t1", LONG) == "t1"
    assert enqueue(store.requests, "k", "t2", LONG) == "t1"
    assert acquire(store, "a").value == "kept"


def test_one_of_many_threads_enqueues(leases: Leases) -> None:
    """All threads find no message queued, and claim at once. One claim is accepted. The other
    threads wait for the row, read it again, and get the id of the queued message.
    """
    barrier = threading.Barrier(8)

    def ask(task_id: str) -> str:
        barrier.wait()
        return enqueue(leases.requests, "k", task_id, LONG)

    task_ids = [f"t{n}" for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            answers = list(pool.map(ask, task_ids))
            winner = answers[0]
            assert winner in task_ids
            assert answers == [winner] * 8
            leases.requests.dequeue("k", winner)


def test_threads_that_enqueue_and_dequeue_never_overlap(leases: Leases) -> None:
    """t1 is queued; t2's claim is refused; t1 is dequeued; t2's sender reads the row, and finds no
    message queued. It claims again, and gets t2's id, or the id of a message that another sender
    has claimed meanwhile.
    """
    alone = threading.Lock()
    task_ids = ["t1", "t2", "t3"]

    def use(task_id: str) -> None:
        for _ in range(20):
            answer = enqueue(leases.requests, "k", task_id, LONG)
            assert answer in task_ids
            if answer == task_id:
                assert alone.acquire(blocking=False)
                assert enqueue(leases.requests, "k", task_id, LONG) == task_id
                alone.release()
                leases.requests.dequeue("k", task_id)

    with ThreadPoolExecutor(len(task_ids)) as pool:
        list(pool.map(use, task_ids))
