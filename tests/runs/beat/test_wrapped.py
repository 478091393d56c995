"""Beats in which tracing tools wrap Celery's methods: no error of a wrapper ends the beat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
from celery import Celery, Task, signals
from celery.beat import Scheduler
from kombu.exceptions import OperationalError

from celery_singleton_state.beat import LeaderMixin, SingletonScheduler
from celery_singleton_state.beat import postponed as postponing
from celery_singleton_state.beat.leader import NotLeading
from celery_singleton_state.headers import DUE, ENTRY
from celery_singleton_state.runtime import close_runtime
from tests.helpers.waiting import wait_until

OFTEN = {"task": "t", "schedule": 0.4}


class Leading(LeaderMixin, Scheduler):
    """Celery's own scheduler with LeaderMixin: any number of its beats can run, and one leads."""


@pytest.fixture(params=[SingletonScheduler, Leading])
def kind(request: pytest.FixtureRequest) -> type[Any]:
    found: type[Any] = request.param
    return found


@pytest.fixture
def app(kind: type[Any]) -> Iterator[Celery]:
    """Return an app with two schedule entries that are due every 0.4 seconds."""
    entry = OFTEN | ({"catch_up": "all"} if kind is SingletonScheduler else {})
    made = Celery("shop", broker="memory://", set_as_current=False)
    made.conf.update(
        singleton_store_url="memory://",
        singleton_auto_migrate=True,
        result_expires=None,
        beat_schedule={"often": entry, "bad": entry},
    )

    @made.task(name="t", shared=False)
    def idle() -> None:
        pass

    yield made
    close_runtime(made)
    made.close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postponing, "FIRST_PAUSE", 0.05)


@pytest.fixture
def sent() -> Iterator[list[tuple[str, datetime]]]:
    """Return a list that gets the entry's name and the tick of each message that is sent."""
    found: list[tuple[str, datetime]] = []

    def note(sender: str, headers: dict[str, Any], **_: Any) -> None:
        found.append((headers[ENTRY].partition(":")[2], datetime.fromisoformat(headers[DUE])))

    signals.before_task_publish.connect(note)
    yield found
    signals.before_task_publish.disconnect(note)


@pytest.fixture
def make(app: Celery, kind: type[Any]) -> Iterator[Callable[[], Any]]:
    """Return a function that makes a beat's scheduler, as Celery's beat does."""
    made: list[Any] = []

    def make() -> Any:
        made.append(kind(app))
        return made[-1]

    yield make
    for each in made:
        each.close()


def names(sent: list[tuple[str, datetime]]) -> list[str]:
    return [name for name, _ in sent]


def run(scheduler: Any, until: Callable[[], Any]) -> None:
    """Call the scheduler's ``tick()``, as Celery's beat does, until a condition is true."""

    def tick() -> bool:
        scheduler.tick()
        return bool(until())

    wait_until(tick, "the beat has done it")


def test_apply_entry_is_called_with_the_arguments_that_celery_passes(
    make: Callable[[], Any], sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """sentry-sdk's wrapper takes exactly two positional arguments.

    ddtrace's wrapper finds the entry by its position among the arguments.
    """
    seen: list[tuple[Any, ...]] = []
    celerys = Scheduler.apply_entry

    def apply_entry(*args: Any, **kwargs: Any) -> Any:
        scheduler, entry = args
        seen.append((scheduler, type(entry), entry.name, frozenset(kwargs)))
        return celerys(*args, **kwargs)

    monkeypatch.setattr(Scheduler, "apply_entry", apply_entry)
    scheduler = make()
    run(scheduler, lambda: len(sent) >= 2)
    assert {each[:2] for each in seen} == {(scheduler, scheduler.Entry)}
    assert {each[3] for each in seen} == {frozenset({"producer"})}


def wrap(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, before: Any) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("apply_entry", ValueError),
        ("apply_entry", TypeError),
        ("apply_entry", OperationalError),
        # From ``apply_async`` only this error is tested: a TypeError would mean that the message
        # cannot be made, and an OperationalError that the broker is unavailable.
        ("apply_async", ValueError),
    ],
)
def test_an_error_of_a_wrapper_postpones_one_entry_only(
    make: Callable[[], Any],
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: type[Exception],
) -> None:
    """1. A tool's wrapper raises over one entry's tick, three times.
    2. The beat logs each error with the entry's name.
    3. The other entry's ticks are sent meanwhile.
    4. The first entry's tick is sent late. Its message has the time at which the tick was due.
    """
    tries: list[None] = []

    def before(*args: Any) -> None:
        name = args[1].name if where == "apply_entry" else app_entry.get("name")
        if name == "bad" and len(tries) < 3:
            tries.append(None)
            raise error("a tool's")

    app_entry: dict[str, Any] = {}
    if where == "apply_async":
        wrap(monkeypatch, LeaderMixin, "_send", lambda _, m, __: app_entry.update(name=m.name))
        wrap(monkeypatch, Task, "apply_async", before)
    else:
        wrap(monkeypatch, Scheduler, "apply_entry", before)
    scheduler = make()
    run(scheduler, lambda: "bad" in names(sent) and names(sent).count("often") > 1)
    assert len(tries) == 3
    lines = [record for record in caplog.records if "beat: bad, due at" in record.getMessage()]
    assert [record.levelno for record in lines] == [logging.ERROR] * 3
    due = min(due for name, due in sent if name == "bad")
    assert all(f"{due:%Y-%m-%d %H:%M:%S}" in record.getMessage() for record in lines[:1])
    assert len(set(sent)) == len(sent)


