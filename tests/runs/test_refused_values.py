"""Runs whose state, key or message the store cannot hold: they fail once, with a clear error."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, signals
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state import SchemaDecodeFailed, StatePersistFailed, singleton_task
from celery_singleton_state.beat.leader import Leader
from celery_singleton_state.exporter.snapshot import take_snapshot
from celery_singleton_state.health import check_health
from celery_singleton_state.history import decode
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Row, StoreUnavailable
from celery_singleton_state.ticks import task_id_of
from tests.helpers.beats import EVERY_MINUTE, Beats, due_now, stored
from tests.helpers.refused_values import LARGEST, ODD, with_small_packets
from tests.helpers.stores import apps_on, url_on
from tests.helpers.tables import execute
from tests.helpers.waiting import wait_until

POLISH = "Łódź"


@dataclass
class Place:
    name: str = ""
    visits: int = 0


@pytest.fixture
def latin1_app(latin1_url: str) -> Iterator[Celery]:
    for make in apps_on(latin1_url):
        yield make()


@pytest.fixture(params=["latin1", "mariadb"])
def refusing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Celery, str]]:
    """Return an app, and a text that the app's store cannot hold in a state."""
    for make in apps_on(url_on(request.param, request, tmp_path)):
        app = make()
        runtime_of(app).store.check()
        if request.param == "latin1":
            yield app, POLISH
        else:
            runtime_of(app).sql.engine.dispose()
            with with_small_packets(request.getfixturevalue("mariadb")):
                yield app, "x" * (1 << 20)


def row(app: Celery, name: str = "visit") -> Row:
    found = runtime_of(app).store.peek(f"singleton-state:{name}")
    assert found is not None
    return found


def task_of(app: Celery, body: Callable[..., Any], **options: Any) -> Any:
    options = {"state_schema": Place, "name": "visit", "shared": False} | options
    return singleton_task(app, **options)(body)


