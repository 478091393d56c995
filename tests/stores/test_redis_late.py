"""Leases in Redis when a request is carried out late or repeated, or when its answer is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis

from celery_singleton_state.store.base import Acquired, Ended, Released, Row
from celery_singleton_state.store.redis.store import RedisStore
from tests.helpers.waiting import wait_until

LONG, BRIEF = 60.0, 0.2
DONE = Ended("succeeded", "[]")
#: The largest integer of Redis, less a few, so that some more acquisitions still get a larger
#: fence.
NEAR_THE_END = 2**63 - 10


@pytest.fixture
def store(lease_url: str) -> Iterator[RedisStore]:
    opened = RedisStore(lease_url, io_timeout=5.0)
    yield opened
    opened.close()


@pytest.fixture
def server(lease_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(lease_url, decode_responses=True) as client:
        yield client


def acquire(store: RedisStore, holder: str, ttl: float = LONG) -> Acquired:
    acquired = store.acquire("k", holder, ttl, f"task-{holder}")
    assert acquired is not None
    return acquired


def peek(store: RedisStore) -> Row:
    row = store.peek("k")
    assert row is not None
    return row


def claim(store: RedisStore, task_id: str, number: int) -> bool:
    return store.requests.claim("k", task_id, LONG, number)


def milliseconds(server: redis.Redis) -> int:
    """Return the server's time in milliseconds since 1970."""
    seconds, micros = server.time()
    return int(seconds) * 1000 + int(micros) // 1000


# -- acquire


def test_a_repeated_acquire_changes_nothing(store: RedisStore) -> None:
    """A acquires; B asks A to hand over; A's lease is renewed for a long life; a second copy of A's
    acquire, for a brief life, is carried out.
    """
    first = acquire(store, "a")
    assert store.requests.request_handoff(peek(store), "b")
    queue = store.requests.queued("k").number
    before = peek(store)

    again, after = acquire(store, "a", BRIEF), peek(store)
    assert again == replace(first, lease=replace(first.lease, ttl=BRIEF))
    assert after == replace(before, expires_in=after.expires_in)
    assert after.expires_in is not None
    assert after.expires_in > LONG / 2
    assert store.renew([first.lease]) == {"k": "b"}
    assert store.requests.queued("k").number == queue


def test_a_repeated_acquire_extends_a_shorter_life(store: RedisStore) -> None:
    acquire(store, "a", BRIEF)
    acquire(store, "a", LONG)
    left = peek(store).expires_in
    assert left is not None
    assert left > BRIEF


def test_the_write_number_says_how_a_lease_was_acquired(store: RedisStore) -> None:
    """The write number is 0 if the lease was free or its hold period has ended. It is -1 if the
    lease had expired.
    """
    first = acquire(store, "a", BRIEF)
    wait_until(lambda: not peek(store).held, "a's lease expires")
    second = acquire(store, "b")
    store.release(second.lease, Ended("succeeded", "[]", hold=BRIEF))
    wait_until(lambda: not peek(store).held, "the hold period ends")
    third = acquire(store, "c")
    assert [first.write, second.write, third.write, peek(store).write] == [0, -1, 0, 0]


# -- fences


def test_a_wiped_server_gives_no_fence_twice(store: RedisStore, server: redis.Redis) -> None:
    before = acquire(store, "a").lease.fence
    wait_until(lambda: milliseconds(server) > before, "the clock advances")
    server.flushdb()
    assert acquire(store, "b").lease.fence > before


def test_a_pruned_key_gives_no_fence_twice(store: RedisStore, server: redis.Redis) -> None:
    lease = acquire(store, "a").lease
    store.release(lease, DONE)
    wait_until(lambda: milliseconds(server) > lease.fence, "the clock advances")
    assert store.prune(["k"], -1) == ["k"]
    assert acquire(store, "b").lease.fence > lease.fence


def test_a_fence_is_the_servers_time(store: RedisStore, server: redis.Redis) -> None:
    before = milliseconds(server)
    fence = acquire(store, "a").lease.fence
    assert before <= fence <= milliseconds(server)


@pytest.mark.parametrize("fence", [2**53 + 1, NEAR_THE_END])
def test_a_fence_grows_by_one_after_the_clock_was_set_back(
    store: RedisStore, server: redis.Redis, fence: int
) -> None:
    """The fence is exact to its last digit, although Lua's numbers have only 53 bits."""
    store.release(acquire(store, "a").lease, DONE)
    server.hset("k", "fence", str(fence))
    lease = acquire(store, "b").lease
    assert lease.fence == fence + 1 == peek(store).fence
    assert acquire(store, "b").lease == lease
    assert store.renew([lease]) == {"k": None}
    assert store.release(lease, DONE) == Released(None)
    assert acquire(store, "c").lease.fence == fence + 2


