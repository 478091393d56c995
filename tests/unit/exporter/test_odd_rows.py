"""Rows with odd values: the commands, the page and the metrics show them, and all other rows.

Each test writes odd values into the row of the task ``odd``. It checks that ``innocent``, another
singleton, is shown as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import redis
from celery import Celery
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from celery_singleton_state import SingletonTask, history, singleton_task, ticks_done
from celery_singleton_state.beat.entry_state import EntryState, decode_rows
from celery_singleton_state.beat.leader import PREFIX as BEAT
from celery_singleton_state.cli import singleton
from celery_singleton_state.errors import SchemaDecodeFailed
from celery_singleton_state.exporter.gauges import Gauges
from celery_singleton_state.exporter.page.document import POLICY, render
from celery_singleton_state.exporter.page.overview import Overview
from celery_singleton_state.exporter.snapshot import take_snapshot
from celery_singleton_state.health import check_health
from celery_singleton_state.history import Entry
from celery_singleton_state.hooks import Lost, log
from celery_singleton_state.runtime import close_runtime, runtime_of
from celery_singleton_state.text.moments import iso, moment, seconds, short_moment
from celery_singleton_state.text.visible import (
    as_json,
    as_printed,
    encodable,
    names_meant,
    visible,
)
from tests.helpers.odd_values import (
    DOCUMENTS,
    EPOCHS,
    SQL_MOMENTS,
    SQL_NUMBERS,
    SURROGATES,
    texts,
)
from tests.helpers.page_reader import Reader

PREFIX = "singleton-state:"
NOW = datetime(2026, 3, 14, 12, tzinfo=UTC)
#: Settings for hypothesis. All examples of a test share one app, because making an app is slow.
fuzzed = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ELEMENTS = frozenset((
    *("html", "head", "meta", "title", "link", "style", "body", "header", "h1", "h2", "small"),
    *("form", "label", "input", "button", "p", "span", "main", "div", "section", "ul", "li", "b"),
    *("code", "wbr", "table", "caption", "thead", "tbody", "tr", "th", "td", "time", "svg", "path"),
    *("footer", "a", "script", "details", "summary", "pre", "q", "noscript"),
))  # fmt: skip


@dataclass
class Note:
    text: str = ""


def add_tasks(app: Celery) -> Celery:
    @singleton_task(app, name="odd", unique_on=["key"], state_schema=Note, shared=False)
    def odd(self: SingletonTask[Note], key: str, text: str = "", error: str | None = None) -> None:
        self.state.text = text
        self.checkpoint()
        if error is not None:
            raise ValueError(error)

    @singleton_task(app, name="innocent", expected_interval=3600, shared=False)
    def innocent(self: SingletonTask) -> None: ...

    app.finalize()
    return app


@pytest.fixture
def shop(memory_app: Celery) -> Celery:
    return add_tasks(memory_app)


def run(app: Celery, name: str, *args: Any) -> None:
    with contextlib.suppress(ValueError):
        app.tasks[name](*args)


def change(app: Celery, statement: str, **parameters: Any) -> None:
    """Run an SQL statement, to write values into a row that the package itself would never
    write.
    """
    with runtime_of(app).store.engine.begin() as connection:
        connection.exec_driver_sql(statement, parameters)


def empty(app: Celery) -> None:
    change(app, "DELETE FROM kv_store")
    run(app, "innocent")


def output_of(app: Celery, *arguments: str, may_be: int = 0, encoding: str = "utf-8") -> str:
    """Run a command and return its output. No character of the output may control a terminal.

    :param may_be: an exit code that is allowed besides 0.
    """
    context = SimpleNamespace(app=app)
    result = CliRunner(charset=encoding).invoke(singleton, list(arguments), obj=context)
    assert result.exit_code in (0, may_be), (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    found = result.output
    assert all(each == "\n" or each.isprintable() for each in found), found
    return found


def json_of(app: Celery, *arguments: str, may_be: int = 0) -> Any:
    """Run a command with ``--json`` and return its output, parsed strictly: NaN is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = output_of(app, *arguments, "--json", may_be=may_be)
    assert found.isascii()
    return json.loads(found, parse_constant=refuse)


