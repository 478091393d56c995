"""Deliveries of ticks: a second copy of a tick's message is refused, on every store."""

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
    """Return the options of a beat's message for a tick, as they arrive after a round trip through
    JSON.
    """
    made = ScheduleEntry(name=entry, task="count", schedule=60, app=app)
    message = message_of(made, beat, due, previous, one_by_one)
    options: dict[str, Any] = json.loads(json.dumps(message.options))
    return options


def in_chain(app: Celery, number: int, **more: Any) -> dict[str, Any]:
    """Return the message of the tick ``number`` seconds after noon.

    The message names the tick of a second earlier as the previous tick.
    """
    due = NOON + number * SECOND
    return options_of(app, due, previous=due - SECOND, **more)


def counting(app: Celery, ran: list[datetime | None], **options: Any) -> Any:
    def body(self: Any) -> None:
        ran.append(self.tick)

    return task_of(app, body, **({"state_schema": None} | options))


def outcomes(app: Celery) -> list[str]:
    return [run.outcome for run in decode(row(app).history, "")]


def test_every_beat_gives_a_tick_the_same_task_id(app: Celery) -> None:
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


@pytest.mark.parametrize(
    "options", [{}, {"deduplicate": True}], ids=["by default", "deduplicate=True"]
)
def test_a_second_copy_of_a_tick_is_refused(app: Celery, options: dict[str, Any]) -> None:
    """The singleton has no state, so by default a second copy of a message without a tick would
    run.
    """
    ran: list[datetime | None] = []
    task = counting(app, ran, **options)
    for due in (NOON, NOON + SECOND, NOON, NOON + SECOND, NOON + 2 * SECOND):
        task.apply(**options_of(app, due))
    assert ran == [NOON, NOON + SECOND, NOON + 2 * SECOND]
    assert outcomes(app) == [*["succeeded"] * 2, *["duplicate"] * 2, "succeeded"]


def test_without_deduplication_a_second_copy_of_a_tick_runs(app: Celery) -> None:
    ran: list[datetime | None] = []
    task = counting(app, ran, deduplicate=False)
    for _ in range(2):
        task.apply(**options_of(app, NOON))
    assert ran == [NOON, NOON]


