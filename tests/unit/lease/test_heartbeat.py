"""The heartbeat's threads, with a store whose answers each test chooses."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from celery_singleton_state.lease.heartbeat import Heartbeat
from celery_singleton_state.lease.lease import HeldLease, clock
from celery_singleton_state.store.base import Lease, StoreUnavailable
from tests.helpers.leases import Answers
from tests.helpers.owners import RecordingOwner
from tests.helpers.waiting import wait_until


@pytest.fixture
def store() -> Answers:
    return Answers()


@pytest.fixture
def heartbeat(store: Answers) -> Iterator[Heartbeat]:
    beating: Any = Heartbeat(store)  # type: ignore[arg-type]
    yield beating
    beating.close()


def held(key: str, ttl: float = 1.0, interval: float = 0.1) -> HeldLease:
    return HeldLease(Lease(key, "holder", 1, ttl), clock(), interval)


def test_a_lease_is_renewed_again_and_again(heartbeat: Heartbeat, store: Answers) -> None:
    lease = held("a")
    heartbeat.hold(lease)
    wait_until(lambda: len(store.asked) >= 3, "three renewals")
    assert lease.lost is None
    assert lease.remaining > 0


def test_all_leases_that_are_due_are_renewed_by_one_statement(
    heartbeat: Heartbeat, store: Answers
) -> None:
    together = clock()
    for key in "abc":
        heartbeat.hold(HeldLease(Lease(key, "holder", 1, 1.0), together, 0.1))
    wait_until(lambda: ["a", "b", "c"] in store.asked, "one request for all")


def test_a_lost_lease_is_told_apart_from_the_next_lease_of_the_same_key(
    heartbeat: Heartbeat, store: Answers
) -> None:
    """Run A holds the lease, and the store loses it. Run B acquires it in the same process, or in
    another child of the same worker.

    Both leases are due at the same time. The store renews only B's, and answers by key. The
    heartbeat must find that A's lease is lost and B's is not.
    """

    def renewed(leases: Sequence[Lease]) -> set[str]:
        return {lease.key for lease in leases if lease.holder != "a"}

    store.answer = renewed
    together = clock()
    first, second = (HeldLease(Lease("k", who, 1, 60.0), together, 0.1) for who in ("a", "b"))
    other = HeldLease(Lease("other", "c", 1, 60.0), together, 0.1)
    for lease in (first, second, other):
        heartbeat.hold(lease)
    wait_until(lambda: first.lost, "the first is lost")
    wait_until(lambda: second.asked_at > together, "the second is renewed")
    assert (second.lost, other.lost) == (None, None)


def test_a_dropped_lease_is_not_renewed(heartbeat: Heartbeat, store: Answers) -> None:
    dropped, kept = held("dropped"), held("kept")
    heartbeat.hold(dropped)
    heartbeat.hold(kept)
    heartbeat.drop(dropped)
    wait_until(lambda: len(store.asked) >= 2, "two renewals")
    assert all("dropped" not in keys for keys in store.asked[1:])
    assert dropped.lost is None


def test_a_short_run_costs_no_request(heartbeat: Heartbeat, store: Answers) -> None:
    """The run ends before its renewal is due. A longer run beside it shows that the thread
    works.
    """
    short, long = held("short", ttl=60, interval=30), held("long")
    heartbeat.hold(short)
    heartbeat.hold(long)
    heartbeat.drop(short)
    wait_until(lambda: len(store.asked) >= 2, "the long one is renewed")
    assert all(keys == ["long"] for keys in store.asked)


def test_short_runs_do_not_wake_the_threads(
    heartbeat: Heartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads already wait for an earlier renewal. A run that begins and ends meanwhile does
    not wake them, because its own renewal would be due later.
    """
    heartbeat.hold(held("first", ttl=60, interval=30))
    timers = (heartbeat._renewal, heartbeat._expiry)
    for timer in timers:
        wait_until(
            lambda it=timer: it._wakes_at < float("inf"), "the thread waits for the first renewal"
        )
    notified = []
    with monkeypatch.context() as patched:
        for timer in timers:
            patched.setattr(timer._changed, "notify", lambda: notified.append(1))
        for n in range(100):
            lease = held(str(n), ttl=60, interval=30)
            heartbeat.hold(lease)
            heartbeat.drop(lease)
    assert notified == []


def test_without_runs_the_threads_sleep_until_the_next_run(heartbeat: Heartbeat) -> None:
    lease = held("a")
    heartbeat.hold(lease)
    heartbeat.drop(lease)
    timers = (heartbeat._renewal, heartbeat._expiry)
    for timer in timers:
        wait_until(
            lambda it=timer: it._wakes_at == float("inf"), "the thread sleeps without a time limit"
        )
    later = held("b")
    heartbeat.hold(later)
    for timer in timers:
        wait_until(lambda it=timer: it._wakes_at < float("inf"), "the next lease wakes it")