def metrics(app: Celery) -> dict[str, dict[str, float]]:
    """Return a dict that maps each gauge, by metric name and key, to its value.

    Prometheus reads two text formats: both are parsed, and must have the same metrics.
    """
    registry, runtime = CollectorRegistry(), runtime_of(app)
    registry.register(Gauges(runtime, partial(take_snapshot, runtime), lambda: True, per_key=True))
    plain = generate_latest(registry).decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(plain):
        for sample in family.samples:
            found.setdefault(sample.name, {})[sample.labels.get("key", "")] = sample.value
    also = openmetrics.generate_latest(registry).decode()
    names = {
        sample.name
        for family in openmetrics_parser.text_string_to_metric_families(also)
        for sample in family.samples
    }
    assert names == set(found)
    return found


def page(app: Celery, query: str = "") -> Reader:
    """Return the page, after a check that no value of a row became an element or an attribute."""
    runtime = runtime_of(app)
    document = render(
        Overview(runtime, partial(take_snapshot, runtime), shows_state=True).page(query)
    )
    assert document.encode()
    reader = Reader(document)
    assert not reader.open
    assert {name for name, _ in reader.tags} <= ELEMENTS
    assert len(reader.all("script")) == len(reader.all("style")) == 1
    names = {name for _, attributes in reader.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "style")}
    assert {each["href"] for each in reader.all("a")} <= {"?", "metrics", "health"}
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in reader.all("meta")
    assert all(each in "\t\n" or each.isprintable() for each in document)
    return reader


def assert_innocent_is_shown(app: Celery) -> None:
    """Check that each command that lists singletons, the page and the metrics show ``innocent``."""
    lines = [line for line in output_of(app, "ls").splitlines() if line.startswith(" innocent ")]
    assert len(lines) == 1
    assert re.fullmatch(r" innocent +\d+ +1 +succeeded +\S+ +yes +free *", lines[0])
    (neighbour,) = (each for each in json_of(app, "ls") if each["singleton"] == "innocent")
    assert (neighbour["run_count"], neighbour["healthy"]) == (1, True)
    assert output_of(app, "health", may_be=1)
    healthy = {
        each["singleton"]: each["healthy"]
        for each in json_of(app, "health", may_be=1)["singletons"]
    }
    assert healthy["innocent"]
    assert output_of(app, "next")
    assert json_of(app, "next")["name"]
    assert output_of(app, "prune", "--older-than", "1d", "--dry-run")
    assert json_of(app, "prune", "--older-than", "1d", "--dry-run")["removed"] == 0
    assert "innocent" in page(app).text
    gauges = metrics(app)
    assert gauges["singleton_healthy"]["innocent"] == 1
    assert 1e9 < gauges["singleton_last_success_timestamp_seconds"]["innocent"] < 1e11


@given(key=texts(*SURROGATES), state=texts(), error=texts(*SURROGATES) | st.none())
@fuzzed
def test_any_text_in_a_key_a_state_or_an_error_is_shown(
    shop: Celery, key: str, state: str, error: str | None
) -> None:
    """A run writes these texts into its row, as a user's run can."""
    empty(shop)
    run(shop, "odd", key, state, error)
    assert_innocent_is_shown(shop)
    (row,) = (each for each in json_of(shop, "ls") if each["singleton"] != "innocent")
    name = row["singleton"]
    printed = as_printed(name)
    assert any(line.startswith(f" {printed} ") for line in output_of(shop, "ls").splitlines())
    shown = json_of(shop, "show", printed)
    assert (shown["key"], shown["value"]) == (row["key"], {"text": state})
    assert [each["outcome"] for each in shown["history"]] == [
        "succeeded" if error is None else "failed"
    ]
    assert json_of(shop, "show", name)["key"] == row["key"], "the exact name is taken, too"
    text = output_of(shop, "show", printed)
    assert f" {printed} " in text
    got = output_of(shop, "state", "get", printed)
    assert json.loads(got) == {"text": state}
    assert got.strip() in text
    output_of(shop, "state", "reset", "--yes", printed)
    output_of(shop, "state", "set", "--yes", printed, got.strip())
    assert json.loads(output_of(shop, "state", "get", printed)) == {"text": state}
    assert metrics(shop)["singleton_keys"][printed] == 1
    assert printed.replace(" ", "") in page(shop, printed).text.replace(" ", "")


# Names of schedule entries cannot have a NUL. Names that begin with a dash have their own test.
NAMES = texts(min_size=1).filter(lambda name: "\0" not in name and not name.startswith("-"))


