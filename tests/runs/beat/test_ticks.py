"""Ticks at the receiving end: a second copy is refused, on every store."""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.beat import ScheduleEntry
from celery.exceptions import Ignore, Reject, Retry

from celery_singleton_state import (
    HeartbeatFailed,
    SchemaDecodeFailed,
    SingletonTask,
    StatePersistFailed,
    ticks_done,
)
from celery_singleton_state.history import decode
from celery_singleton_state.hooks import Conflicted, Details
from celery_singleton_state.run import ending
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.ticks import message_of
from celery_singleton_state.ticks_done import EntryTicks
from tests.helpers.messages import deliver, deliver_all, received, use_own_queue
from tests.helpers.runs import idle, row, task_of
from tests.helpers.waiting import wait_until

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def options_of(
    app: Celery,
    due: datetime,
    entry: str = "e",
    beat: str = "shop",
    previous: datetime | None = None,
    one_by_one: bool = False,
) -> dict[str, Any]:
    """What a beat's message for a tick has, as JSON makes it."""
    made = ScheduleEntry(name=entry, task="count", schedule=60, app=app)
    message = message_of(made, beat, due, previous, one_by_one)
    options: dict[str, Any] = json.loads(json.dumps(message.options))
    return options


def in_chain(app: Celery, number: int, **more: Any) -> dict[str, Any]:
    """The message of a tick which names the one that was sent a second before."""
    due = NOON + number * SECOND
    return options_of(app, due, previous=due - SECOND, **more)


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
    with pytest.raises(RuntimeError, match="tick is available only while its body runs"):
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