def test_a_refused_lease_is_lost(heartbeat: Heartbeat, store: Answers) -> None:
    store.answer = lambda leases: set()
    lease = held("a")
    heartbeat.hold(lease)
    wait_until(lambda: lease.lost, "the lease is lost")
    assert lease.lost == "its renewal was refused"
    assert lease.remaining == 0
    assert heartbeat._held == set()


def test_a_lease_that_a_batch_skipped_is_renewed_by_a_statement_of_its_own(
    heartbeat: Heartbeat, store: Answers
) -> None:
    """A batch skips a row that another transaction has locked. The row's lease is not lost."""
    store.answer = lambda leases: (
        {lease.key for lease in leases if lease.key != "locked" or len(leases) == 1}
    )
    together = clock()
    leases = [HeldLease(Lease(key, "holder", 1, 1.0), together, 0.1) for key in ("a", "locked")]
    for lease in leases:
        heartbeat.hold(lease)
    wait_until(lambda: ["a", "locked"] in store.asked, "one statement for both leases")
    wait_until(lambda: ["locked"] in store.asked, "one statement for the locked lease")
    assert [lease.lost for lease in leases] == [None, None]


def test_a_locked_row_does_not_delay_the_other_leases(heartbeat: Heartbeat, store: Answers) -> None:
    """Another transaction has locked four of five rows.

    A statement for one of the four waits for its lock. Meanwhile batches for all five renew the
    fifth. The locks are released. A batch renews the four before that statement ends.
    """
    locked, free = {"w", "x", "y", "z"}, threading.Event()
    waiting, go_on = threading.Event(), threading.Event()

    def answer(leases: Sequence[Lease]) -> set[str]:
        keys = {lease.key for lease in leases}
        if len(keys) == 1:
            waiting.set()
            go_on.wait(30)
            return keys
        return keys if free.is_set() else keys - locked

    store.answer = answer
    asked_at = clock()
    leases = {
        key: HeldLease(Lease(key, "holder", 1, 60.0), asked_at, 0.1) for key in (*locked, "a")
    }
    for lease in leases.values():
        heartbeat.hold(lease)
    assert waiting.wait(30)
    before = leases["a"].asked_at
    wait_until(
        lambda: leases["a"].asked_at > before, "the lease that is not locked is renewed again"
    )
    assert all(leases[key].asked_at == asked_at for key in locked)
    free.set()
    wait_until(
        lambda: all(leases[key].asked_at > asked_at for key in locked), "the four are renewed, too"
    )
    go_on.set()
    wait_until(lambda: not heartbeat._skipped, "no lease counts as skipped any more")
    assert [lease.lost for lease in leases.values()] == [None] * 5


def test_a_refused_lease_among_locked_ones_is_lost(heartbeat: Heartbeat, store: Answers) -> None:
    """The answer to a batch lacks locked and refused leases alike. A statement for one lease alone
    tells them apart.
    """
    store.answer = lambda leases: (
        {lease.key for lease in leases if lease.key != "refused"} if len(leases) > 1 else set()
    )
    refused, other = held("refused", ttl=60), held("other", ttl=60)
    heartbeat.hold(refused)
    heartbeat.hold(other)
    wait_until(lambda: refused.lost, "the lease is lost")
    assert refused.lost == "its renewal was refused"
    assert other.lost is None


def test_a_lease_that_is_due_more_often_is_renewed_in_a_batch_too(
    heartbeat: Heartbeat, store: Answers
) -> None:
    """A statement for one lease alone would wait for its row's lock, and delay the other lease."""
    heartbeat.hold(held("rarely", ttl=60, interval=30))
    heartbeat.hold(held("often"))
    wait_until(lambda: len(store.asked) >= 3, "three renewals")
    assert all(keys == ["often", "rarely"] for keys in store.asked)


def test_the_answer_to_an_older_renewal_changes_nothing() -> None:
    lease = held("a")
    newer = clock() + 1
    lease.renewed(newer)
    until = lease.trusted_until
    lease.renewed(newer - 0.5)
    assert (lease.asked_at, lease.trusted_until) == (newer, until)


@pytest.mark.parametrize("error", [StoreUnavailable("gone"), LookupError("a bug")])
def test_a_failed_request_is_repeated(
    heartbeat: Heartbeat, store: Answers, error: Exception
) -> None:
    def fail_once(leases: Sequence[Lease]) -> set[str]:
        if len(store.asked) == 1:
            raise error
        return {lease.key for lease in leases}

    store.answer = fail_once
    lease = held("a")
    heartbeat.hold(lease)
    wait_until(lambda: len(store.asked) >= 3, "the renewal is repeated")
    assert lease.lost is None