@given(name=NAMES, holder=texts(min_size=1), task_id=texts())
@fuzzed
def test_any_text_in_a_name_a_holder_or_a_task_id_is_shown(
    shop: Celery, name: str, holder: str, task_id: str
) -> None:
    """The texts are in the row of a held singleton, in the leader's lease and in a schedule
    entry.
    """
    empty(shop)
    store = runtime_of(shop).store
    lease = store.acquire(BEAT + runtime_of(shop).settings.beat_name, holder, 60, None)
    assert lease
    state = EntryState(name, task_id, name, next_tick=NOW, last_tick=NOW)
    rows = {f"{lease.lease.key}:{name}": msgspec.json.encode(state).decode()}
    assert store.entries.record(lease.lease, rows, 1, 0)
    shop.conf.beat_schedule = {name: {"task": "odd", "schedule": 60.0}}
    assert store.acquire(PREFIX + name, holder, 60, task_id)
    assert_innocent_is_shown(shop)
    printed = as_printed(name)
    assert f" {printed} " in output_of(shop, "ls")
    assert f" {printed} " in output_of(shop, "next")
    assert json_of(shop, "next", printed)["entry"] == name
    assert output_of(shop, "next", printed)
    (row,) = (each for each in json_of(shop, "ls") if each["singleton"] != "innocent")
    assert (row["singleton"], row["holder"], row["task_id"]) == (name, holder, task_id)
    found = json_of(shop, "next")
    assert (found["leader"], found["entries"][0]["entry"]) == (holder, name)
    assert visible(holder).replace(" ", "") in output_of(shop, "show", printed).replace(" ", "")
    assert "is free" in output_of(shop, "release", "--yes", printed)
    assert json_of(shop, "show", printed)["holder"] is None


@given(typed=texts(min_size=1))
@fuzzed
def test_an_error_about_any_typed_text_is_one_printable_line(shop: Celery, typed: str) -> None:
    assume(not re.fullmatch("[0-9]+[dhms]?", typed))
    empty(shop)
    for command in (
        *(["show", typed], ["release", typed], ["state", "get", typed], ["next", typed]),
        *(["state", "set", typed, "1"], ["state", "set", "innocent", typed], ["state", typed]),
        *(["prune", "--older-than", typed], ["prune", "--older-than", "1d", "--task", typed]),
        *([typed], ["--" + typed], ["ls", typed], ["ls", "--" + typed]),
    ):
        result = CliRunner().invoke(singleton, command, obj=SimpleNamespace(app=shop))
        assert result.exit_code in (1, 2), (command, result.output)
        assert isinstance(result.exception, SystemExit)
        assert all(each == "\n" or each.isprintable() for each in result.output), result.output
        assert "Error: " in result.output.splitlines()[-1]


@given(key=texts(), state=texts())
@fuzzed
def test_characters_that_a_terminal_lacks_are_escaped(shop: Celery, key: str, state: str) -> None:
    empty(shop)
    run(shop, "odd", key, state)
    (row,) = (each for each in json_of(shop, "ls") if each["singleton"] != "innocent")
    printed = encodable(as_printed(row["singleton"]), "ascii")
    listed = output_of(shop, "ls", encoding="ascii")
    assert f" {printed} " in listed
    assert "innocent" in listed
    assert json.loads(output_of(shop, "state", "get", printed, encoding="ascii")) == {"text": state}
    assert json_of(shop, "show", printed)["key"] == row["key"]


@given(names=st.lists(texts(), min_size=2, max_size=2, unique=True))
@settings(max_examples=100)
def test_different_names_are_printed_differently(names: list[str]) -> None:
    one, other = names
    assert as_printed(one) != as_printed(other)
    for name in names:
        printed = as_printed(name)
        assert names_meant(printed)[0] == names_meant(encodable(printed, "ascii"))[0] == name
        assert printed.isprintable()
        assert printed == printed.strip(" ")
        assert json.loads(as_json(json.dumps(name, ensure_ascii=False), "latin1")) == name


COLUMNS: Mapping[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(
        ("updated_at", "acquired_at", "expires_at", "last_finished_at", "queued_until"), SQL_MOMENTS
    ),
    **dict.fromkeys(
        ("fence", "run_count", "write", "newest", "queue", "schema_version"), SQL_NUMBERS
    ),
    **dict.fromkeys(("history", "value", "ticks_done", "wanted"), DOCUMENTS),
    **dict.fromkeys(("holder", "task_id", "last_outcome"), texts() | st.sampled_from((b"\xff", 7))),
}


