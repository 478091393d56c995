"""A run that is interrupted, through its task: what the caller and the row say of it."""

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
    """From here on the store refuses to renew the lease of a singleton."""
    store = runtime_of(app).store
    renew = store.renew

    def refuse(leases: Any) -> Any:
        return renew([lease for lease in leases if not lease.key.endswith(f":{name}")])

    monkeypatch.setattr(store, "renew", refuse)


def test_no_retry_is_made_of_it(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task retries over every ``Exception``, and its body swallows some."""
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


def test_who_asks_for_the_lease_gets_it_from_a_body_that_catches_everything(app: Celery) -> None:
    """The holder's heartbeat hears of the wish; the body catches the first interruption."""
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
def test_a_run_within_a_lost_one_is_released_and_the_lost_one_ends(
    app: Celery, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The outer run is lost while the inner one's body works, called directly or eagerly."""
    went_on: list[str] = []

    def inner_body(self: Any) -> None:
        lose(app, monkeypatch, "count")
        wait_until(never, "it is interrupted")

    inner = task_of(app, inner_body, name="inner")

    def body(self: Any) -> None:
        try:
            inner() if way == "called" else inner.apply()
        except Exception:
            went_on.append("the interruption passed for the inner run's failure")

    with pytest.raises(HeartbeatFailed) as caught:
        task_of(app, body, lease_ttl=1)()
    assert caught.value.singleton == "count"
    assert went_on == []
    found = row(app, "inner")
    assert (found.last_outcome, found.holder) == ("failed", None)
    (entry,) = decode(found.history, "inner")
    assert entry.error is not None
    assert entry.error.startswith("RunInterrupted: count: the lease with fence")