def test_a_lease_without_an_answer_is_lost_when_it_expires(
    heartbeat: Heartbeat, store: Answers
) -> None:
    def fail(leases: Sequence[Lease]) -> set[str]:
        raise StoreUnavailable("gone")

    store.answer = fail
    lease = held("a", ttl=0.3)
    heartbeat.hold(lease)
    wait_until(lambda: lease.lost, "the lease is lost")
    assert lease.lost == "it was not renewed before it expired"
    assert clock() >= lease.trusted_until


def test_a_late_answer_does_not_bring_an_expired_lease_back(
    heartbeat: Heartbeat, store: Answers
) -> None:
    """A renewal is sent, and the store does not answer. The lease expires, and the run learns of
    it.

    Only then does the store answer. The lease stays lost.
    """
    answered = threading.Event()

    def answer_late(leases: Sequence[Lease]) -> set[str]:
        answered.wait(30)
        return {lease.key for lease in leases}

    store.answer = answer_late
    lost: list[bool] = []
    lease = held("a", ttl=0.3)
    lease.owner = RecordingOwner(lost=lambda why: lost.append(answered.is_set()))
    heartbeat.hold(lease)
    wait_until(lambda: lost, "the run is told that its lease is lost")
    answered.set()
    assert lost == [False]
    other = held("b")
    store.answer = lambda leases: {each.key for each in leases}
    heartbeat.hold(other)
    wait_until(lambda: ["b"] in store.asked, "the renewal goes on")
    assert lease.remaining == 0


def test_leases_that_are_due_soon_are_renewed_together(
    heartbeat: Heartbeat, store: Answers
) -> None:
    """Leases that were acquired at different times soon share one statement."""
    asked_at = clock()
    for key, earlier in (("a", 0.3), ("b", 0.2), ("c", 0.1), ("new", 0.0)):
        heartbeat.hold(HeldLease(Lease(key, "holder", 1, 10.0), asked_at - earlier, 0.4))
    wait_until(lambda: ["a", "b", "c", "new"] in store.asked, "one statement renews all four")


def test_a_lease_that_is_released_during_its_renewal_is_not_lost(
    heartbeat: Heartbeat, store: Answers
) -> None:
    """A renewal is sent. The run releases its lease and drops it. The store refuses the renewal.

    The lease was not lost: its own run released it.
    """
    sent, go_on = threading.Event(), threading.Event()

    def refuse_late(leases: Sequence[Lease]) -> set[str]:
        sent.set()
        go_on.wait(10)
        return set()

    store.answer = refuse_late
    lease = held("a")
    heartbeat.hold(lease)
    assert sent.wait(10)
    heartbeat.drop(lease)
    go_on.set()
    other = held("b")
    store.answer = lambda leases: {each.key for each in leases}
    heartbeat.hold(other)
    wait_until(lambda: ["b"] in store.asked, "the thread goes on")
    assert lease.lost is None


def test_a_holder_learns_which_task_asks_for_a_handoff(
    heartbeat: Heartbeat, store: Answers
) -> None:
    store.handoffs["a"] = "task 7"
    asked, other = held("a"), held("b")
    heard: list[str] = []
    asked.owner = other.owner = RecordingOwner(asked=heard.append)
    heartbeat.hold(asked)
    heartbeat.hold(other)
    wait_until(lambda: heard, "the holder is asked")
    assert set(heard) == {"task 7"}
    assert asked.lost is None


def test_a_thread_that_died_is_replaced(heartbeat: Heartbeat, store: Answers) -> None:
    heartbeat.hold(held("a"))
    heartbeat.close()
    heartbeat._renewal._closed = heartbeat._expiry._closed = False
    lease = held("b")
    heartbeat.hold(lease)
    wait_until(lambda: any("b" in keys for keys in store.asked), "a new thread renews")


def test_a_renewal_is_due_half_way_through_the_trusted_part_of_a_short_life() -> None:
    asked_at = clock()
    lease = HeldLease(Lease("a", "holder", 1, 2.0), asked_at, interval=4.0)
    assert lease.trusted_until == asked_at + 1.8
    assert lease.renew_at == asked_at + 0.9


def test_an_error_of_one_owner_stops_no_other_renewal(heartbeat: Heartbeat, store: Answers) -> None:
    """One holder is asked to hand over, but the thread that would interrupt its body cannot be
    started.

    The other lease is renewed all the same.
    """

    def fail(_: str) -> None:
        raise RuntimeError("can't start new thread")

    asked, other = held("asked"), held("other")
    asked.owner = RecordingOwner(asked=fail)
    store.handoffs["asked"] = "somebody"
    for lease in (asked, other):
        heartbeat.hold(lease)
    before = other.asked_at
    wait_until(lambda: other.asked_at > before, "the other one is renewed")
    first = other.asked_at
    wait_until(lambda: other.asked_at > first, "and renewed again")
