"""Results that the history keeps, and how a duplicate ends with the result of the earlier run."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Ignore

from celery_singleton_state import history, singleton_task
from celery_singleton_state.history import Entry
from celery_singleton_state.lease.holder_files import HolderFiles
from celery_singleton_state.message.delivery import Delivery
from celery_singleton_state.message.duplicates import GRACE, end_duplicate, wait_for_record
from celery_singleton_state.message.results import MAX_RESULT_LENGTH, keep, restore
from celery_singleton_state.runtime import runtime_of

VALUES = [
    None,
    7,
    "text",
    {"rows": [1, 2.5, None]},
    datetime(2026, 11, 27, tzinfo=UTC),
    Decimal("1.10"),
    UUID("1d7c7bfb-7e5c-4f0e-9f0f-3c6c8f5b6f0a"),
]


class Unreadable:
    """A value that no serializer accepts."""

    def __json__(self) -> str:
        raise ZeroDivisionError

    def __reduce__(self) -> str:
        raise ZeroDivisionError


def delivery(app: Celery, request: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return a delivery of the message with the id ``m``."""

    def body(self: Any) -> None:
        """A body that never runs in these tests."""

    task = singleton_task(app, **{"name": "t", "deduplicate": True, "shared": False, **options})(
        body
    )
    # All apps of this process share one backend, so an earlier test may have stored this result.
    app.backend.forget("m")
    message = {"id": "m", "called_directly": False, "args": (), "kwargs": {}, "hostname": "w@host"}
    made = Context(message | (request or {}))
    return Delivery(task, made, "t", "singleton-state:t", task._options, None, runtime_of(app))


def done(holder: str = "w@elsewhere:1:aa.1", result: Any = None, **fields: Any) -> Entry:
    """Return the history's entry of that message's run, which ended at the time 100."""
    entry = Entry("m", 0, holder, 1, None, "succeeded", None, 90.0, 100.0, True, None, result)
    return Entry(**{name: getattr(entry, name) for name in entry.__struct_fields__} | fields)


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml", "msgpack"])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_result_comes_back_as_celery_would_give_it(
    memory_app: Celery, serializer: str, value: Any
) -> None:
    if serializer in ("yaml", "msgpack"):
        pytest.importorskip(serializer)
        if not isinstance(value, int | str | dict | None):
            pytest.skip("not a value of this serializer")
    memory_app.conf.update(result_serializer=serializer, accept_content=["json", serializer])
    one = delivery(memory_app)
    kept = keep(one, value)
    assert kept is not None
    (read,) = history.decode(history.append((), done(result=kept), 16), "t")
    assert read.result is not None
    assert restore(one.task, read.result) == value


@pytest.mark.parametrize(
    ("value", "request_", "options"),
    [
        ("x" * MAX_RESULT_LENGTH, {}, {}),
        (list(range(10**6)), {}, {}),
        ({"x": "é" * 500}, {}, {}),
        (Unreadable(), {}, {}),
        (1, {"ignore_result": True}, {}),
        (1, {}, {"ignore_result": True}),
        (1, {}, {"deduplicate": False}),
        (1, {"called_directly": True}, {}),
        (1, {"is_eager": True}, {}),
    ],
    ids=[
        "large text",
        "large list",
        "large when serialized",
        "unreadable",
        "ignored by the sender",
        "ignored by the task",
        "not deduplicated",
        "direct call",
        "eager",
    ],
)
def test_results_that_are_not_kept(
    memory_app: Celery, value: Any, request_: dict[str, Any], options: dict[str, Any]
) -> None:
    assert keep(delivery(memory_app, request_, **options), value) is None


def test_an_ignored_result_is_kept_if_a_chain_needs_it(memory_app: Celery) -> None:
    request = {"ignore_result": True, "chain": [{"task": "next"}]}
    assert keep(delivery(memory_app, request), 1)


