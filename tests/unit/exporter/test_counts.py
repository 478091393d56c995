"""Counters that are made from events which may be made up or damaged.

Anyone who can reach the broker can send events. The number of series stays bounded, Prometheus can
scrape each of them, and the exporter continues to receive.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import msgspec
import pytest
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.beat.leader import key_of
from celery_singleton_state.exporter import Counts
from celery_singleton_state.exporter.gauges import Gauges
from celery_singleton_state.exporter.labels import OTHERS, UNKNOWN, Keys
from celery_singleton_state.exporter.receiver import Receiver
from celery_singleton_state.exporter.snapshot import take_snapshot
from celery_singleton_state.runtime import runtime_of
from tests.helpers.details import EXAMPLES

LIMIT = 5
#: The most series that any events may make: 60 for each key, and each of 2 tasks has LIMIT keys and
#: one more that stands for the rest.
MOST_SERIES = 2 * (LIMIT + 1) * 60 + 1

#: The order of a sample's labels: the label with the largest number comes first, and labels without
#: a number come last.
RANK = {"key": 1, "singleton": 2}
Samples = dict[str, dict[tuple[str, ...], float]]


class ReceiverWithoutBroker:
    """The exporter's receiver of events, with its counters. The test hands it events without a
    broker.
    """

    def __init__(self, per_key: bool) -> None:
        self.registry = CollectorRegistry()
        self.keys = Keys("singleton-state:", LIMIT)
        self.counts = Counts(self.registry, per_key, frozenset({"t"}), self.keys)
        self.receiver = Receiver(Celery(set_as_current=False), self.counts, self.counts.ignored)

    def emit(self, *events: Any) -> None:
        self.receiver._on_body(list(events))

    def samples(self) -> Samples:
        """Return the series that a scrape reads: maps metric name and label values to the value."""
        found: Samples = {}
        generate_openmetrics(self.registry).decode()
        for family in text_string_to_metric_families(generate_latest(self.registry).decode()):
            for sample in family.samples:
                names = sorted(sample.labels, key=lambda name: (RANK.get(name, 0), name))
                labels = tuple(sample.labels[name] for name in reversed(names))
                found.setdefault(sample.name, {})[labels] = sample.value
        return found


@pytest.fixture(params=[False, True], ids=["by task", "by key"])
def stand_in(request: pytest.FixtureRequest) -> ReceiverWithoutBroker:
    return ReceiverWithoutBroker(request.param)


def event(type: str, **fields: Any) -> dict[str, Any]:
    """Return a valid event of this type, in which the given fields are changed."""
    examples = (msgspec.to_builtins(example) for example in EXAMPLES)
    (found,) = (each for each in examples if each["type"] == f"singleton-{type}")
    return found | fields


ODD_TEXTS = st.one_of(
    st.text(),
    st.sampled_from(["t", UNKNOWN, OTHERS, "\ud800", "\x00\x1b]0;x\x07", 'a"b\\\n', "x" * 9_999]),
)
ODD = st.one_of(
    ODD_TEXTS,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 1e308, math.nan, math.inf, -math.inf, -1.0]),
    st.lists(st.integers(), max_size=1),
    st.dictionaries(ODD_TEXTS, st.integers(), max_size=1),
)
EVENTS = st.one_of(
    ODD,
    st.dictionaries(st.sampled_from(["type", "singleton", "key"]), ODD),
    st.builds(
        lambda whole, odd: msgspec.to_builtins(whole) | odd,
        st.sampled_from(EXAMPLES),
        st.dictionaries(
            st.sampled_from(
                ["type", "singleton", "key", "outcome", "seconds", "how", "policy", "operation",
                 "reason", "size", "fence", "task_id", "timestamp", "given_back"]
            ),
            ODD,
            max_size=3,
        ),
    ),
)  # fmt: skip


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.booleans(), st.lists(EVENTS, max_size=20))
def test_made_up_events_make_a_bounded_number_of_series(per_key: bool, events: list[Any]) -> None:
    stand_in = ReceiverWithoutBroker(per_key)
    stand_in.emit(*events, event("released", seconds=2.0))
    found = stand_in.samples()
    assert sum(map(len, found.values())) <= MOST_SERIES
    assert all(labels[0] in ("t", UNKNOWN) for each in found.values() for labels in each if labels)
    assert all(math.isfinite(value) for each in found.values() for value in each.values())
    assert sum(found["singleton_executions_total"].values()) >= 1


def test_all_unknown_label_values_are_one_series(stand_in: ReceiverWithoutBroker) -> None:
    for number in range(1000):
        made_up = f"made up {number}"
        stand_in.emit(
            event("released", singleton=made_up),
            event("released", outcome=made_up),
            event("skipped", outcome=made_up, key=made_up),
            event("failed", reason=made_up),
            event("conflicted", policy=made_up),
            event("took-over", how=made_up),
            event("state-saved", operation=made_up),
            event("write-refused", operation=made_up),
        )
    found = stand_in.samples()
    assert sum(map(len, found.values())) <= MOST_SERIES
    unknown = {labels: n for labels, n in found["singleton_executions_total"].items() if n}
    assert sum(n for labels, n in unknown.items() if labels[0] == UNKNOWN) == 1000
    assert sum(n for labels, n in unknown.items() if labels[-1] == OTHERS) == 2000
    for name in ("state_errors", "conflicts", "takeovers", "state_operations", "refused_writes"):
        counted = found[f"singleton_{name}_total"]
        assert {labels[-1] for labels, n in counted.items() if n} == {OTHERS}


@pytest.mark.parametrize(
    "seconds", [math.nan, math.inf, -math.inf, -0.1, "1", None, [], 10**400, 1e308, 1e17]
)
def test_an_impossible_duration_is_ignored(stand_in: ReceiverWithoutBroker, seconds: Any) -> None:
    """A single NaN would make the sum of durations NaN until the exporter restarts. A duration of
    1e308 would make the sum so large that no later run changes it.
    """
    for type in ("released", "lost"):
        stand_in.emit(event(type, seconds=seconds), event(type, seconds=2.0))
    found = stand_in.samples()
    assert list(found["singleton_duration_seconds_sum"].values()) == [4.0]
    assert list(found["singleton_duration_seconds_count"].values()) == [2]
    assert found["singleton_ignored_events_total"] == {(): 2}


def test_events_that_cannot_be_read_are_counted_and_logged_once(
    stand_in: ReceiverWithoutBroker, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(50):
        stand_in.emit(
            None, {}, {"type": 3}, {"type": "singleton-new"}, event("released", fence="x")
        )
        stand_in.emit({"type": "task-sent"})
    assert stand_in.samples()["singleton_ignored_events_total"] == {(): 250}
    assert 1 <= len(caplog.messages) <= 4


def test_keys_beyond_the_limit_are_one_series_and_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stand_in = ReceiverWithoutBroker(per_key=True)
    for number in range(10 * LIMIT):
        stand_in.emit(event("released", key=f"t{number}"), event("released", key="t" + "x" * 400))
    found = stand_in.samples()["singleton_executions_total"]
    assert len(found) == LIMIT + 1
    assert found[("t", OTHERS, "failed")] == 10 * LIMIT - (LIMIT - 1)
    assert all(len(label) <= 255 for labels in found for label in labels)
    assert [each.levelno for each in caplog.records] == [logging.WARNING]
    assert list(stand_in.samples()["singleton_duration_seconds_count"]) == [("t",)]


def test_the_keys_of_all_tasks_share_one_limit() -> None:
    """Beyond the limit only the first key of each task has a series of its own. Thus a task with
    many keys does not hide a task that has one key.
    """
    keys = Keys(limit=LIMIT)
    of_one = [keys.label("many", f"key {number}") for number in range(10 * LIMIT)]
    assert of_one[LIMIT:] == [OTHERS] * 9 * LIMIT
    assert keys.label("many", "key 0") == "key 0"
    assert [keys.label("few", key) for key in ("few", "few more", "few")] == ["few", OTHERS, "few"]


def test_rows_of_unknown_tasks_are_one_series(
    memory_app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's task is unknown if it was renamed, belongs to another app, or was made up.

    With ``per_key``, keys of a known task have series of their own, up to the limit.
    """

    @singleton_task(memory_app, name="t", unique_on=["key"], shared=False)
    def t(self: SingletonTask[Any], key: str) -> None:
        pass

    runtime = runtime_of(memory_app)
    prefix = runtime.settings.key_prefix
    tasks = {f"made-up-{number}": f"made-up-{number}" for number in range(20)}
    tasks |= {f't{{"key":"{number}"}}': "t" for number in range(2 * LIMIT)}
    tasks['t{"key":"\x1b"}'] = "t"
    runtime.store.requests.expect({prefix + name: task for name, task in tasks.items()})
    monkeypatch.setattr("celery_singleton_state.exporter.labels.KEYS", LIMIT)
    monkeypatch.setattr(Keys.__init__, "__defaults__", ("", LIMIT, None))

    def keys(per_key: bool) -> dict[tuple[str, ...], float]:
        gauges = Gauges(runtime, lambda: take_snapshot(runtime), lambda: True, per_key)
        (family,) = (each for each in gauges.collect() if each.name == "singleton_keys")
        return {tuple(sample.labels.values()): sample.value for sample in family.samples}

    assert keys(False) == {("t",): 2 * LIMIT + 1, (UNKNOWN,): 20}
    found = keys(True)
    assert found.pop((UNKNOWN, OTHERS)) == 20
    assert found.pop(("t", OTHERS)) == LIMIT + 1
    assert list(found.values()) == [1] * LIMIT


def test_label_values_are_escaped_as_names_are_in_ls(memory_app: Celery) -> None:
    """A parser of the metrics may not accept control characters and lone surrogates."""
    memory_app.conf.singleton_beat_name = "b\x9b31m\u2028\u202e\x1b"
    runtime = runtime_of(memory_app)
    runtime.store.requests.expect({key_of(runtime.settings.beat_name): "t"})
    families = Gauges(runtime, lambda: take_snapshot(runtime), lambda: True).collect()
    gauges = CollectorRegistry()
    (beat,) = (
        each.labels["beat"]
        for family in families
        if family.name == "singleton_beat_leading"
        for each in family.samples
    )
    assert beat == r"b\x9b31m\u2028\u202e\x1b"
    Counts(gauges, tasks=["a\x00\x85\ud800\x7fé🐘"])
    assert r'singleton_lost_leases_total{singleton="a\\x00\\x85\\ud800\\x7fé🐘"} 0.0' in (
        generate_latest(gauges).decode()
    )
