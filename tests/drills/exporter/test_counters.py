"""The exporter's counters after many runs, and with many keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from celery import Celery

from celery_singleton_state.migrations.open_store import open_store
from tests.helpers.fleet import Fleet
from tests.helpers.script import RUNS, counts, work_through_the_script
from tests.helpers.servers import Postgres
from tests.helpers.waiting import wait_until

APP = "tests.apps.seen_app"


pytestmark = pytest.mark.fleet(store="postgresql", app=APP)


def test_the_counters_agree_with_500_runs(
    fleet: Fleet, client: Callable[[], Celery], fleet_store: str
) -> None:
    """The 500 runs have different keys, and are counted in one series."""
    app = client()
    fleet.start("-c", "2", "-E")
    exporter = fleet.start_exporter()
    store = open_store(fleet_store, "kv_store", 5.0, auto_migrate=True)
    expected = work_through_the_script(app, fleet, store)
    store.close()

    def found(name: str) -> dict[frozenset[str], float]:
        return {frozenset(labels): count for labels, count in counts(exporter, name).items()}

    for name, counted in expected.items():
        wait_until(lambda n=name, c=counted: found(n) == c, f"{name} is {counted}")
    metrics = exporter.metrics()
    assert metrics["singleton_keys"] == {("hourly",): 1, ("counted",): RUNS + 10}
    assert not any(
        "key " in label for series in metrics.values() for each in series for label in each
    )
    assert metrics["singleton_leases_held"] == {("hourly",): 0, ("counted",): 10}


def test_ten_thousand_keys_are_read_by_one_statement(
    make_fleet: Callable[..., Fleet], postgres: Postgres, server_url: str
) -> None:
    """The keys add no series to the metrics. With ``--per-key`` keys add series, up to a limit."""
    url = f"{server_url}?application_name=scraped&options=-c%20log_statement%3Dall"
    fleet = make_fleet(url)
    exporter, per_key = fleet.start_exporter(), fleet.start_exporter("--per-key")
    store = open_store(server_url, "kv_store", 5.0)
    store.requests.expect({'singleton-state:counted{"key":"0"}': "counted"})
    before = exporter.metrics()
    store.requests.expect(
        {f'singleton-state:counted{{"key":"{n}"}}': "counted" for n in range(10_000)}
    )
    store.close()
    said = len(postgres.statements_of("scraped"))
    after = exporter.metrics()
    assert postgres.statements_of("scraped")[said:] == ["SELECT"]
    assert after["singleton_keys"][("counted",)] == 10_000
    assert {name: set(each) for name, each in after.items()} == {
        name: set(each) for name, each in before.items()
    }
    # 1,000 series for the first keys, one for all other keys, and one for the other task.
    assert len(per_key.metrics()["singleton_keys"]) == 1_002
