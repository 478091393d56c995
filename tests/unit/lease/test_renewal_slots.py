"""Renewal by the parent: a worker's child leaves the renewal of its leases to the main process.

Child and parent exchange requests and answers through the child's holder file, which has a slot for
each lease. Both sides are tested with a real file.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state.lease import renewal_slots
from celery_singleton_state.lease.heartbeat import Heartbeat
from celery_singleton_state.lease.holder_files import HolderFiles, HolderRecord
from celery_singleton_state.lease.lease import HeldLease, clock
from celery_singleton_state.lease.renewal_slots import (
    ANSWER_AT,
    LeftToParent,
    RenewalAnswer,
    RenewalRequest,
    mark_as_parent,
    parents_mark,
    requests_in,
    write_answer,
)
from celery_singleton_state.runtime import close_runtime, runtime_of
from celery_singleton_state.store.base import Ended, Lease
from celery_singleton_state.worker.parent_renewal import ParentRenewal
from tests.helpers.leases import Answers
from tests.helpers.owners import RecordingOwner
from tests.helpers.waiting import wait_until

FORK = multiprocessing.get_context("fork")
MARK = "the parent's"


class Child:
    """The holder file of a process, and a heartbeat that leaves the renewals to its parent."""

    def __init__(self, directory: Path) -> None:
        self.holder_files = HolderFiles(directory, f"{os.getpid()}-aaaa")
        self.path = directory / f"{os.getpid()}-aaaa"
        self.store = Answers()
        self.left = LeftToParent(self.holder_files, MARK)
        self.heartbeat = Heartbeat(self.store, self.left)  # type: ignore[arg-type]
        self.slots: dict[str, int | None] = {}

    def hold(self, key: str, ttl: float = 60.0, interval: float = 30.0) -> HeldLease:
        held = HeldLease(Lease(key, f"holder of {key}", 7, ttl), clock(), interval)
        self.slots[key] = self.holder_files.note(HolderRecord(key, held.lease.holder, 0))
        self.heartbeat.hold(held)
        return held

    def drop(self, held: HeldLease) -> None:
        self.heartbeat.drop(held)
        self.holder_files.clear(self.slots.pop(held.lease.key))

    def requests(self) -> list[RenewalRequest]:
        return [request for _, request in requests_in(self.path)]

    def answer(self, held: HeldLease, answer: RenewalAnswer) -> None:
        """Write an answer into the file and send the signal, as the parent does."""
        start = self.slots[held.lease.key]
        assert start is not None
        write_answer(self.path, start, answer)
        os.kill(os.getpid(), signal.SIGURG)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    made = Child(tmp_path)
    yield made
    made.heartbeat.close()
    for slot in made.slots.values():
        made.holder_files.clear(slot)
    made.holder_files.close()


def test_a_renewal_is_requested_until_the_lease_is_dropped(child: Child) -> None:
    held = child.hold("a")
    every = 0.75 * HeldLease(held.lease, held.asked_at, 30.0).renew_every
    assert child.requests() == [
        RenewalRequest(MARK, "a", "holder of a", 7, 60.0, held.asked_at, every)
    ]
    child.drop(held)
    assert child.requests() == []


def test_an_answer_extends_the_time_to_trust_the_lease_at_once(child: Child) -> None:
    """Reading the lease's remaining time reads the answer. So the child need not wait until one of
    its threads has run.
    """
    held = child.hold("a")
    asked_at = held.asked_at + 20
    child.answer(held, RenewalAnswer("holder of a", asked_at))
    assert held.remaining > 60
    assert held.asked_at == asked_at
    assert child.store.asked == []


def test_a_refusal_and_a_handoff_request_are_read_at_the_signal(child: Child) -> None:
    """Without the signal, the child's own thread would read them only half a minute later."""
    lost, asked = child.hold("lost"), child.hold("asked")
    heard: list[str] = []
    asked.owner = RecordingOwner(asked=heard.append)
    child.answer(asked, RenewalAnswer("holder of asked", clock(), "task 7"))
    wait_until(lambda: heard, "the holder is asked to hand over")
    assert heard[0] == "task 7"
    child.answer(lost, RenewalAnswer("holder of lost", None))
    wait_until(lambda: lost.lost, "the lease is lost")
    assert lost.lost == "its renewal was refused"
    assert asked.lost is None
    # The request stays until the run ends, so that the parent repeats the signal until then.
    assert {request.key for request in child.requests()} == {"lost", "asked"}
    child.drop(lost)
    assert {request.key for request in child.requests()} == {"asked"}