def test_a_beat_that_can_send_nothing_waits(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beat does not try again in a hot loop. Its pauses are short enough to renew the lease."""
    monkeypatch.setattr(postponing, "FIRST_PAUSE", 30.0)

    def refuse(*_: Any) -> None:
        raise ValueError("a tool's")

    wrap(monkeypatch, Scheduler, "apply_entry", refuse)
    scheduler = make()
    run(scheduler, lambda: caplog.text.count("could not be sent") == 2)
    pauses = [scheduler.tick() for _ in range(5)]
    assert min(pauses) > 0.5
    assert max(pauses) <= scheduler._leader.runtime.settings.heartbeat_interval
    assert caplog.text.count("could not be sent") == 2
    assert scheduler._leader.leads


def test_an_error_of_a_wrapper_after_sending_sends_nothing_twice(
    make: Callable[[], Any],
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The wrapper raises after the tick was sent. That is logged, and nothing is sent again."""
    celerys = Scheduler.apply_entry

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        celerys(*args, **kwargs)
        raise ValueError("a tool's")

    monkeypatch.setattr(Scheduler, "apply_entry", wrapped)
    run(make(), lambda: len(sent) >= 4)
    assert len(set(sent)) == len(sent)
    assert "was sent, but then" in caplog.text


@pytest.mark.parametrize("ends", [SystemExit, KeyboardInterrupt, NotLeading])
def test_exits_and_the_loss_of_the_lead_pass_through(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, ends: type[BaseException]
) -> None:
    seen: list[None] = []

    def before(*_: Any) -> None:
        seen.append(None)
        raise ends

    wrap(monkeypatch, Scheduler, "apply_entry", before)
    scheduler = make()
    if ends is NotLeading:
        run(scheduler, lambda: seen)
    else:
        with pytest.raises(ends):
            run(scheduler, lambda: False)


def test_a_stop_while_a_message_is_sent_ends_the_beat_without_an_error(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The broker's client waits for an answer.
    2. The signal's handler closes the beat and its connection, and raises SystemExit.
    3. The client raises an error over the closed connection instead.
    4. The beat ends, and logs no error.
    """
    scheduler: Any = None

    def before(*_: Any) -> None:
        scheduler.close()
        raise ValueError("I/O operation on closed file.")

    wrap(monkeypatch, Task, "apply_async", before)
    scheduler = make()
    with pytest.raises(SystemExit):
        run(scheduler, lambda: False)
    assert "could not be sent" not in caplog.text


@pytest.mark.parametrize("kind", [Leading], indirect=True)
def test_an_error_of_a_wrapper_around_the_scheduler_is_logged(
    make: Callable[[], Any],
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ddtrace wraps ``Scheduler.tick``, which a scheduler with LeaderMixin calls.

    SingletonScheduler does not call it.
    """
    tries: list[None] = []

    def before(*_: Any) -> None:
        if len(tries) < 2:
            tries.append(None)
            raise ValueError("a tool's")

    wrap(monkeypatch, Scheduler, "tick", before)
    run(make(), lambda: {"often", "bad"} <= set(names(sent)))
    assert caplog.text.count("the scheduler failed") == 2


@pytest.mark.parametrize("kind", [Leading], indirect=True)
def test_a_schedule_that_its_class_cannot_store_sends_nothing_twice(
    make: Callable[[], Any],
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Celery stores the schedule right after a message is sent. That fails, and is logged.

    The message is not sent again.
    """

    def refuse(*_: Any) -> None:
        raise ValueError("the class's")

    wrap(monkeypatch, Scheduler, "sync", refuse)
    scheduler = make()
    scheduler.sync_every_tasks = 1
    run(scheduler, lambda: len(sent) >= 4)
    monkeypatch.undo()
    assert "could not store its schedule" in caplog.text
    assert len(set(sent)) == len(sent)


def test_a_beat_leads_although_its_schedule_cannot_be_read(
    app: Celery,
    kind: type[Any],
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scheduler class reads its schedule from a database, which is unavailable.

    The beat leads meanwhile. It reads the schedule again after pauses that get longer.
    """
    broken, now = [False], [1000.0]
    monkeypatch.setattr(postponing, "clock", lambda: now[0])
    monkeypatch.setattr(postponing, "FIRST_PAUSE", 1.0)

    def read(self: Any) -> Any:
        if broken[0]:
            raise OSError("server closed the connection")
        return self.data

    scheduler = type("Own", (kind,), {"schedule": property(read, Scheduler.set_schedule)})(app)
    try:
        broken[0] = True
        for number, pause in ((1, 1.0), (2, 2.0), (3, 4.0)):
            for _ in range(3):
                assert 0 < scheduler.tick() <= pause
                assert caplog.text.count("the schedule could not be taken over") == number
            assert scheduler._leader.leads
            now[0] += pause
        broken[0] = False
        run(scheduler, lambda: {"often", "bad"} <= set(names(sent)))
    finally:
        broken[0] = False
        scheduler.close()


def test_a_tick_that_the_old_leader_could_not_send_is_sent_by_the_next(
    app: Celery,
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Any],
) -> None:
    """1. A wrapper fails in the first beat, so a due tick is not sent.
    2. The first beat ends.
    3. The second beat leads, without the wrapper, and sends that tick.
    """
    app.conf.beat_schedule = {"bad": app.conf.beat_schedule["bad"]}

    def refuse(*_: Any) -> None:
        raise ValueError("a tool's")

    with monkeypatch.context() as patch:
        wrap(patch, Scheduler, "apply_entry", refuse)
        first = kind(app)
        run(first, lambda: "could not be sent" in caplog.text)
        line = next(r.getMessage() for r in caplog.records if "beat: bad" in r.getMessage())
        first.close()
    second = kind(app)
    try:
        run(second, lambda: sent)
    finally:
        second.close()
    assert f"{sent[0][1]:%Y-%m-%d %H:%M:%S}" in line
