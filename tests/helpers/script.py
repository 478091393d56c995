"""A script of runs, and the metrics that the exporter must show after it."""

from __future__ import annotations

import random
from collections import Counter

from celery import Celery

from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.fleet import Exporter, Fleet, outcome

RUNS = 500
DOES = ("save", "idle", "checkpoint", "transaction", "fail", "misfit", "sleep")
#: Maps each kind of run to the operations on its state. Each run has a new state.
OPERATIONS = {
    "save": ("load", "save"),
    "idle": ("load", "save"),
    "checkpoint": ("load", "checkpoint", "save"),
    "transaction": ("load", "transaction"),
    "fail": ("load",),
    "misfit": ("load",),
    "sleep": ("load", "save"),
}


#: Maps each metric to a dict, which maps a set of label values to the expected value, unless it is
#: 0.
Expected = dict[str, dict[frozenset[str], float]]


def work_through_the_script(app: Celery, fleet: Fleet, store: SqlStore) -> Expected:
    """Run 500 tasks, each with a key of its own, and then some duplicates and conflicts.

    :returns: the expected metrics, which the exporter may show a little later.
    """
    chance = random.Random(5)
    script = [chance.choices(DOES, weights=(40, 20, 15, 15, 5, 3, 2))[0] for _ in range(RUNS)]
    sent = [app.send_task("counted", (f"key {number}", does)) for number, does in enumerate(script)]
    fleet.wait_for_notes("runs", RUNS)
    done = [
        (number, result)
        for number, (does, result) in enumerate(zip(script, sent, strict=True))
        if does not in ("fail", "misfit")
    ]
    for number, result in done[:20]:
        outcome(result)
        app.send_task("counted", (f"key {number}", script[number]), task_id=result.id)
    for number in range(10):
        key = f'singleton-state:counted{{"key":"taken {number}"}}'
        assert store.acquire(key, "other", 60, "x", task="counted")
        app.send_task("counted", (f"taken {number}",))
    does = Counter(script)
    failed = does["fail"] + does["misfit"]
    outcomes = {"succeeded": RUNS - failed, "failed": failed, "duplicate": 20, "skipped": 10}
    operations = Counter(each for kind in script for each in OPERATIONS[kind])
    expected = {
        "executions_total": outcomes,
        "state_operations_total": operations,
        "state_errors_total": {"SchemaDecodeFailed": does["misfit"]},
        "conflicts_total": {"skip": 10},
        "lost_leases_total": {},
        "takeovers_total": {},
        "refused_writes_total": {},
    }
    found: Expected = {
        f"singleton_{name}": {frozenset({"counted", label}): n for label, n in counted.items()}
        for name, counted in expected.items()
    }
    return found | {"singleton_duration_seconds_count": {frozenset({"counted"}): RUNS}}


def counts(exporter: Exporter, name: str) -> dict[tuple[str, ...], float]:
    """Return a dict that maps the labels of each series of a counter to the series' value,
    without the series that are 0.
    """
    found = exporter.metrics().get(name, {})
    return {labels: count for labels, count in found.items() if count}
