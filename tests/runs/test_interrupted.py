"""A run that is interrupted: which error its caller gets, and what its row then holds."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state import HeartbeatFailed
from celery_singleton_state.history import decode
from celery_singleton_state.run import interrupt
from celery_singleton_state.runtime import runtime_of
from tests.helpers.runs import row, task_of
from tests.helpers.waiting import wait_until


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGURG)
    yield
    interrupt._forget()
    signal.signal(signal.SIGURG, before)


def never() -> bool:
    return False


def lose(app: Celery, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make the store refuse each further renewal of a singleton's lease."""
    store = runtime_of(app).store
    renew = store.renew

    def refuse(leases: Any) -> Any:
        return renew([lease for lease in leases if not lease.key.endswith(f":{name}")])

    monkeypatch.setattr(store, "renew", refuse)


def test_an_interrupted_run_is_not_retried(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task asks for retries over every ``Exception``. Its body catches every ``Exception``."""
    attempts: list[int] = []

    def body(self: Any) -> None:
        attempts.append(self.request.retries)
        lose(app, monkeypatch, "count")
        while True:
            try:
                wait_until(never, "it is interrupted")
            except Exception:
                attempts.append(-1)

    task = task_of(app, body, lease_ttl=1, autoretry_for=(Exception,), default_retry_delay=0)
    with pytest.raises(HeartbeatFailed, match="its renewal was refused") as caught:
        task()
    assert type(caught.value) is HeartbeatFailed
    assert attempts == [0]


def test_a_body_that_catches_everything_is_interrupted_for_a_handoff(app: Celery) -> None:
    """1. Another task asks for the lease.
    2. The holder's heartbeat learns of this request, and interrupts the body.
    3. The body catches the interruption.
    4. A second interruption ends the body.
    """
    store = runtime_of(app).store
    caught: list[str] = []

    def body(self: Any) -> None:
        assert store.requests.request_handoff(row(app), "task-2")
        try:
            wait_until(never, "it is interrupted")
        except BaseException as error:
            caught.append(type(error).__name__)
        wait_until(never, "it is interrupted again")

    with pytest.raises(HeartbeatFailed, match="asked to hand over to task-2"):
        task_of(app, body, lease_ttl=1)()
    assert caught == ["RunInterrupted"]
    assert (row(app).last_outcome, row(app).holder) == ("lost", None)


@pytest.mark.parametrize("way", ["called", "applied"])
def test_an_inner_run_is_released_when_its_outer_run_is_lost(
    app: Celery, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """1. The outer run's body calls another singleton.
    2. The outer run's lease is lost.
    3. The interruption ends both bodies.
    4. The inner run is released as failed.
    """
    went_on: list[str] = []

    def inner_body(self: Any) -> None:
        lose(app, monkeypatch, "count")
        wait_until(never, "it is interrupted")

    inner = task_of(app, inner_body, name="inner")

    def body(self: Any) -> None:
        try:
            inner() if way == "called" else inner.apply()
        except Exception:
            went_on.append("the outer body caught the interruption as an error of the inner run")

    with pytest.raises(HeartbeatFailed) as caught:
        task_of(app, body, lease_ttl=1)()
    assert caught.value.singleton == "count"
    assert went_on == []
    found = row(app, "inner")
    assert (found.last_outcome, found.holder) == ("failed", None)
    (entry,) = decode(found.history, "inner")
    assert entry.error is not None
    assert entry.error.startswith("RunInterrupted: count: the lease with fence")