def test_a_kept_result_of_a_serializer_that_is_no_longer_accepted_is_not_read(
    memory_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    one = delivery(memory_app)
    memory_app.conf.result_serializer = "pickle"
    entry = done(result=keep(one, 1))
    assert entry.result is not None
    assert end_duplicate(one, entry) is None
    assert "it ends with None" in caplog.text


def test_only_the_newest_runs_keep_their_results() -> None:
    entries: tuple[Entry, ...] = ()
    kept = history.Kept("application/json", "utf-8", "1")
    for fence in range(1, 8):
        raw = history.append(entries, done(result=kept, fence=fence), 16)
        entries = history.decode(raw, "t")
    assert [entry.fence for entry in entries if entry.result] == [4, 5, 6, 7]
    assert len(entries) == 7


def test_a_history_of_an_older_release_is_read() -> None:
    raw = '[["m",0,"w@host:1:aa.1",1,null,"succeeded",null,1.5,2.5,true]]'
    (entry,) = history.decode(raw, "t")
    assert (entry.sent, entry.result, entry.deaths) == (None, None, 0)


# -- a duplicate message that comes after the run has ended (at the time 100)


@pytest.fixture
def sent(memory_app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The messages that were sent again."""
    found: list[Any] = []
    monkeypatch.setattr(memory_app.amqp, "send_task_message", lambda *each, **_: found.append(each))
    return found


def test_a_duplicate_waits_while_the_process_may_still_record_the_result(
    memory_app: Celery, sent: list[Any]
) -> None:
    one = delivery(memory_app)
    with pytest.raises(Ignore):
        wait_for_record(one, done(), 100.5)
    assert len(sent) == 1
    wait_for_record(one, done(), 100 + GRACE)
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("request_", "entry"),
    [
        ({}, None),
        ({}, done(outcome="duplicate")),
        ({"is_eager": True}, done()),
        ({"called_directly": True}, done()),
        ({"ignore_result": True}, done()),
        ({}, done(holder="w@host:999999999:aa.1")),
    ],
    ids=["unknown", "duplicate", "eager", "direct", "nothing comes after it", "dead"],
)
def test_a_duplicate_that_has_no_reason_to_wait_does_not_wait(
    memory_app: Celery, sent: list[Any], request_: dict[str, Any], entry: Entry | None
) -> None:
    wait_for_record(delivery(memory_app, request_), entry, 100.5)
    assert not sent


def test_a_duplicate_does_not_wait_for_a_recorded_result(
    memory_app: Celery, sent: list[Any]
) -> None:
    one = delivery(memory_app)
    one.task.backend.store_result("m", 1, "SUCCESS")
    wait_for_record(one, done(), 100.5)
    with pytest.raises(Ignore):
        end_duplicate(one, done())
    assert not sent


@pytest.mark.parametrize("result", [None, "kept"], ids=["none kept", "kept"])
def test_a_duplicate_ends_with_the_kept_result_or_a_warning(
    memory_app: Celery, caplog: pytest.LogCaptureFixture, result: str | None
) -> None:
    caplog.set_level(logging.WARNING)
    one = delivery(memory_app)
    kept = keep(one, result) if result else None
    assert end_duplicate(one, done(result=kept)) == result
    assert ("it ends with None" in caplog.text) == (result is None)


@pytest.mark.parametrize("lives", [True, False, None])
def test_a_duplicate_sends_no_callbacks_if_the_process_of_the_run_lives(
    memory_app: Celery, monkeypatch: pytest.MonkeyPatch, lives: bool | None
) -> None:
    one = delivery(memory_app, {"ignore_result": True, "callbacks": [{"task": "next"}]})
    entry = done(result=keep(one, "kept"))
    monkeypatch.setattr(HolderFiles, "lives", lambda *_: lives)
    if lives:
        with pytest.raises(Ignore):
            end_duplicate(one, entry)
    else:
        assert end_duplicate(one, entry) == "kept"