@given(row=st.fixed_dictionaries({}, optional=COLUMNS))
@fuzzed
def test_any_value_in_any_column_spoils_no_other_row(shop: Celery, row: dict[str, Any]) -> None:
    """SQLite accepts a value of any type in any column."""
    empty(shop)
    run(shop, "odd", "key")
    if row:
        sets = ", ".join(f'"{name}" = :{name}' for name in row)
        change(shop, f"UPDATE kv_store SET {sets} WHERE key LIKE '%odd%'", **row)
    assert_innocent_is_shown(shop)
    name = 'odd{"key":"key"}'
    assert f" {name} " in output_of(shop, "ls")
    assert json_of(shop, "show", name)["singleton"] == name
    assert name in output_of(shop, "show", name)
    assert output_of(shop, "state", "get", name)


@given(started=EPOCHS, finished=EPOCHS, outcome=texts(), error=texts(), fence=st.integers())
@fuzzed
def test_any_value_in_a_history_is_shown(
    shop: Celery, started: float, finished: float, outcome: str, error: str, fence: int
) -> None:
    empty(shop)
    run(shop, "odd", "key")
    entry = Entry("id", 0, error, fence, None, outcome, error, started, finished)
    document = msgspec.json.encode([entry]).decode()
    ticks = json.dumps({error: [[[started, finished]], [started], [finished]]})
    change(
        shop,
        "UPDATE kv_store SET history = :history, last_outcome = :outcome, ticks_done = :ticks"
        " WHERE key LIKE '%odd%'",
        history=document,
        outcome=outcome,
        ticks=ticks,
    )
    assert_innocent_is_shown(shop)
    name = 'odd{"key":"key"}'
    (past,) = json_of(shop, "show", name)["history"]
    assert (past["outcome"], past["error"], past["fence"]) == (outcome, error, fence)
    assert past["started"] == iso(started)
    assert visible(error).replace(" ", "")[:40] in output_of(shop, "show", name).replace(" ", "")


@given(tick=st.sampled_from(
    ("9999-12-31T23:59:59.999999Z", "2026-01-01T00:00:00", "0001-01-01T00:00:00+23:59", "soon", 7)
), count=SQL_NUMBERS.filter(lambda each: not isinstance(each, bytes)))  # fmt: skip
@fuzzed
def test_any_value_in_an_entrys_state_spoils_no_other_entry(
    shop: Celery, tick: Any, count: Any
) -> None:
    empty(shop)
    store = runtime_of(shop).store
    lease = store.acquire(BEAT + runtime_of(shop).settings.beat_name, "beat", 60, None)
    assert lease
    usual = msgspec.to_builtins(EntryState("usual", "t", "every minute", next_tick=NOW))
    odd = usual | {"entry": "odd", "next_tick": tick, "last_tick": tick, "total_run_count": count}
    rows = {f"{lease.lease.key}:{each['entry']}": json.dumps(each) for each in (odd, usual)}
    assert store.entries.record(lease.lease, rows, 1, 0)
    assert_innocent_is_shown(shop)
    assert " usual " in output_of(shop, "next")


@given(at=EPOCHS | st.floats(), now=EPOCHS)
@settings(max_examples=100)
def test_any_number_can_be_printed_as_a_timestamp(at: float, now: float) -> None:
    for text in (moment(at), short_moment(at, now), iso(at), seconds(at)):
        assert text.isprintable()
        assert 0 < len(text) < 60


@pytest.mark.parametrize(
    ("epoch", "people", "programs"),
    [
        (0.0, "1970-01-01 00:00:00", "1970-01-01T00:00:00+00:00"),
        (253402300799.0, "9999-12-31 23:59:59", "9999-12-31T23:59:59+00:00"),
        (253402300800.0, "10000-01-01 00:00:00", "+010000-01-01T00:00:00+00:00"),
        (316516204800.0, "12000-01-01 00:00:00", "+012000-01-01T00:00:00+00:00"),
        (-62135596801.0, "0000-12-31 23:59:59", "+000000-12-31T23:59:59+00:00"),
        (-210863476800.0, "-4712-01-01 12:00:00", "-004712-01-01T12:00:00+00:00"),
        (float("inf"), "infinity", "infinity"),
        (float("-inf"), "-infinity", "-infinity"),
        (float("nan"), "nan", "nan"),
        (1e300, "1e+300 s since 1970", "1e+300 s since 1970"),
    ],
)
def test_timestamps_that_python_cannot_represent_are_printed(
    epoch: float, people: str, programs: str
) -> None:
    assert (moment(epoch), iso(epoch)) == (people, programs)