def test_an_answer_for_an_earlier_lease_of_the_slot_is_ignored(child: Child) -> None:
    """Lease A is dropped, and lease B is noted in the same slot. Only then does the parent write
    that A's renewal was refused. B is not lost.
    """
    earlier = child.hold("earlier")
    start = child.slots["earlier"]
    child.drop(earlier)
    later = child.hold("later")
    assert child.slots["later"] == start
    child.answer(later, RenewalAnswer("holder of earlier", None))
    assert child.left.answer_to(later) is None
    child.answer(later, RenewalAnswer("holder of later", later.asked_at + 1))
    wait_until(lambda: later.asked_at > earlier.asked_at, "the answer for this lease is used")
    assert later.remaining > 0
    assert later.lost is None


def test_a_half_written_answer_is_ignored(child: Child) -> None:
    """While the parent writes one answer over another, the child can read any mixture of both."""
    held = child.hold("a")
    holder = held.lease.holder
    answers = [RenewalAnswer(holder, 1000.25), RenewalAnswer(holder, 2000.75, "task 7"), None]
    sealed = [renewal_slots._seal(one) if one else bytes(120) for one in answers]
    areas = [one.ljust(120, b"\0") for one in sealed]
    for old in areas:
        for new in areas:
            for n in range(121):
                for mixed in (new[:n] + old[n:], old[:n] + new[n:]):
                    child.holder_files.put(holder, ANSWER_AT, mixed)
                    assert child.left.answer_to(held) in answers


def test_a_long_name_in_an_answer_is_cut(child: Child) -> None:
    held = child.hold("a")
    child.answer(held, RenewalAnswer(held.lease.holder, clock(), "ä" * 5000))
    answer = child.left.answer_to(held)
    assert answer is not None
    assert answer.handoff_to == "ä" * 200


def test_a_process_renews_a_lease_whose_request_has_no_room(child: Child) -> None:
    held = HeldLease(Lease("k" * 5000, "holder", 7, 60.0), clock(), 30.0)
    child.heartbeat.hold(held)
    assert held.renew_at <= held.asked_at + 30.0
    assert child.requests() == []


def test_a_child_renews_by_itself_when_its_parent_does_not(child: Child) -> None:
    """The child sends its own renewal when half of the lease's life has passed without an answer.

    As long as the parent answers in time, the child sends none.
    """
    silent = child.hold("silent", ttl=1.0, interval=0.5)
    wait_until(lambda: len(child.store.asked) >= 3, "the child renews by itself, again and again")
    assert silent.lost is None
    child.drop(silent)
    answered = child.hold("answered", ttl=2.0, interval=0.5)
    start = clock()
    child.store.asked.clear()

    def long_held() -> bool:
        child.answer(answered, RenewalAnswer("holder of answered", clock()))
        return clock() > start + 4

    wait_until(long_held, "the parent renews for twice the lease's life")
    assert child.store.asked == []
    assert answered.lost is None


def test_a_lease_without_any_answer_is_lost_when_it_expires(child: Child) -> None:
    child.store.answer = lambda leases: (_ for _ in ()).throw(LookupError("silent"))
    held = child.hold("a", ttl=0.5, interval=0.2)
    wait_until(lambda: held.lost, "the lease is lost")
    assert held.lost == "it was not renewed before it expired"
    assert child.requests() == []


def test_a_file_that_is_gone_has_no_requests(tmp_path: Path) -> None:
    assert list(requests_in(tmp_path / "gone")) == []


def test_only_a_child_of_the_marked_process_leaves_renewals_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(renewal_slots._MARK, "")
    assert parents_mark() is None
    mark = mark_as_parent()
    assert mark_as_parent() == mark
    assert parents_mark() is None

    def emit(pipe: Any, descend: int) -> None:
        if descend:
            nested = FORK.Process(target=emit, args=(pipe, descend - 1))
            nested.start()
            nested.join()
        else:
            pipe.send(parents_mark())

    here, there = FORK.Pipe()
    for descend, expected in ((0, mark), (1, None)):
        process = FORK.Process(target=emit, args=(there, descend))
        process.start()
        process.join(30)
        assert here.recv() == expected


# -- the parent's side

TTL = 60.0
DONE = Ended("succeeded", "[]")


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """The app of this process, which renews the leases of the children that it forks."""
    monkeypatch.setenv(renewal_slots._MARK, "")
    mark_as_parent()
    made = Celery("shop", set_as_current=False)
    made.conf.update(
        singleton_store_url=f"sqlite:///{tmp_path}/store.db", singleton_auto_migrate=True
    )
    runtime_of(made).store.check()
    yield made
    close_runtime(made)


