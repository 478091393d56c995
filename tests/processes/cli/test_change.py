"""The commands ``celery singleton state``, ``release`` and ``health``, as an operator runs them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state.store.base import Ended
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.fleet import Fleet, outcome

KEY = "singleton-state:increment"
APP = "tests.apps.seen_app"


def output_of(answer: subprocess.CompletedProcess[str], status: int = 0) -> str:
    assert answer.returncode == status, answer.stderr
    assert "Traceback" not in answer.stderr
    return answer.stdout if status == 0 else answer.stderr


def test_the_state_is_read_and_changed(
    fleet: Fleet, client: Callable[[], Celery], store: SqlStore
) -> None:
    app = client()
    fleet.start("-P", "solo")
    assert outcome(app.send_task("increment")) == 1
    assert output_of(fleet.command("singleton", "state", "get", "increment")) == '{"n":1}\n'
    answer = fleet.command("singleton", "state", "set", "increment", '{"n": 41}', "--yes")
    assert output_of(answer) == "the state of increment is set\n"
    assert "singleton increment state set by " in answer.stderr
    assert outcome(app.send_task("increment")) == 42
    output_of(fleet.command("singleton", "state", "reset", "increment", "--yes"))
    assert output_of(fleet.command("singleton", "state", "get", "increment")) == "null\n"
    assert outcome(app.send_task("increment")) == 1
    row = store.peek(KEY)
    assert row is not None
    assert row.run_count == 3


def test_a_state_can_be_set_before_the_first_run(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    output_of(fleet.command("singleton", "state", "set", "increment", '{"n": 6}', "--yes"))
    fleet.start("-P", "solo")
    assert outcome(client().send_task("increment")) == 7


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("set", "increment", '{"n": "x"}'), "not a state of increment: "),
        (("set", "increment", "{"), "not a state of increment: "),
        (("set", "nothing", "{}"), "this app has no singleton task 'nothing'"),
        (("set", "incrementt", "{}"), "'incrementt' has not run yet; did you mean increment or "),
        (("set", "increment{}", "{}"), "'increment{}' has not run yet; did you mean increment or "),
        (("set", "held", "{}"), "task held has no state_schema"),
        (("reset", "increment"), "singleton 'increment' has not run yet"),
        (("get", "increment"), "singleton 'increment' has not run yet"),
    ],
)
def test_a_wrong_state_or_name_changes_nothing(
    fleet: Fleet, store: SqlStore, arguments: tuple[str, ...], text: str
) -> None:
    yes = () if arguments[0] == "get" else ("--yes",)
    assert text in output_of(fleet.command("singleton", "state", *arguments, *yes), 1)
    assert store.list("") == []


def test_the_state_of_an_active_run_is_changed_only_with_force(
    fleet: Fleet, store: SqlStore
) -> None:
    """``--force`` also releases the run's lease. So the store refuses the run's later writes."""
    held = store.acquire(KEY, "host:1:a.1", 60, "its-task")
    assert held is not None
    change = ("singleton", "state", "set", "increment", '{"n": 5}', "--yes")
    refused = output_of(fleet.command(*change), 1)
    assert "increment has an active run of host:1:a.1" in refused
    output_of(fleet.command(*change, "--force"))
    assert store.renew([held.lease]) == {}
    row = store.peek(KEY)
    assert row is not None
    assert (row.value, row.holder, row.fence) == ('{"n":5}', None, held.lease.fence)
    shown = json.loads(output_of(fleet.command("singleton", "show", "increment", "--json")))
    (run,) = shown["history"]
    assert (run["outcome"], run["fence"]) == ("lost", held.lease.fence)
    assert run["error"].startswith("released by ")


def test_an_operator_releases_the_lease_of_a_holder(fleet: Fleet, store: SqlStore) -> None:
    held = store.acquire(KEY, "host:1:a.1", 60, "its-task")
    assert held is not None
    no = subprocess.run(
        [*fleet.celery("singleton", "release", "increment")],
        env=fleet.environment,
        input="n\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert no.returncode == 1
    assert "host:1:a.1 may be alive: its lease has " in no.stdout
    assert list(store.renew([held.lease])) == [KEY]
    answer = fleet.command("singleton", "release", "increment", "--yes")
    fence = held.lease.fence
    had = f"increment is free; its lease was held by host:1:a.1, with fence {fence}\n"
    assert output_of(answer) == had
    assert store.renew([held.lease]) == {}
    assert output_of(fleet.command("singleton", "release", "increment")) == "increment is free\n"


def test_an_operator_ends_a_hold_period_early(fleet: Fleet, store: SqlStore) -> None:
    held = store.acquire(KEY, "host:1:a.1", 60, None)
    assert held is not None
    assert store.release(held.lease, Ended("succeeded", "[]", hold=60))
    output_of(fleet.command("singleton", "release", "increment", "--yes"))
    row = store.peek(KEY)
    assert row is not None
    assert (row.holder, row.run_count, row.last_outcome) == (None, 1, "succeeded")


def test_health(fleet: Fleet, client: Callable[[], Celery], store: SqlStore) -> None:
    """The singleton ``hourly`` must run once an hour. Before its first run, the hour counts from
    the start of the worker.
    """
    fleet.start("-P", "solo", app=APP)
    rows: list[dict[str, Any]] = json.loads(
        output_of(fleet.command("singleton", "ls", "--json", app=APP))
    )
    assert [(row["singleton"], row["run_count"], row["healthy"]) for row in rows] == [
        ("hourly", 0, True)
    ]
    assert output_of(fleet.command("singleton", "health", app=APP)) == "healthy: 1 singletons\n"
    outcome(client().send_task("hourly"))
    found = json.loads(output_of(fleet.command("singleton", "health", "--json", app=APP)))
    assert found["healthy"] is True
    (one,) = found["singletons"]
    assert one["reason"].startswith("it finished ")
    with store.engine.connect() as connection:
        connection.exec_driver_sql(
            "UPDATE kv_store SET last_finished_at = '2001-01-01 00:00:00.000+00:00'"
        )
    answer = fleet.command("singleton", "health", app=APP)
    assert answer.returncode == 1
    assert "hourly: it finished " in answer.stdout
    assert "and should have within 7200 s" in answer.stdout


def test_health_with_an_unavailable_store(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet("postgresql://nobody@127.0.0.1:1/none", CELERY_SINGLETON_AUTO_MIGRATE="0")
    assert "the store is unavailable" in output_of(fleet.command("singleton", "health"), 1)
