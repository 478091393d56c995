"""``celery singleton exporter`` with real workers and brokers: metrics, page and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state.store.base import Ended, NewValue, Write
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.fleet import Exporter, Fleet, outcome
from tests.helpers.script import counts
from tests.helpers.servers import Valkey
from tests.helpers.waiting import wait_until

APP = "tests.apps.seen_app"

pytestmark = pytest.mark.fleet(store="postgresql", app=APP)


@pytest.fixture
def store_url(postgres_url: str) -> str:
    return postgres_url


def executions(exporter: Exporter) -> dict[str, float]:
    found = counts(exporter, "singleton_executions_total")
    return {labels[-1]: count for labels, count in found.items()}


def test_events_are_counted_while_a_worker_sends_them(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """The worker starts without events. While it works, a remote control command turns them on,
    then off, then on again.
    """
    app = client()
    fleet.start("-c", "1")
    exporter = fleet.start_exporter()
    outcome(app.send_task("counted", ("a",)))
    app.control.enable_events(reply=True)
    outcome(app.send_task("counted", ("b",)))
    wait_until(lambda: executions(exporter) == {"succeeded": 1}, "the second one is counted")
    app.control.disable_events(reply=True)
    outcome(app.send_task("counted", ("c",)))
    app.control.enable_events(reply=True)
    outcome(app.send_task("counted", ("d",)))
    wait_until(lambda: executions(exporter) == {"succeeded": 2}, "the fourth one is counted")


@pytest.mark.parametrize("pool", ["solo", "threads", "gevent"])
def test_events_from_each_pool(fleet: Fleet, client: Callable[[], Celery], pool: str) -> None:
    fleet.start("-P", pool, "-c", "2", "-E")
    exporter = fleet.start_exporter("--per-key")
    app = client()
    outcome(app.send_task("counted", ("a",)))
    outcome(app.send_task("counted", ("b", "fail")))
    wait_until(
        lambda: len(exporter.metrics().get("singleton_executions_total", {})) == 2,
        "both runs are counted",
    )
    found = exporter.metrics()
    assert found["singleton_executions_total"] == {
        ("counted", 'counted{"key":"a"}', "succeeded"): 1,
        ("counted", 'counted{"key":"b"}', "failed"): 1,
    }
    assert found["singleton_keys"][("counted", 'counted{"key":"a"}')] == 1


def test_a_stopping_worker_delivers_its_last_events(
    make_fleet: Callable[..., Fleet], postgres_url: str, client: Callable[[], Celery]
) -> None:
    """A user's hook gets all events of a run, although the process ends just after the run."""
    fleet = make_fleet(postgres_url, TEST_HOOK="1")
    worker = fleet.start("-c", "1")
    outcome(client().send_task("counted", ("a",)))
    worker.stop()
    kinds = [note["kind"] for note in fleet.notes("told")]
    assert kinds == ["Acquired", "StateLoaded", "StateSaved", "Released"]


def test_health_over_http(fleet: Fleet, store: SqlStore) -> None:
    exporter = fleet.start_exporter()
    status, body = exporter.get("/health")
    assert (status, json.loads(body)["healthy"]) == (200, True)
    taken = store.acquire("singleton-state:hourly", "other", 60, None)
    assert taken is not None
    assert store.release(taken.lease, Ended("failed", "[]"))
    with store.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE kv_store SET last_finished_at = '2001-01-01 00:00Z'")
    status, body = exporter.get("/health")
    found: dict[str, Any] = json.loads(body)
    assert (status, found["healthy"]) == (503, False)
    assert "and should have within 7200 s" in found["singletons"][0]["reason"]
    assert exporter.metrics()["singleton_healthy"] == {("hourly",): 0}


def test_the_exporter_hides_states_unless_told_to_show_them(fleet: Fleet, store: SqlStore) -> None:
    taken = store.acquire('singleton-state:counted{"key":"a"}', "other", 60, None, task="counted")
    assert taken is not None
    assert store.save(taken.lease, Write(1, 0, NewValue('{"n":123454321}', 1)))
    exporter = fleet.start_exporter()
    status, page = exporter.get("/")
    assert status == 200
    assert "other" in page
    assert "123454321" not in page
    assert "123454321" in fleet.start_exporter("--show-state").get("/")[1]
    assert exporter.get("/nothing")[0] == 404


def test_the_exporter_survives_an_outage_of_store_and_broker(
    make_fleet: Callable[..., Fleet],
    own_postgres: Any,
    own_valkey: Valkey,
    client: Callable[[], Celery],
) -> None:
    url = own_postgres.create_database("shop")
    fleet = make_fleet(
        url, CELERY_BROKER_URL=own_valkey.url, CELERY_SINGLETON_HEARTBEAT_INTERVAL="1"
    )
    exporter = fleet.start_exporter()
    own_postgres.stop()
    own_valkey.stop()
    wait_until(lambda: not exporter.metrics()["singleton_broker_up"][()], "the broker is missed")
    assert exporter.metrics()["singleton_store_up"] == {(): 0}
    status, body = exporter.get("/health")
    assert (status, bool(json.loads(body)["error"])) == (503, True)
    assert exporter.get("/")[0] == 200
    own_postgres.start()
    own_valkey.start()
    wait_until(lambda: exporter.metrics()["singleton_broker_up"][()], "the broker is back")
    assert exporter.metrics()["singleton_store_up"] == {(): 1}
    fleet.start("-P", "solo", "-E")
    outcome(client().send_task("counted", ("a",)))
    wait_until(lambda: executions(exporter) == {"succeeded": 1}, "the exporter counts again")


@pytest.mark.parametrize("store", ["nonsense://", "{server}/not-there"])
def test_the_exporter_ends_if_its_store_is_misconfigured(
    make_fleet: Callable[..., Fleet], postgres_url: str, store: str
) -> None:
    """The exporter prints one line. It does not wait, because waiting cannot help."""
    url = store.format(server=postgres_url.rpartition("/")[0])
    answer = make_fleet(url).command("singleton", "exporter", "--port", "0")
    assert answer.returncode == 1
    assert answer.stderr.startswith("Error: ")
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


def test_the_exporter_ends_if_its_address_is_in_use(fleet: Fleet) -> None:
    taken = fleet.start_exporter()
    port = taken.url.rsplit(":", 1)[1]
    answer = fleet.command("singleton", "exporter", "--port", port)
    assert answer.returncode == 1
    assert answer.stderr.startswith("Error: cannot listen at 127.0.0.1:")
