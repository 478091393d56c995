"""Beats of a project whose tools wrap Celery's methods: no error of theirs ends one."""

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
    """Celery's own scheduler, with leadership."""


@pytest.fixture(params=[SingletonScheduler, Leading])
def kind(request: pytest.FixtureRequest) -> type[Any]:
    found: type[Any] = request.param
    return found


@pytest.fixture
def app(kind: type[Any]) -> Iterator[Celery]:
    """With two entries that are due all the time."""
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
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postponing, "FIRST_PAUSE", 0.05)


@pytest.fixture
def sent() -> Iterator[list[tuple[str, datetime]]]:
    """Entry and tick of all messages that were sent, in order."""
    found: list[tuple[str, datetime]] = []

    def note(sender: str, headers: dict[str, Any], **_: Any) -> None:
        found.append((headers[ENTRY].partition(":")[2], datetime.fromisoformat(headers[DUE])))

    signals.before_task_publish.connect(note)
    yield found
    signals.before_task_publish.disconnect(note)


@pytest.fixture
def make(app: Celery, kind: type[Any]) -> Iterator[Callable[[], Any]]:
    """Makes a beat as Celery does."""
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
    """Call the scheduler as Celery's beat does, until something is."""

    def tick() -> bool:
        scheduler.tick()
        return bool(until())

    wait_until(tick, "the beat has done it")


def test_celerys_method_is_called_as_celery_calls_it(
    make: Callable[[], Any], sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """sentry-sdk takes exactly two positional arguments, and ddtrace the entry by its position."""
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
        # Of a TypeError there, the message is to blame; of an OperationalError, the broker.
        ("apply_async", ValueError),
    ],
)
def test_what_a_wrapper_raises_over_an_entry(
    make: Callable[[], Any],
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: type[Exception],
) -> None:
    """It is logged with the entry's name; the other entry goes on; the tick is sent later, for the
    time at which it was due.
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
    """Not a hot loop; and the lease is renewed, because no pause is longer than that takes."""
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


def test_what_a_wrapper_raises_after_the_sending(
    make: Callable[[], Any],
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is logged, and the tick, which was sent, is not sent again."""
    celerys = Scheduler.apply_entry

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        celerys(*args, **kwargs)
        raise ValueError("a tool's")

    monkeypatch.setattr(Scheduler, "apply_entry", wrapped)
    run(make(), lambda: len(sent) >= 4)
    assert len(set(sent)) == len(sent)
    assert "was sent, but then" in caplog.text


@pytest.mark.parametrize("ends", [SystemExit, KeyboardInterrupt, NotLeading])
def test_what_is_to_end_a_tick_ends_it(
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


def test_a_beat_that_is_stopped_while_it_sends(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of the broker waits for its answer. The signal's handler closes the connection and
    raises SystemExit, in place of which the client raises an error over what is closed. The beat
    ends, and its log has no error of ours.
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
def test_what_a_wrapper_raises_over_the_whole_scheduler(
    make: Callable[[], Any],
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ddtrace wraps the method that looks for what is due, of which ours is not made."""
    tries: list[None] = []

    def before(*_: Any) -> None:
        if len(tries) < 2:
            tries.append(None)
            raise ValueError("a tool's")

    wrap(monkeypatch, Scheduler, "tick", before)
    run(make(), lambda: {"often", "bad"} <= set(names(sent)))
    assert caplog.text.count("the scheduler failed") == 2


@pytest.mark.parametrize("kind", [Leading], indirect=True)
def test_a_schedule_that_cannot_be_stored_by_its_class(
    make: Callable[[], Any],
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Celery stores it right after a sending: the message, which was sent, is not sent again."""

    def refuse(*_: Any) -> None:
        raise ValueError("the class's")

    wrap(monkeypatch, Scheduler, "sync", refuse)
    scheduler = make()
    scheduler.sync_every_tasks = 1
    run(scheduler, lambda: len(sent) >= 4)
    monkeypatch.undo()
    assert "could not store its schedule" in caplog.text
    assert len(set(sent)) == len(sent)


def test_a_schedule_that_cannot_be_read_at_a_take_over(
    app: Celery,
    kind: type[Any],
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A class reads its database whenever it is asked for its schedule, and that is down. The beat
    goes on, tries it again after longer and longer pauses, and leads meanwhile.
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


def test_a_leader_that_ends_leaves_the_tick_to_the_next(
    app: Celery,
    sent: list[tuple[str, datetime]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Any],
) -> None:
    """The first beat's tools fail, the second's do not: the tick that was due is sent by it."""
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
