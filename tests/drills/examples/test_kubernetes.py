"""The Kubernetes example: its commands are run unchanged, and its probes are called."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import Ended
from tests.helpers.fleet import Fleet, Program, has_ping
from tests.helpers.servers import free_port
from tests.helpers.waiting import wait_until

EXAMPLE = Path(__file__).parents[3] / "examples" / "kubernetes" / "celery.yml"
PORT = "9809"

pytestmark = pytest.mark.fleet(store="postgresql")


class Container:
    """One of the example's containers, run as a process, and its probes."""

    def __init__(self, spec: dict[str, Any], fleet: Fleet, pod: str) -> None:
        self.spec = spec
        self.port = str(free_port())
        (fleet.directory / "shop.py").write_text("from tests.apps.seen_app import app\n")
        self._environment = fleet.environment | {"POD": pod}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment["PATH"] = path
        celery, dash_a, app, *words = (
            word.replace("$(POD)", pod).replace(PORT, self.port) for word in spec["command"]
        )
        assert (celery, dash_a, app) == ("celery", "-A", "shop")
        self.program = Program(words, self._environment, fleet.directory / f"{pod}.log", app)

    def passes(self, probe: str) -> bool:
        """Return whether one of the container's probes passes now."""
        asked = self.spec[probe]
        if "exec" in asked:
            answer = subprocess.run(
                asked["exec"]["command"],
                env=self._environment,
                cwd=self.program.log.parent,
                capture_output=True,
                timeout=60,
            )
            return answer.returncode == 0
        (port,) = self.spec["ports"]
        assert (asked["httpGet"]["port"], port["containerPort"]) == (port["name"], int(PORT))
        try:
            url = f"http://127.0.0.1:{self.port}{asked['httpGet']['path']}"
            with urllib.request.urlopen(url, timeout=30):
                return True
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            return False


@pytest.fixture
def start(fleet: Fleet) -> Iterator[Callable[[str], Container]]:
    started: list[Container] = []
    documents = yaml.safe_load_all(EXAMPLE.read_text())
    deployments = {each["metadata"]["name"]: each for each in documents}

    def run(deployment: str) -> Container:
        (spec,) = deployments[deployment]["spec"]["template"]["spec"]["containers"]
        started.append(Container(spec, fleet, f"{deployment}-{len(started)}"))
        return started[-1]

    yield run
    for container in started:
        container.program.close()


@has_ping
def test_workers_and_beats_answer_for_themselves(start: Callable[[str], Container]) -> None:
    """Of two workers one is dead. Its probe fails although the other worker answers."""
    containers = [start(name) for name in ("shop-worker", "shop-worker", "shop-beat", "shop-beat")]
    for container in containers:
        wait_until(lambda each=container: each.passes("livenessProbe"), "it is alive")
    containers[0].program.close()
    assert not containers[0].passes("livenessProbe")
    wait_until(lambda: containers[1].passes("livenessProbe"), "the other worker is alive")


def test_the_exporter_is_ready_while_all_are_healthy(
    start: Callable[[str], Container], postgres_url: str
) -> None:
    exporter = start("shop-exporter")
    wait_until(lambda: exporter.passes("readinessProbe"), "the exporter is ready")
    store = open_store(postgres_url, "kv_store", 5.0)
    taken = store.acquire("singleton-state:hourly", "other", 60, None)
    assert taken is not None
    assert store.release(taken.lease, Ended("failed", "[]"))
    with store.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE kv_store SET last_finished_at = '2001-01-01 00:00Z'")
    store.close()
    assert not exporter.passes("readinessProbe")
    assert exporter.passes("livenessProbe")