def test_a_tick_that_failed_is_run_again(app: Celery) -> None:
    """A tick's copy is refused only if the tick was done.

    Here the first run fails, so the second copy runs. The third copy is refused.
    """
    tries: list[int] = []

    def body(self: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("the first time")

    task = task_of(app, body)
    for _ in range(3):
        task.apply(**options_of(app, NOON))
    assert outcomes(app) == ["failed", "succeeded", "duplicate"]


def test_ticks_that_arrive_out_of_order_all_run(app: Celery) -> None:
    """Workers take ticks from the queue, and the later tick runs first.

    The history has dropped no tick yet, so an older tick that it lacks was not done.
    """
    ran: list[datetime | None] = []
    task = counting(app, ran)
    for due in (NOON + SECOND, NOON, NOON - SECOND):
        task.apply(**options_of(app, due))
    assert ran == [NOON + SECOND, NOON, NOON - SECOND]


def test_a_copy_of_a_tick_that_the_history_has_dropped_is_refused(
    make_app: Callable[..., Celery],
) -> None:
    """The history is full, so an old tick that it lacks may have been done. It is refused."""
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


def test_refused_copies_in_the_history_let_no_other_copy_run(
    make_app: Callable[..., Celery],
) -> None:
    """1. The history holds the ticks 2, 3, 4 of an entry.
    2. A copy of tick 1 is refused, and the history records the duplicate.
    3. A copy of tick 2 is delivered, and refused, too.
    """
    app = make_app(singleton_history=3)
    ran: list[datetime | None] = []
    task = counting(app, ran)
    ticks = [NOON + number * SECOND for number in range(5)]
    for due in (*ticks, ticks[1], ticks[2]):
        task.apply(**options_of(app, due))
    assert ran == ticks


def test_ticks_of_another_entry_do_not_count(make_app: Callable[..., Celery]) -> None:
    """Two entries send to one singleton. A tick of the second entry runs, although the first
    entry's later ticks were done.
    """
    app = make_app(singleton_history=3)
    ran: list[datetime | None] = []
    task = counting(app, ran)
    for number in range(4):
        task.apply(**options_of(app, NOON + number * SECOND))
    task.apply(**options_of(app, NOON - SECOND, "another"))
    assert ran[-1] == NOON - SECOND


def test_a_retry_of_an_old_tick_runs(make_app: Callable[..., Celery]) -> None:
    app = make_app(singleton_history=2)
    task = task_of(app, idle, state_schema=None)
    for number in range(3):
        task.apply(**options_of(app, NOON + number * SECOND))
    task.apply(retries=1, **options_of(app, NOON - SECOND))
    assert outcomes(app)[-1] == "succeeded"


@pytest.mark.parametrize("seed", [None, 1])
def test_a_copy_of_a_tick_is_refused_however_many_runs_came_between(
    app: Celery, seed: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """60 ticks are sent, and their messages overtake each other.

    Each tick runs once, also if it is older than all 16 entries of the history. Each second copy is
    refused with a warning.
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


def test_a_copy_of_a_tick_does_not_wait_for_the_lease(app: Celery) -> None:
    """The history has dropped the tick, and another run holds the lease.

    The row's ``ticks_done`` still has the tick, so its copy ends at once.
    """
    ran: list[datetime | None] = []
    task = counting(app, ran, on_conflict="raise")
    for number in range(20):
        task.apply(**in_chain(app, number))
    assert runtime_of(app).store.acquire("singleton-state:count", "another", 60, "t")
    assert task.apply(**in_chain(app, 0)).successful()


def test_a_tick_whose_retry_is_pending_has_not_ended(app: Celery) -> None:
    """1. A tick's run asks for a retry.
    2. 19 other ticks end.
    3. The retry runs, and the tick is done.
    4. A copy of the retry is refused.
    """
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
    """A tick has ended if an error ends its run and the message is not sent again after this error.

    The tick is not done, so a second copy runs. After other errors the message is sent again, and
    the tick has not ended.
    """
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
    """1. A beat sends its ticks one by one. It sends one of them again while the tick's first
       message waits.
    2. The first message runs, and fails for good.
    3. The copies are refused, because the next tick may have run meanwhile.
    4. A retry of the tick is not a copy, and runs.
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
def test_a_tick_whose_run_is_replaced_by_another_task_is_done(memory_app: Celery, by: str) -> None:
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
    """A newer message replaces the tick's run, and the tick's message is not sent again."""

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


def test_runs_without_a_tick_leave_the_done_ticks_as_they_are(app: Celery) -> None:
    ran: list[datetime | None] = []
    task = counting(app, ran)
    task.apply(**in_chain(app, 0))
    known = row(app).ticks_done
    task()
    task.apply(task_id="by hand")
    assert row(app).ticks_done == known is not None


def test_too_many_gaps_between_ticks_are_closed_with_a_warning(
    app: Celery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second tick is missing. When there are too many gaps, the oldest one is closed.

    A tick within a closed gap is refused with a warning.
    """
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
    """Another run holds the lease. The tick waits, whatever the task's policy is, so that no tick
    is skipped.
    """
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
    wait_until(
        lambda: any(isinstance(each, Conflicted) for each in seen), "the tick finds the lease taken"
    )
    assert [each.policy for each in seen if isinstance(each, Conflicted)] == ["wait"]
    assert not ran
    assert row(app).handoff_to is None
    store.give_back("singleton-state:count", "by hand")
    thread.join(30)
    assert ran == [NOON]


def test_enqueue_once_does_not_drop_an_owed_tick(app: Celery, published: list[str]) -> None:
    app.conf.broker_url = "memory://"
    task = task_of(app, idle, enqueue_once=True)
    task.apply_async(task_id="by hand")
    owed = in_chain(app, 0, one_by_one=True)
    assert task.apply_async(**owed).id == owed["task_id"]
    assert published == ["by hand", owed["task_id"]]


def test_enqueue_once_counts_for_ticks(app: Celery, published: list[str]) -> None:
    """A tick is published. The next tick is not published while the first one is queued."""
    app.conf.broker_url = "memory://"
    task = task_of(app, idle, enqueue_once=True)
    first = options_of(app, NOON)
    assert task.apply_async(**first).id == first["task_id"]
    assert task.apply_async(**options_of(app, NOON + SECOND)).id == first["task_id"]
    assert published == [first["task_id"]]


def test_a_ticks_message_keeps_the_entrys_options_and_headers(app: Celery) -> None:
    options = {"queue": "q", "headers": {"mine": 1}}
    made = ScheduleEntry(name="e", task="count", schedule=60, app=app, options=options)
    sent = message_of(made, "shop", NOON)
    assert sent.options["queue"] == "q"
    assert sent.options["headers"]["mine"] == 1
    assert made.options == {"queue": "q", "headers": {"mine": 1}}
    assert (sent.app, sent.name, sent.task) == (app, "e", "count")