def test_runs_within_a_millisecond_have_growing_fences(store: RedisStore) -> None:
    fences = []
    for number in range(200):
        lease = acquire(store, f"h{number}").lease
        fences.append(lease.fence)
        store.release(lease, DONE)
    assert sorted(set(fences)) == fences


# -- give back


def test_a_lease_is_given_back_if_acquire_was_never_answered(store: RedisStore) -> None:
    """A's acquire is carried out and never answered, so A does not know its fence."""
    acquire(store, "a", LONG)
    assert store.requests.request_run(peek(store), "w")
    assert store.give_back("k", "a") == Released("w")
    row = peek(store)
    assert (row.holder, row.task_id, row.acquired_at, row.expires_in) == (None,) * 4
    assert row.run_count == 0
    assert store.give_back("k", "a") is None
    assert acquire(store, "b").lease.fence > row.fence


def test_a_late_give_back_ends_no_other_lease(store: RedisStore) -> None:
    acquire(store, "a", BRIEF)
    wait_until(lambda: not peek(store).held, "a's lease expires")
    lease = acquire(store, "b").lease
    assert store.give_back("k", "a") is None
    assert store.give_back("none", "a") is None
    assert store.renew([lease]) == {"k": None}


def test_a_give_back_does_not_end_a_hold_period(store: RedisStore) -> None:
    store.release(acquire(store, "a").lease, Ended("succeeded", "[]", hold=LONG))
    assert store.give_back("k", "a") is None
    assert peek(store).in_hold_period


# -- the pending run


def test_a_late_pending_run_does_not_replace_a_newer_one(store: RedisStore) -> None:
    """A's request for a pending run stalls, and A gives it up; B, which saw the same row, records
    another pending run; then A's request is carried out.
    """
    acquire(store, "a")
    seen = peek(store)
    assert store.requests.request_run(seen, "w2")
    assert not store.requests.request_run(seen, "w1")
    assert peek(store).wanted == "w2"
    assert store.requests.request_run(peek(store), "w3")
    assert store.requests.wanted("k") == "w3"


# -- the queue


def test_a_late_claim_does_not_queue_a_message_that_has_ended(store: RedisStore) -> None:
    """t's claim stalls; its copy is answered; t runs and ends; the first copy is carried out."""
    number = store.requests.queued("k").number
    assert claim(store, "t", number)
    store.release(acquire_for(store, "t").lease, DONE)
    assert not claim(store, "t", number)
    assert store.requests.queued("k").task_id is None


def test_a_late_claim_does_not_queue_a_message_that_was_dropped(store: RedisStore) -> None:
    """t's claim stalls; its copy is answered; t is revoked, and so ends without a run; the first
    copy is carried out.
    """
    claim(store, "before", 0)
    store.requests.dequeue("k", "before")
    number = store.requests.queued("k").number
    store.requests.dequeue("k", "t")
    assert not claim(store, "t", number)
    assert store.requests.queued("k").task_id is None


def test_a_repeated_claim_is_answered_like_the_first(store: RedisStore) -> None:
    number = store.requests.queued("k").number
    assert claim(store, "t", number)
    assert claim(store, "t", number)
    assert not claim(store, "another", number)
    queued = store.requests.queued("k")
    assert (queued.number, queued.task_id) == (number + 1, "t")


def test_a_claim_is_refused_if_the_queue_has_changed(store: RedisStore) -> None:
    """Two senders see that no message is queued. One claims; the other's claim is refused, and it
    sees the first one's message.
    """
    number = store.requests.queued("k").number
    assert claim(store, "first", number)
    assert not claim(store, "second", number)
    assert store.requests.queued("k").task_id == "first"


def test_a_message_that_runs_is_answered_as_the_queued_one(store: RedisStore) -> None:
    claim(store, "task-a", 0)
    acquire(store, "a")
    assert store.requests.queued("k").task_id == "task-a"
    assert claim(store, "next", store.requests.queued("k").number)
    assert store.requests.queued("k").task_id == "next"


def test_reading_and_giving_back_make_no_row(store: RedisStore) -> None:
    assert store.requests.queued("k").number == 0
    assert not claim(store, "t", 7)
    assert store.give_back("k", "a") is None
    assert store.peek("k") is None


def acquire_for(store: RedisStore, task_id: str) -> Acquired:
    acquired = store.acquire("k", f"holder-of-{task_id}", LONG, task_id)
    assert acquired is not None
    return acquired