@pytest.mark.parametrize("seed", [None, 1])
def test_what_was_done_is_known_however_many_runs_came_between(
    app: Celery, seed: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """60 ticks are owed, and their messages overtake each other: each runs once, also those older
    than all that the history of 16 holds. Each second copy is refused, and that is a warning.
    """
    ran: list[datetime | None] = []
    task = counting(app, ran)
    numbers = list(range(60))
    if seed:
        random.Random(seed).shuffle(numbers)
    for number in numbers:
        task.apply(**in_chain(app, number))
    assert ran == [NOON + number * SECOND for number in numbers]
    assert "was done before" not in caplog.text
    for number in numbers:
        task.apply(**in_chain(app, number))
    assert len(ran) == 60
    refused = [record for record in caplog.records if "was done before" in record.message]
    assert len(refused) == 60
    assert {record.levelno for record in refused} == {logging.WARNING}
    assert "for tick 2026-11-24 12:00:07 of shop:e" in caplog.text


def test_a_tick_that_its_row_knows_as_done_does_not_wait_for_the_lease(app: Celery) -> None:
    """Its history has forgotten it, and another run holds the lease."""
    ran: list[datetime | None] = []
    task = counting(app, ran, on_conflict="raise")
    for number in range(20):
        task.apply(**in_chain(app, number))
    assert runtime_of(app).store.acquire("singleton-state:count", "another", 60, "t")
    assert task.apply(**in_chain(app, 0)).successful()


def test_a_tick_whose_retry_is_under_way_has_not_ended(app: Celery) -> None:
    """20 other ticks end before the retry comes; and a copy of the retry is refused."""
    tries: list[int] = []

    def body(self: Any) -> None:
        tries.append(self.request.retries)
        if self.tick == NOON and not self.request.retries:
            raise Retry("later")

    task = task_of(app, body)
    for number in range(20):
        task.apply(**in_chain(app, number))
    known = known_ticks(app)
    assert (known.retried, known.is_done(NOON.timestamp())) == ((NOON.timestamp(),), False)
    for _ in range(2):
        task.apply(retries=1, **in_chain(app, 0))
    assert tries == [0] * 20 + [1]
    assert known_ticks(app).retried == ()
    assert len(known_ticks(app).done) == 1


def known_ticks(app: Celery) -> EntryTicks:
    return ticks_done.decode(row(app).ticks_done, "")["shop:e"]


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (ValueError("bad"), True),
        (Ignore(), True),
        (Reject(requeue=False), True),
        (Reject(requeue=True), False),
        (SchemaDecodeFailed("count", "bad"), True),
        (StatePersistFailed("count", "away"), False),
        (StatePersistFailed("another", "away"), True),
    ],
)
def test_a_tick_that_failed_for_good_has_ended(
    app: Celery, error: Exception, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is not done: a second copy is run. A message that comes again has not ended."""
    monkeypatch.setattr(SingletonTask, "_answer", lambda *_: None)
    tries: list[int] = []

    def body(self: Any) -> None:
        tries.append(1)
        raise error

    task = task_of(app, body)
    for _ in range(2):
        task.apply(**in_chain(app, 0))
    assert len(tries) == 2
    known = known_ticks(app)
    assert known.has_ended(NOON.timestamp()) is ended
    assert not known.is_done(NOON.timestamp())


def test_a_copy_of_a_one_by_one_tick_that_failed_for_good_is_refused(
    memory_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    """Beat sends it again while its first message waits; the next tick may run by then. A retry
    of the tick is none of these copies.
    """
    ran: list[int] = []

    def body(self: Any) -> None:
        ran.append(self.request.retries)
        raise ValueError("bad")

    task = task_of(memory_app, body)
    message = in_chain(memory_app, 0, one_by_one=True)
    for _ in range(3):
        task.apply(**message)
    assert ran == [0]
    assert outcomes(memory_app) == ["failed", "duplicate", "duplicate"]
    assert "has failed for good before, for tick 2026-11-24 12:00:00 of shop:e" in caplog.text
    known = known_ticks(memory_app)
    assert (known.failed, known.done) == ((NOON.timestamp(),), ())
    task.apply(retries=1, **message)
    assert ran == [0, 1]


@pytest.mark.parametrize("by", ["another task", "another singleton"])
def test_a_tick_whose_run_is_replaced_by_something_else_is_done(
    memory_app: Celery, by: str
) -> None:
    use_own_queue(memory_app)
    ticks: list[datetime | None] = []

    @memory_app.task(name="plain", shared=False)
    def plain() -> None:
        ticks.append(None)

    def body(self: Any, key: str = "a") -> None:
        if key == "a":
            raise self.replace(plain.s() if by == "another task" else self.s("b"))
        ticks.append(self.tick)

    task = task_of(memory_app, body, state_schema=None, unique_on=lambda key="a": key)
    task.apply_async(**in_chain(memory_app, 0, one_by_one=True))
    (message,) = received(memory_app)
    deliver(memory_app, message)
    known = ticks_done.decode(row(memory_app, task._name((), {})).ticks_done, "")["shop:e"]
    assert (known.is_done(NOON.timestamp()), known.retried) == (True, ())
    deliver_all(memory_app)
    assert ticks == [None]


def test_a_tick_whose_run_was_asked_to_stop_has_failed_for_good(memory_app: Celery) -> None:
    """A newer message takes its place, and its own does not come again."""

    def body(self: Any) -> None:
        requests = runtime_of(memory_app).store.requests
        assert requests.request_handoff(row(memory_app), "newer")
        self.checkpoint()

    task = task_of(memory_app, body, on_conflict="replace")
    result = task.apply(**in_chain(memory_app, 0))
    assert isinstance(result.result, HeartbeatFailed)
    assert outcomes(memory_app) == ["lost"]
    known = known_ticks(memory_app)
    assert (known.failed, known.done) == ((NOON.timestamp(),), ())


def test_runs_that_are_no_ticks_leave_what_is_known(app: Celery) -> None:
    ran: list[datetime | None] = []
    task = counting(app, ran)
    task.apply(**in_chain(app, 0))
    known = row(app).ticks_done
    task()
    task.apply(task_id="by hand")
    assert row(app).ticks_done == known is not None


def test_gaps_that_are_too_many_are_closed_with_a_warning(
    app: Celery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other tick is missing; a gap that was given up is refused, with a warning, too."""
    monkeypatch.setattr(ending, "SPANS_OF_WAITING", 3)
    ran: list[datetime | None] = []
    task = counting(app, ran, on_conflict="wait")
    for number in range(0, 10, 2):
        task.apply(**in_chain(app, number))
    assert caplog.text.count("done ticks of schedule entry shop:e has too many gaps") == 2
    task.apply(**in_chain(app, 1))
    task.apply(**in_chain(app, 7))
    assert [tick and (tick - NOON) // SECOND for tick in ran] == [0, 2, 4, 6, 8, 7]
    assert "for tick 2026-11-24 12:00:01 of shop:e" in caplog.text


@pytest.mark.parametrize("policy", ["skip", "raise", "coalesce", "wait", "replace"])
def test_a_tick_that_is_sent_one_by_one_waits_for_the_lease(
    make_app: Callable[..., Celery], policy: str
) -> None:
    """A run by hand holds the lease, of whatever policy the task is: no day is skipped."""
    seen: list[Details] = []
    app = make_app(singleton_hooks=[seen.append])
    ran: list[datetime | None] = []
    task = counting(app, ran, on_conflict=policy, conflict_timeout=0)
    store = runtime_of(app).store
    held = store.acquire("singleton-state:count", "by hand", 60, "t")
    assert held is not None
    thread = threading.Thread(
        target=lambda: task.apply(**in_chain(app, 0, one_by_one=True)), daemon=True
    )
    thread.start()
    wait_until(lambda: any(isinstance(each, Conflicted) for each in seen), "it is a conflict")
    assert [each.policy for each in seen if isinstance(each, Conflicted)] == ["wait"]
    assert not ran
    assert row(app).handoff_to is None
    store.give_back("singleton-state:count", "by hand")
    thread.join(30)
    assert ran == [NOON]


def test_enqueue_once_keeps_no_owed_tick_back(app: Celery, published: list[str]) -> None:
    app.conf.broker_url = "memory://"
    task = task_of(app, idle, enqueue_once=True)
    task.apply_async(task_id="by hand")
    owed = in_chain(app, 0, one_by_one=True)
    assert task.apply_async(**owed).id == owed["task_id"]
    assert published == ["by hand", owed["task_id"]]


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