def hold(app: Celery, pipe: Any, key: str) -> None:
    """In the child: hold a lease, and send the reason through the pipe when it is lost."""
    own = runtime_of(app)
    holder, asked_at = own.new_holder(), clock()
    own.holder_files.note(HolderRecord(key, holder, 0))
    acquired = own.store.acquire(key, holder, TTL, None)
    assert acquired is not None
    held = HeldLease(acquired.lease, asked_at, TTL / 100)
    held.owner = RecordingOwner(lost=pipe.send)
    own.heartbeat_of(own.store).hold(held)
    pipe.send(acquired.lease)
    while True:
        signal.pause()


@pytest.fixture
def make_child(app: Celery) -> Iterator[Callable[[str], tuple[Any, Any, Any]]]:
    """Return a function that forks a child with a lease, and returns its process, pipe and
    lease.
    """
    made = []

    def make(key: str) -> tuple[Any, Any, Any]:
        here, there = FORK.Pipe()
        process = FORK.Process(target=hold, args=(app, there, key))
        process.start()
        made.append(process)
        return process, here, here.recv()

    yield make
    for process in made:
        process.kill()
        process.join(30)


def expires_at(app: Celery, key: str) -> float:
    row = runtime_of(app).store.peek(key)
    assert row is not None
    return row.read_at + (row.expires_in or 0.0)


def test_the_leases_of_stopped_children_are_renewed(
    app: Celery, make_child: Callable[[str], tuple[Any, Any, Any]]
) -> None:
    """A stopped child lives, but cannot renew its lease itself."""
    children = [make_child(key)[0] for key in ("a", "b", "c")]
    for process in children:
        os.kill(process.pid, signal.SIGSTOP)
    renewal = ParentRenewal(app, lambda: children)
    before = {key: expires_at(app, key) for key in ("a", "b", "c")}
    renewal.check()
    wait_until(
        lambda: all(expires_at(app, key) > before[key] + 0.1 for key in before), "all are renewed"
    )


def test_the_lease_of_a_dead_child_is_not_renewed(
    app: Celery, make_child: Callable[[str], tuple[Any, Any, Any]]
) -> None:
    """The child dies. The pool has not noticed it yet, and still lists the process."""
    process, _, lease = make_child("a")
    renewal = ParentRenewal(app, lambda: [process])
    renewal.check()
    assert set(renewal._leases) == {lease.holder}
    os.kill(process.pid, signal.SIGKILL)

    def dropped() -> bool:
        renewal.check()
        return not renewal._leases

    wait_until(dropped, "the lease is dropped")
    own = runtime_of(app)
    assert own.heartbeat_of(own.store)._held == set()


def test_the_lease_of_a_process_outside_the_pool_is_not_renewed(
    app: Celery, make_child: Callable[[str], tuple[Any, Any, Any]]
) -> None:
    """The lease of a former child is not renewed either, if a later child of the pool has the same
    id.
    """
    process, _, lease = make_child("a")
    renewal = ParentRenewal(app, lambda: pool)
    pool: list[Any] = []
    renewal.check()
    assert renewal._leases == {}
    pool = [process]
    renewal.check()
    assert set(renewal._leases) == {lease.holder}

    class Later:
        pid = process.pid

    pool = [Later()]
    renewal.check()
    assert renewal._leases == {}


def test_requests_to_another_parent_are_ignored(
    app: Celery,
    make_child: Callable[[str], tuple[Any, Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If two containers share the directory, their processes can have the same ids. So a process
    may find a request that is meant for a parent in the other container.
    """
    process, _, _ = make_child("a")
    monkeypatch.setenv(renewal_slots._MARK, "")
    renewal = ParentRenewal(app, lambda: [process])
    renewal.check()
    assert renewal._leases == {}


def test_a_stopped_child_learns_of_a_refusal_when_it_continues(
    app: Celery, make_child: Callable[[str], tuple[Any, Any, Any]]
) -> None:
    """The child is stopped. Its lease is released by another process. The parent's renewal is
    refused.

    The child continues. It learns of the refusal long before its own renewal would be due.
    """
    process, pipe, lease = make_child("a")
    os.kill(process.pid, signal.SIGSTOP)
    renewal = ParentRenewal(app, lambda: [process])
    renewal.check()
    assert runtime_of(app).store.release(lease, DONE)
    held = renewal._leases[lease.holder][0]
    wait_until(lambda: held.lost, "the renewal is refused")
    os.kill(process.pid, signal.SIGCONT)

    def hears() -> bool:
        renewal.check()
        return bool(pipe.poll())

    wait_until(hears, "the child is told")
    assert pipe.recv() == "its renewal was refused"
