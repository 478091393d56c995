"""The dispatcher: hooks get the events of a run in order, and never delay or fail a run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state import HeartbeatFailed, SingletonTask, signals, singleton_task
from celery_singleton_state.history import DIED
from celery_singleton_state.hooks import (
    Acquired,
    Conflicted,
    Details,
    Lost,
    Released,
    Skipped,
    StateSaved,
    TookOver,
    WriteRefused,
    dispatcher,
    events,
)
from celery_singleton_state.hooks.details import KINDS
from celery_singleton_state.hooks.dispatcher import Dispatcher
from celery_singleton_state.recovery import end_for
from celery_singleton_state.runtime import runtime_of
from tests.helpers.details import EXAMPLES
from tests.helpers.waiting import wait_until


class Seen:
    """A hook that remembers the details of all events."""

    def __init__(self) -> None:
        self.details: list[Details] = []

    def __call__(self, details: Details) -> None:
        self.details.append(details)

    def kinds(self) -> list[str]:
        return [type(each).__name__ for each in self.details]


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def connected() -> Iterator[Callable[..., None]]:
    """Return a function that connects a receiver to signals until the test ends."""
    made: list[tuple[Any, Any]] = []

    def connect(receiver: Any, *chosen: Any) -> None:
        for signal in chosen:
            signal.connect(receiver, weak=False)
            made.append((signal, receiver))

    yield connect
    for signal, receiver in made:
        signal.disconnect(receiver)


def use(app: Celery, *hooks: Any) -> None:
    app.conf.singleton_hooks = list(hooks)


@dataclass
class Count:
    n: int = 0


def make_task(app: Celery, body: Callable[[SingletonTask[Count]], Any]) -> SingletonTask[Count]:
    def run(self: SingletonTask[Count]) -> Any:
        return body(self)

    return singleton_task(app, name="t", state_schema=Count, shared=False)(run)


def add(self: SingletonTask[Count]) -> int:
    """Count up by one: the body of most tests."""
    self.state.n += 1
    return self.state.n


def flush(app: Celery) -> None:
    runtime_of(app).dispatcher.close()


def test_each_kind_of_details_can_be_rebuilt_from_its_event() -> None:
    assert {type(example) for example in EXAMPLES} == set(KINDS)
    for example in EXAMPLES:
        event = events.msgspec.to_builtins(example)
        assert event["type"].startswith("singleton-")
        # Celery adds these fields to each event.
        event |= {"hostname": "w@h", "pid": 1, "clock": 3, "utcoffset": 0, "local_received": 1.0}
        assert events.details_of(event) == example


def test_a_hook_gets_the_events_of_a_run_in_order(memory_app: Celery, seen: Seen) -> None:
    use(memory_app, seen)

    def body(self: SingletonTask[Count]) -> None:
        self.state.n = 1
        self.checkpoint()
        self.state.n = 2

    make_task(memory_app, body)()
    flush(memory_app)
    assert seen.kinds() == ["Acquired", "StateLoaded", "StateSaved", "StateSaved", "Released"]
    assert [each.operation for each in seen.details if isinstance(each, StateSaved)] == [
        "checkpoint",
        "save",
    ]
    ended = seen.details[-1]
    assert isinstance(ended, Released)
    assert (ended.singleton, ended.key, ended.outcome) == ("t", "t", "succeeded")
    assert ended.given_back


def test_a_hook_can_be_named_and_can_be_a_class(
    memory_app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Seen] = []

    class Made(Seen):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(dispatcher, "made_for_the_test", Made, raising=False)
    use(memory_app, "celery_singleton_state.hooks.dispatcher:made_for_the_test")
    make_task(memory_app, add)()
    flush(memory_app)
    assert len(made) == 1
    assert made[0].kinds() == ["Acquired", "StateLoaded", "StateSaved", "Released"]


@pytest.mark.parametrize("hooks", [["no.such:hook"], [3], "no.such:hook", 7])
def test_an_invalid_hook_is_refused(memory_app: Celery, hooks: Any) -> None:
    memory_app.conf.singleton_hooks = hooks
    with pytest.raises(ImproperlyConfigured, match="singleton_hooks"):
        make_task(memory_app, add)()


def test_a_failing_hook_fails_no_run_and_no_other_hook(
    memory_app: Celery, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(details: Details) -> None:
        raise ValueError("no")

    use(memory_app, fail, seen)
    assert make_task(memory_app, add)() == 1
    flush(memory_app)
    assert seen.kinds()[-1] == "Released"
    assert "a hook failed" in caplog.text


def test_a_slow_hook_delays_no_run_and_surplus_events_are_dropped(
    memory_app: Celery,
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hook hangs while runs begin and end. When more events wait than the limit allows, the
    newest are dropped. The log says so when the hook has returned.
    """
    monkeypatch.setattr(dispatcher, "LIMIT", 6)
    held, go = threading.Event(), threading.Event()

    def slow(details: Details) -> None:
        held.set()
        go.wait(30)

    use(memory_app, slow, seen)
    task = make_task(memory_app, add)
    assert task() == 1
    assert held.wait(30)
    assert [task() for _ in range(5)] == [2, 3, 4, 5, 6]
    go.set()
    wait_until(lambda: "events were dropped" in caplog.text, "the drop is logged")
    flush(memory_app)
    # The hook got the events that waited: those of the first run, and as many as the limit allows.
    assert "events were dropped" in caplog.text
    fences = [each.fence for each in seen.details if isinstance(each, Acquired)]
    assert fences == sorted(fences)
    assert len(seen.details) < 6 * 4


