"""Ticks at the receiving end: a second copy is refused, on every store."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.beat import ScheduleEntry

from celery_singleton_state.history import decode
from celery_singleton_state.ticks import message_of
from tests.runs.test_enqueue_once import published
from tests.runs.test_run import idle, row, task_of

__all__ = ["published"]

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def options_of(app: Celery, due: datetime, entry: str = "e", beat: str = "shop") -> dict[str, Any]:
    """What a beat's message for a tick has, as JSON makes it."""
    made = ScheduleEntry(name=entry, task="count", schedule=60, app=app)
    options: dict[str, Any] = json.loads(json.dumps(message_of(made, beat, due).options))
    return options


def counting(app: Celery, ran: list[datetime | None], **options: Any) -> Any:
    def body(self: Any) -> None:
        ran.append(self.tick)

    return task_of(app, body, **({"state_schema": None} | options))


def outcomes(app: Celery) -> list[str]:
    return [run.outcome for run in decode(row(app).history, "")]


def test_every_beat_makes_the_same_id_of_a_tick(app: Celery) -> None:
    berlin = datetime.fromisoformat("2026-11-24T13:00:00+01:00")
    assert options_of(app, NOON) == options_of(app, berlin)
    ids = {
        options_of(app, *tick)["task_id"]
        for tick in [(NOON,), (NOON + SECOND,), (NOON, "f"), (NOON, "e", "other")]
    }
    assert len(ids) == 4


def test_a_run_knows_its_tick(app: Celery) -> None:
    ran: list[datetime | None] = []
    task = counting(app, ran)
    task.apply(**options_of(app, NOON))
    task.apply()
    task()
    assert ran == [NOON, None, None]
    assert ran[0] is not None
    assert ran[0].tzinfo is UTC
    with pytest.raises(RuntimeError, match="tick is there only while its body runs"):
        _ = task.tick


@pytest.mark.parametrize("options", [{}, {"deduplicate": True}], ids=["by default", "told"])
def test_a_second_copy_is_refused(app: Celery, options: dict[str, Any]) -> None:
    """Of singletons without state as well, which do run again what is no tick."""
    ran: list[datetime | None] = []
    task = counting(app, ran, **options)
    for due in (NOON, NOON + SECOND, NOON, NOON + SECOND, NOON + 2 * SECOND):
        task.apply(**options_of(app, due))
    assert ran == [NOON, NOON + SECOND, NOON + 2 * SECOND]
    assert outcomes(app) == [*["succeeded"] * 2, *["duplicate"] * 2, "succeeded"]


def test_without_deduplication_it_is_run_again(app: Celery) -> None:
    ran: list[datetime | None] = []
    task = counting(app, ran, deduplicate=False)
    for _ in range(2):
        task.apply(**options_of(app, NOON))
    assert ran == [NOON, NOON]


def test_a_tick_that_failed_is_run_again(app: Celery) -> None:
    """Only what was done is refused."""
    tries: list[int] = []

    def body(self: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("the first time")

    task = task_of(app, body)
    for _ in range(3):
        task.apply(**options_of(app, NOON))
    assert outcomes(app) == ["failed", "succeeded", "duplicate"]


def test_ticks_may_come_out_of_order(app: Celery) -> None:
    """Two workers take two ticks from the queue, and the later one runs first: with nothing
    forgotten, an older tick that is not known is new.
    """
    ran: list[datetime | None] = []
    task = counting(app, ran)
    for due in (NOON + SECOND, NOON, NOON - SECOND):
        task.apply(**options_of(app, due))
    assert ran == [NOON + SECOND, NOON, NOON - SECOND]


def test_a_copy_hours_later_is_refused(make_app: Callable[..., Celery]) -> None:
    """The history is full, and has forgotten the tick: it cannot be known to be new."""
    app = make_app(singleton_history=3)
    ran: list[datetime | None] = []
    task = counting(app, ran)
    ticks = [NOON + number * SECOND for number in range(5)]
    for due in ticks:
        task.apply(**options_of(app, due))
    for due in (*ticks, NOON - SECOND):
        task.apply(**options_of(app, due))
    assert ran == ticks
    assert outcomes(app) == [*["succeeded"] * 3, *["duplicate"] * 3]


def test_copies_that_are_refused_do_not_open_the_way_for_more(
    make_app: Callable[..., Celery],
) -> None:
    """The history holds ticks 3 and 4; a copy of 1 is refused and noted there; then comes 2."""
    app = make_app(singleton_history=3)
    ran: list[datetime | None] = []
    task = counting(app, ran)
    ticks = [NOON + number * SECOND for number in range(5)]
    for due in (*ticks, ticks[1], ticks[2]):
        task.apply(**options_of(app, due))
    assert ran == ticks


def test_another_entrys_ticks_do_not_count(make_app: Callable[..., Celery]) -> None:
    """One singleton, two entries: that one is behind the other means nothing."""
    app = make_app(singleton_history=3)
    ran: list[datetime | None] = []
    task = counting(app, ran)
    for number in range(4):
        task.apply(**options_of(app, NOON + number * SECOND))
    task.apply(**options_of(app, NOON - SECOND, "another"))
    assert ran[-1] == NOON - SECOND


def test_a_retry_of_an_old_tick_is_run(make_app: Callable[..., Celery]) -> None:
    app = make_app(singleton_history=2)
    task = task_of(app, idle, state_schema=None)
    for number in range(3):
        task.apply(**options_of(app, NOON + number * SECOND))
    task.apply(retries=1, **options_of(app, NOON - SECOND))
    assert outcomes(app)[-1] == "succeeded"


def test_enqueue_once_holds_for_ticks(app: Celery, published: list[str]) -> None:
    """A tick is not published while another message is queued, and the queued one is its own."""
    app.conf.broker_url = "memory://"
    task = task_of(app, idle, enqueue_once=True)
    first = options_of(app, NOON)
    assert task.apply_async(**first).id == first["task_id"]
    assert task.apply_async(**options_of(app, NOON + SECOND)).id == first["task_id"]
    assert published == [first["task_id"]]


def test_what_else_a_message_carries_stays(app: Celery) -> None:
    options = {"queue": "q", "headers": {"mine": 1}}
    made = ScheduleEntry(name="e", task="count", schedule=60, app=app, options=options)
    sent = message_of(made, "shop", NOON)
    assert sent.options["queue"] == "q"
    assert sent.options["headers"]["mine"] == 1
    assert made.options == {"queue": "q", "headers": {"mine": 1}}
    assert (sent.app, sent.name, sent.task) == (app, "e", "count")
