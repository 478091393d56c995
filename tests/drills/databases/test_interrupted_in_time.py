"""Promise P1: a lost run is interrupted early enough to tidy up before the next run begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state import LeaderHandoffFailed, singleton_task
from tests.helpers.fleet import outcome
from tests.helpers.servers import Postgres
from tests.helpers.shop import Shop


@pytest.mark.parametrize(
    ("pool", "tidies"),
    [
        (("-P", "prefork", "-c", "1"), 0.05),
        (("-P", "prefork", "-c", "1"), 0.5),
        (("-P", "threads", "-c", "1"), 0.05),
    ],
)
def test_a_body_that_tidies_up_has_left_before_the_next_one_begins(
    own_postgres: Postgres,
    make_shop: Callable[..., Shop],
    client: Callable[[], Celery],
    monkeypatch: pytest.MonkeyPatch,
    pool: tuple[str, ...],
    tidies: float,
) -> None:
    """A worker's connection to the store falls silent, and its lease, which has the default life,
    expires. The worker's body is interrupted and tidies up in its ``finally``. Another process,
    with a working connection, asks for the lease all the time. Its body begins only after the first
    body has left.
    """
    shop = make_shop(own_postgres)
    shop.start(*pool)
    app = client()
    result = app.send_task("steps", (["stay", tidies],))
    shop.fleet.wait_for_notes("on")
    shop.proxy.mode = "mute"

    monkeypatch.setenv("CELERY_SINGLETON_STORE_URL", shop.database)

    def body(self: Any) -> float:
        return time.monotonic()

    task: Any = singleton_task(app, name="steps", shared=False, on_conflict="raise")(body)
    entered = first_result(task)

    (left,) = shop.fleet.wait_for_notes("off")
    assert left["at"] < entered
    shop.proxy.mode = "pass"
    outcome(result)


def first_result(task: Any) -> Any:
    """Call the task until it gets the lease; return the run's result."""
    while True:
        try:
            return task()
        except LeaderHandoffFailed:
            continue