def emit(own: Dispatcher, details: Details) -> None:
    """Emit an event with these details."""
    own.emit(kind=type(details), **msgspec.structs.asdict(details))


def test_an_event_that_comes_while_a_hook_works_is_delivered_at_close(
    memory_app: Celery, seen: Seen
) -> None:
    """The hook gets event A and hangs. Event B is emitted, and the dispatcher is closed. The hook
    returns, and gets B, too.
    """
    held, go = threading.Event(), threading.Event()

    def slow(details: Details) -> None:
        seen(details)
        held.set()
        go.wait(30)

    use(memory_app, slow)
    own = runtime_of(memory_app).dispatcher
    first, second = EXAMPLES[:2]
    emit(own, first)
    assert held.wait(30)
    emit(own, second)
    closing = threading.Thread(target=own.close)
    closing.start()
    wait_until(own._closed.is_set, "the dispatcher is being closed")
    go.set()
    closing.join(30)
    assert seen.details == [first, second]


def test_signals_have_the_task_as_sender(
    memory_app: Celery, connected: Callable[..., None]
) -> None:
    got: list[tuple[str, str, bool]] = []
    here = threading.get_ident()

    def receive(sender: str, details: Details, **_: Any) -> None:
        got.append((sender, type(details).__name__, threading.get_ident() == here))

    connected(
        receive, signals.acquired, signals.released, signals.state_loaded, signals.state_saved
    )
    make_task(memory_app, add)()
    flush(memory_app)
    assert got == [
        ("t", name, False) for name in ("Acquired", "StateLoaded", "StateSaved", "Released")
    ]


def test_without_observers_there_is_no_thread(memory_app: Celery) -> None:
    make_task(memory_app, add)()
    own = runtime_of(memory_app).dispatcher
    assert own._thread is None
    assert not own._waiting


def test_the_event_of_a_failed_run_has_its_error(memory_app: Celery, seen: Seen) -> None:
    use(memory_app, seen)

    def body(self: SingletonTask[Count]) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        make_task(memory_app, body)()
    flush(memory_app)
    ended = seen.details[-1]
    assert isinstance(ended, Released)
    assert (ended.outcome, ended.error) == ("failed", "ValueError: no")


def test_a_conflict_and_its_skip_are_emitted(memory_app: Celery, seen: Seen) -> None:
    use(memory_app, seen)
    store = runtime_of(memory_app).store
    assert store.acquire("singleton-state:t", "other", 60, "x")
    assert make_task(memory_app, add)() is None
    flush(memory_app)
    assert seen.kinds() == ["Conflicted", "Skipped"]
    conflict, skipped = seen.details
    assert isinstance(conflict, Conflicted)
    assert conflict.policy == "skip"
    assert isinstance(skipped, Skipped)
    assert skipped.why.startswith("skipped: held by other for task x")


def test_a_lost_run_ends_once(memory_app: Celery, seen: Seen) -> None:
    """Another holder takes the lease. The store refuses the run's checkpoint, and then its release.

    Only one ``Lost`` event is emitted.
    """
    use(memory_app, seen)

    def body(self: SingletonTask[Count]) -> None:
        store: Any = runtime_of(memory_app).store
        with store.engine.connect() as connection:
            connection.exec_driver_sql("UPDATE kv_store SET fence = fence + 1, holder = 'other'")
        self.state.n = 1
        self.checkpoint()

    with pytest.raises(HeartbeatFailed):
        make_task(memory_app, body)()
    flush(memory_app)
    assert seen.kinds() == ["Acquired", "StateLoaded", "WriteRefused", "Lost", "Failed"]
    refused, lost = seen.details[2:4]
    assert isinstance(refused, WriteRefused)
    assert refused.operation == "checkpoint"
    assert isinstance(lost, Lost)
    assert lost.why == "the write was refused"


@pytest.mark.parametrize(
    ("ends", "how"), [("expires", "expired"), ("dies", "died"), ("hands over", "handoff")]
)
def test_a_takeover_event_says_how_the_earlier_run_ended(
    memory_app: Celery, seen: Seen, ends: str, how: str
) -> None:
    use(memory_app, seen)
    task = make_task(memory_app, add)
    task()
    store: Any = runtime_of(memory_app).store
    acquired = store.acquire("singleton-state:t", "other", 60, None)
    assert acquired is not None
    if ends == "expires":
        with store.engine.connect() as connection:
            connection.exec_driver_sql("UPDATE kv_store SET expires_at = '2001-01-01'")
    else:
        row = store.peek("singleton-state:t")
        assert end_for(runtime_of(memory_app), row, 0, DIED if ends == "dies" else "asked to")
    task()
    taken = store.peek("singleton-state:t").fence
    task()
    flush(memory_app)
    found = [each for each in seen.details if isinstance(each, TookOver)]
    assert [(each.how, each.fence) for each in found] == [(how, taken)]


def test_acquiring_and_ending_are_logged(
    memory_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "celery_singleton_state")
    make_task(memory_app, add)()
    assert "singleton t acquired with fence " in caplog.text
    assert "singleton t succeeded after 0.0" in caplog.text


def test_our_events_make_no_task_and_no_worker_in_celerys_event_state(memory_app: Celery) -> None:
    """Flower and celery-exporter read this state, and would show such a task or worker."""
    state = memory_app.events.State()
    for example in EXAMPLES:
        event = events.msgspec.to_builtins(example)
        event |= {"hostname": "w@h", "pid": 1, "clock": 3, "utcoffset": 0, "local_received": 1.0}
        state.event(event)
    assert not state.tasks
    assert not state.workers