#: Odd timestamps as SQL, by dialect. MariaDB has no infinity, and no year after 9999.
ODD_TIMES = {
    "postgresql": ("'infinity'", "'-infinity'", "'12000-01-01+00'", "'4713-01-01+00 BC'"),
    "mysql": ("'9999-12-31 23:59:59.999999'", "'1000-01-01'"),
    "sqlite": (
        *("'9999-12-31 23:59:59.999+00:00'", "'0001-01-01 00:00:00+00:00'"),
        *("'infinity'", "'12000-01-01'", "9e999"),
    ),
}
TIME_COLUMNS = ("acquired_at", "expires_at", "last_finished_at", "updated_at", "queued_until")


ODD_VALUES = (
    *(
        "infinity",
        "",
        "soon",
        "\x1b[31m",
        "10000-01-01 00:00:00",
        "[1]",
        '[{"started":"x"}]',
        "a\0b",
    ),
    *(b"\xff\x00", b"1", 1e308, float("inf"), 1.5, -1, 2**63 - 1, -(2**63), "9" * 40),
)
#: Columns without which a run cannot read its state: an odd value there makes the run fail.
OF_THE_STATE = ("value", "schema_version")


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_a_run_on_a_row_with_an_odd_value(shop: Celery, value: Any) -> None:
    """If the run does not need the odd value to read its state, it succeeds.

    Otherwise it fails with ``SchemaDecodeFailed`` and leaves the state in the row unchanged.
    """
    run(shop, "odd", "a")
    with runtime_of(shop).store.engine.connect() as connection:
        columns = connection.exec_driver_sql("PRAGMA table_info(kv_store)").fetchall()
    names = {name for _, name, *_ in columns} - {"key", "fence"}
    assert names > {*OF_THE_STATE}
    for name in sorted(names):
        change(shop, "DELETE FROM kv_store")
        run(shop, "odd", "a", "kept")
        change(shop, f"UPDATE kv_store SET {name} = :value", value=value)
        before = state_of(shop)
        try:
            shop.tasks["odd"]("a", "new")
        except SchemaDecodeFailed:
            assert name in OF_THE_STATE or (name, value) == ("newest", 2**63 - 1)
            assert state_of(shop) == before
        else:
            assert name not in OF_THE_STATE


def test_state_set_asks_with_the_old_state_as_state_get_prints_it(shop: Celery) -> None:
    run(shop, "odd", "a", '"\u202e\x1b')
    name = 'odd{"key":"a"}'
    got = output_of(shop, "state", "get", name).strip()
    assert f"The state is {got}. Replace it?" in output_of(
        shop, "state", "set", name, got, may_be=1
    )


def test_a_name_that_begins_with_a_dash_can_be_typed(shop: Celery) -> None:
    @singleton_task(shop, name="--help", unique_on=["key"], shared=False)
    def odd(self: SingletonTask[Any], key: str) -> None: ...

    run(shop, "--help", "a")
    name = '--help{"key":"a"}'
    assert name in output_of(shop, "ls")
    assert f" {name} " in output_of(shop, "show", "--", name)
    assert json.loads(output_of(shop, "state", "get", "--", name)) is None


def state_of(app: Celery) -> Any:
    with runtime_of(app).store.engine.connect() as connection:
        statement = "SELECT value, schema_version FROM kv_store"
        return connection.exec_driver_sql(statement).fetchall()


def test_a_timestamp_of_infinity_spoils_no_other_row(make_app: Callable[..., Celery]) -> None:
    """The timestamp is in the row of a held singleton and in the leader's row, on each store."""
    shop = add_tasks(make_app())
    empty(shop)
    store = runtime_of(shop).store
    beat = BEAT + runtime_of(shop).settings.beat_name
    for key in (beat, f'{PREFIX}odd{{"key":"held"}}'):
        assert store.acquire(key, "node:1:a.1", 60, "id")
    for value in ODD_TIMES[store.engine.dialect.name]:
        for column in TIME_COLUMNS:
            change(shop, f"UPDATE kv_store SET {column} = {value} WHERE holder IS NOT NULL")
            assert_innocent_is_shown(shop)
            assert 'odd{"key":"held"}' in output_of(shop, "ls")
            shown = json_of(shop, "show", 'odd{"key":"held"}')
            if column == "last_finished_at" and "12000" in value:
                assert shown["last_finished_at"] in (None, "+012000-01-01T00:00:00+00:00")
            assert output_of(shop, "show", 'odd{"key":"held"}')