def recording(ran: list[Any]) -> Callable[..., None]:
    """Return a body that adds its argument to a list."""

    def body(self: Any, name: str = "") -> None:
        ran.append(name)

    return body


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Log nothing, because a log handler cannot encode half of a surrogate pair."""
    caplog.set_level(logging.CRITICAL + 1)


@pytest.mark.parametrize("how", ["save", "checkpoint", "transaction", "after an error"])
def test_a_refused_state_runs_one_body_and_the_row_keeps_its_state(
    refusing: tuple[Celery, str], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    app, text = refusing
    names: list[str] = []

    def body(self: Any, name: str) -> None:
        names.append(name)
        self.state.name, self.state.visits = name, self.state.visits + 1
        if name != text:
            return
        if how == "checkpoint":
            self.checkpoint()
        elif how == "transaction":
            with self.transaction():
                pass
        elif how == "after an error":
            raise LookupError("no such place")

    task = task_of(app, body, persist_on_error=True)
    assert task.apply(("Rome",)).successful()
    before = row(app)
    result = task.apply((text,))
    kind = LookupError if how == "after an error" else SchemaDecodeFailed
    assert isinstance(result.result, kind), result.result
    assert names == ["Rome", text]
    after = row(app)
    assert (after.value, after.updated_at) == (before.value, before.updated_at)
    assert (after.holder, after.last_outcome) == (None, "failed")
    assert decode(after.history, "visit")[-1].outcome == "failed"
    # In every case but "save" the body itself fails. persist_on_error then tries to save the state
    # once more, which is refused and logged.
    assert ("the state was not saved after an error" in caplog.text) == (how != "save")
    assert task.apply(("Bern",)).successful()
    assert '"visits":2' in row(app).value


def test_a_refused_state_runs_one_body_although_the_release_fails_too(
    latin1_app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    release = runtime_of(latin1_app).store.release

    def cut(lease: Any, ended: Any, write: Any = None) -> Any:
        if write is None:
            raise StoreUnavailable("cut")
        return release(lease, ended, write)

    def body(self: Any) -> None:
        ran.append(POLISH)
        self.state.name = POLISH

    monkeypatch.setattr(runtime_of(latin1_app).store, "release", cut)
    result = task_of(latin1_app, body).apply()
    assert isinstance(result.result, SchemaDecodeFailed), result.result
    assert ran == [POLISH]
    # The process releases the lease later, when the store answers.
    wait_until(lambda: row(latin1_app).holder is None, "the lease is free")


def test_a_body_may_mend_a_state_that_a_checkpoint_refused(latin1_app: Celery) -> None:
    def body(self: Any) -> None:
        self.state.name = POLISH
        with pytest.raises(SchemaDecodeFailed, match="LATIN1"):
            self.checkpoint()
        self.state.name = "Lodz"

    task_of(latin1_app, body)()
    assert row(latin1_app).value == '{"name":"Lodz","visits":0}'


def test_a_key_that_the_database_cannot_hold_fails_at_once(
    latin1_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[str] = []
    task = task_of(latin1_app, recording(ran), unique_on=["name"])
    result = task.apply((POLISH,))
    assert isinstance(result.result, SchemaDecodeFailed)
    assert "LATIN1" in str(result.result)
    assert not ran
    assert "not released" not in caplog.text


@pytest.mark.usefixtures("quiet")
def test_odd_letters_in_recorded_names_fail_no_run(latin1_app: Celery) -> None:
    """The error's text, the task id and the worker's name have letters that the database lacks."""

    def body(self: Any) -> None:
        raise LookupError(ODD)

    task = task_of(latin1_app, body)
    for _ in range(2):
        result = task.apply(task_id=ODD, hostname=f"celery@{ODD}")
        assert isinstance(result.result, LookupError)
    last = decode(row(latin1_app).history, "visit")[-1]
    assert last.task_id == ODD
    assert last.error is not None
    assert POLISH in last.error


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["memory", "sqlite", "postgresql", "latin1", "mariadb"])
def test_a_message_with_any_task_id_runs_once(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    ran: list[str] = []
    for make in apps_on(url_on(name, request, tmp_path)):
        task = task_of(make(), recording(ran), deduplicate=True)
        message = {"task_id": ODD, "headers": {"singleton_sent": ODD}}
        for _ in range(2):
            task.apply(**message)
    assert len(ran) == 1


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["memory", "sqlite", "postgresql", "latin1", "mariadb"])
def test_arguments_with_any_text_make_a_key(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    ran: list[str] = []
    odd = ("a\0b", "a\\x00b", "a\udc80b", "a\\udc80b")
    for make in apps_on(url_on(name, request, tmp_path)):
        app = make()
        task = task_of(app, recording(ran), unique_on=["name"])
        for text in odd:
            assert task.apply((text,)).successful()
        assert len(runtime_of(app).store.list("singleton-state:visit")) == len(odd)
    assert ran == list(odd)


def test_a_fence_at_its_largest_fails_at_once_and_says_what_to_do(app: Celery) -> None:
    ran: list[str] = []
    task = task_of(app, recording(ran))
    assert task.apply().successful()
    store: Any = runtime_of(app).store
    store._change(f"UPDATE kv_store SET fence = {LARGEST}", {})
    result = task.apply()
    assert isinstance(result.result, SchemaDecodeFailed)
    assert "UPDATE kv_store SET fence = 0" in str(result.result)
    assert len(ran) == 1


#: Maps each database to the statements that make a trigger which refuses writes to the table.
MAINTENANCE = {
    "postgresql": (
        "CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE EXCEPTION 'back at noon'; END $$",
        "CREATE TRIGGER stop BEFORE INSERT OR UPDATE ON kv_store"
        " FOR EACH ROW EXECUTE FUNCTION stop()",
    ),
    "mariadb": (
        "CREATE TRIGGER stop BEFORE UPDATE ON kv_store FOR EACH ROW"
        " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'back at noon'",
    ),
    "sqlite": (
        "CREATE TRIGGER stop BEFORE UPDATE ON kv_store"
        " BEGIN SELECT RAISE(ABORT, 'back at noon'); END",
    ),
}


@pytest.mark.parametrize("name", list(MAINTENANCE))
def test_a_trigger_that_stops_writes_for_a_while_is_an_outage(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """1. The body creates the trigger.
    2. The save fails as if the store were unavailable.
    3. The trigger is dropped.
    4. The process releases the lease, and the next run succeeds.
    """
    url = url_on(name, request, tmp_path)
    ran: list[int] = []

    def body(self: Any) -> None:
        self.state.visits += 1
        ran.append(self.state.visits)
        if len(ran) == 1:
            execute(url, *MAINTENANCE[name])

    for make in apps_on(url):
        app = make(singleton_heartbeat_interval=0.1)
        task = task_of(app, body, lease_ttl=60.0)
        result = task.apply()
        assert isinstance(result.result, StatePersistFailed), result.result
        assert "back at noon" in str(result.result)
        execute(url, "DROP TRIGGER stop" + " ON kv_store" * (name == "postgresql"))
        wait_until(lambda app=app: row(app).holder is None, "the process gives the lease back")
        assert task.apply().successful()
    assert ran == [1, 1]


def test_a_message_that_cannot_be_recorded_as_queued_is_sent(
    latin1_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(latin1_app, recording([]), unique_on=["name"], enqueue_once=True)
    with caplog.at_level(logging.WARNING):
        first, second = task.delay(POLISH), task.delay(POLISH)
    assert first.id != second.id
    assert "is sent, although another message may be queued" in caplog.text
    # The database lacks letters of this task id only, not of the key: the message is recorded.
    noted = task.apply_async(("Bern",), task_id=POLISH)
    assert (noted.id, task.delay("Bern").id) == (POLISH, POLISH)


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "latin1", "mariadb"])
def test_a_beat_with_any_name_leads(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    beats = Beats(url_on(name, request, tmp_path))
    try:
        one, other, third = (
            beats.make({"e": EVERY_MINUTE}, singleton_beat_name=each)
            for each in (POLISH, POLISH, "a\\b\0 \U0001f389")
        )
        for beat in (one, other, third):
            beat.tick()
        assert [beat._leader.leads for beat in (one, other, third)] == [True, False, True]
        leader = take_snapshot(runtime_of(one.app)).leader
        assert leader is not None
        assert leader.key.isascii()
        assert leader.fence == one._leader.fence
    finally:
        beats.close()


def test_a_key_prefix_that_the_database_cannot_hold_is_refused_at_start(latin1_url: str) -> None:
    refusal = r"no key can begin with \\u0141\\xf3d\\u017a:.*LATIN1.*set singleton_key_prefix"
    for make in apps_on(latin1_url):
        app = make(singleton_key_prefix=f"{POLISH}:")
        task_of(app, recording([]))
        app.finalize()
        with pytest.raises(ImproperlyConfigured, match=refusal):
            app.WorkController(pool="solo")
        with pytest.raises(ImproperlyConfigured, match=refusal):
            Leader(app).check()
        assert re.search(refusal, check_health(app).error or "")
        app = make(singleton_key_prefix="ó:")
        Leader(app).check()
        assert check_health(app).healthy


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "latin1", "mariadb"])
def test_a_beat_sends_entries_with_any_name(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    beats = Beats(url_on(name, request, tmp_path))
    names = ["e", POLISH, "a\\x00 \U0001f389"]
    sent: list[str] = []

    def note(headers: dict[str, Any], **_: Any) -> None:
        sent.append(headers["id"])

    signals.before_task_publish.connect(note)
    try:
        one, other = (beats.make(dict.fromkeys(names, EVERY_MINUTE)) for _ in range(2))
        one.tick()
        due = {each: due_now(one, each) for each in names}
        one.tick()
        assert sorted(sent) == sorted(task_id_of("shop", *found) for found in due.items())
        one.close()
        # The next leader reads from the store which ticks of all entries were sent.
        other.tick()
        assert {each: state.last_tick for each, state in stored(other).items()} == due
        assert len(sent) == len(names)
    finally:
        signals.before_task_publish.disconnect(note)
        beats.close()


def test_owed_ticks_of_one_entry_are_waited_for_beside_an_entry_without_a_possible_row(
    latin1_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The database cannot hold the key of one entry's singleton, so that singleton has no row.

    The beat reads the other entry's row all the same.
    """
    beats = Beats(latin1_url)
    entry = {"task": "visit", "schedule": 60.0, "catch_up": "all"}
    schedule = {"polish": entry | {"args": (POLISH,)}, "swiss": entry | {"args": ("Bern",)}}
    beat = beats.make(schedule)
    try:
        task_of(beat.app, recording([]), unique_on=["name"])
        beat.tick()
        for name in schedule:
            due_now(beat, name)
        beat.tick()
        with caplog.at_level(logging.WARNING):
            beat.tick()
        assert "cannot be asked" not in caplog.text
        assert all(entry.under_way for *_, entry in beat._heap)
    finally:
        beats.close()
