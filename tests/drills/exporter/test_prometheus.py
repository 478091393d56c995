"""The exporter, the alert rules and the dashboard, checked with a real Prometheus."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state.migrations.open_store import open_store
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.prometheus import Prometheus, find
from tests.helpers.script import work_through_the_script
from tests.helpers.waiting import wait_until

APP = "tests.apps.seen_app"
EXAMPLE = Path(__file__).parents[3] / "examples" / "monitoring"

pytestmark = pytest.mark.fleet(app=APP)


@pytest.fixture
def make_prometheus() -> Iterator[Callable[[str], Prometheus]]:
    made: list[Prometheus] = []

    def make(target: str) -> Prometheus:
        made.append(Prometheus(target, EXAMPLE / "alerts.yml"))
        return made[-1]

    yield make
    for server in made:
        server.close()


def promtool(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [find("promtool"), *arguments], capture_output=True, text=True, timeout=60, **options
    )


def expressions() -> list[str]:
    """Return the dashboard's queries, with the dashboard's variables filled in."""
    board = json.loads((EXAMPLE / "dashboard.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [
        each.replace("$__rate_interval", "1m")
        .replace("$singleton", ".*")
        .replace("$interval", "1m")
        for each in found
    ]


@pytest.mark.fleet(store="postgresql")
def test_prometheus_has_the_exact_numbers(
    make_fleet: Callable[..., Fleet],
    postgres_url: str,
    client: Callable[[], Celery],
    make_prometheus: Callable[[str], Prometheus],
) -> None:
    """The runs of a script go through worker, broker and exporter. Prometheus has their exact
    numbers, and can evaluate all queries of the rules and the dashboard.
    """
    find("prometheus")
    fleet = make_fleet()
    fleet.start("-c", "2", "-E")
    exporter = fleet.start_exporter()
    store = open_store(postgres_url, "kv_store", 5.0)
    prometheus = make_prometheus(exporter.url.removeprefix("http://"))
    wait_until(lambda: prometheus.query("singleton_state_errors_total"), "Prometheus has the zeros")
    app = client()
    expected = work_through_the_script(app, fleet, store)
    outcome(app.send_task("hourly"))
    ask = prometheus.query

    def found(name: str) -> dict[frozenset[str], float]:
        """Return the series of the scripted task ``counted`` that are not 0, without the series of
        ``hourly``.
        """
        return {frozenset(each): n for each, n in ask(f"{name}{{singleton='counted'}} > 0").items()}

    for name, counted in expected.items():
        wait_until(lambda n=name, c=counted: found(n) == c, f"Prometheus has {name}: {counted}")
    # Prometheus counts even the first error as an increase, because the series existed before with
    # the value 0.
    increase = "increase(singleton_state_errors_total{reason='SchemaDecodeFailed'}[1m]) > 0"
    wait_until(
        lambda: ask(increase).keys() == {("SchemaDecodeFailed", "counted")},
        "Prometheus sees an increase",
    )
    assert ask("singleton_expected_interval_seconds") == {("hourly",): 3600}
    store.close()
    for expression in expressions():
        prometheus.query(expression)
    wait_until(lambda: set(prometheus.rules().values()) == {"ok"}, "all rules were evaluated")
    assert len(prometheus.rules()) == 9

    checked = promtool("check", "metrics", input=exporter.get("/metrics")[1])
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_dashboard_asks_for_metrics_that_exist(
    make_fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    """Check the names of the metrics without a Prometheus, so that the test runs on every
    machine.
    """
    fleet = make_fleet()
    text = fleet.start_exporter("--per-key").get("/metrics")[1]
    there = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    # The exporter does not show these two metrics, because no beat has led yet.
    there |= {"singleton_beat_leading", "singleton_beat_fence"}
    asked = " ".join([*expressions(), (EXAMPLE / "alerts.yml").read_text()])
    named = {word for word in _words(asked) if word.startswith("singleton_")}
    assert named
    assert {word.removesuffix("_bucket") for word in named} <= there


def _words(text: str) -> list[str]:
    return "".join(each if each.isalnum() or each == "_" else " " for each in text).split()


def test_the_alerts_fire_in_their_cases(tmp_path: Path) -> None:
    for file in (EXAMPLE / "alerts.yml", Path(__file__).with_name("alerts_test.yml")):
        shutil.copy(file, tmp_path)
    checked = promtool("check", "rules", "alerts.yml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", "alerts_test.yml", cwd=tmp_path)
    assert tested.returncode == 0, tested.stdout + tested.stderr