@pytest.fixture
def app_with_redis_leases(lease_url: str) -> Iterator[Celery]:
    """An app whose leases are in Redis."""
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(singleton_lease_url=lease_url)

    def body(self: SingletonTask) -> None: ...

    for name in ("odd", "innocent"):
        singleton_task(app, name=name, expected_interval=3600, shared=False)(body)
    app.finalize()
    yield app
    close_runtime(app)
    app.close()


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "soon", "1e300", "", "9" * 5000, b"\xff"])
def test_an_odd_value_in_redis_spoils_no_other_singleton(
    app_with_redis_leases: Celery, lease_url: str, value: str | bytes
) -> None:
    run(app_with_redis_leases, "innocent")
    run(app_with_redis_leases, "odd")
    names = ("acquired_at", "expires_at", "last_finished_at", "updated_at", "queued_until")
    more = ("fence", "run_count", "write", "holder", "history", "last_outcome", "ticks_done")
    with redis.Redis.from_url(lease_url) as client:
        for name in (*names, *more):
            client.hset(f"{PREFIX}odd", name, value)
            assert {each["singleton"] for each in json_of(app_with_redis_leases, "ls")} == {
                "odd",
                "innocent",
            }
            assert json_of(app_with_redis_leases, "show", "odd")
        # Redis keys that are no hash or have few fields, and a name that is not UTF-8.
        client.set(f"{PREFIX}value", "7")
        client.hset(f"{PREFIX}other", "fence", "7")
        client.hset(f"{PREFIX}\xff".encode("latin1"), "fence", "1")
        for name in ("value", "other", "\xff"):
            client.zadd("celery-singleton-keys", {f"{PREFIX}{name}".encode("latin1"): 0})
    lines = output_of(app_with_redis_leases, "ls")
    assert re.search(r"(?m)^ innocent +\d+ +1 +succeeded +\S+ +yes +free", lines)
    assert re.search("(?m)^ odd ", lines)
    assert len(json_of(app_with_redis_leases, "ls")) == 5
    assert output_of(app_with_redis_leases, "show", "odd")
    assert json_of(app_with_redis_leases, "show", "other")["run_count"] == 0, (
        "a row of a task that is not in this app"
    )
    assert (
        json_of(app_with_redis_leases, "prune", "--older-than", "1d", "--dry-run")["removed"] == 0
    )
    assert "innocent" in page(app_with_redis_leases).text
    assert metrics(app_with_redis_leases)["singleton_healthy"]["innocent"] == 1


def test_a_finish_time_of_infinity_is_unhealthy(make_app: Callable[..., Celery]) -> None:
    shop = add_tasks(make_app())
    empty(shop)
    for value in ODD_TIMES[runtime_of(shop).store.engine.dialect.name][:2]:
        change(shop, f"UPDATE kv_store SET last_finished_at = {value}")
        assert not check_health(shop).healthy


def test_a_lease_that_expires_at_infinity_can_be_released(make_app: Callable[..., Celery]) -> None:
    shop = add_tasks(make_app())
    store = runtime_of(shop).store
    name = 'odd{"key":"held"}'
    run(shop, "odd", "held")
    assert store.acquire(PREFIX + name, "node:1:a.1", 60, "id")
    value = ODD_TIMES[store.engine.dialect.name][0]
    if store.engine.dialect.name != "sqlite":
        change(shop, f"UPDATE kv_store SET acquired_at = {value}, expires_at = {value}")
    assert "its lease was held by node:1:a.1" in output_of(shop, "release", "--yes", name)
    assert [each["outcome"] for each in json_of(shop, "show", name)["history"]] == [
        *("succeeded", "lost")
    ], "the history can still be read"


def test_a_line_break_in_a_key_begins_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    key = "odd\n[2026-03-14 12:00:00] innocent\x1b[2J\x85"
    log.write(Lost(singleton="odd", key=key, holder="h", fence=1, why="a\rb", seconds=1.0))
    decode_rows({key: "not JSON"})
    history.decode("not JSON", key)
    ticks_done.decode("not JSON", key)
    for record in caplog.records:
        assert record.getMessage().isprintable()
        assert r"odd\x0a[2026-03-14 12:00:00] innocent\x1b[2J\x85" in record.getMessage()
    assert len(caplog.records) == 4
