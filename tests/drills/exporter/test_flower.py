"""Flower handles Celery's events in the same way when this package's events are among them.

This is a drill, not a test, because every ``celery`` command loads Flower if it is installed.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from celery import Celery

from tests.helpers.fleet import Fleet, Program, outcome
from tests.helpers.servers import free_port
from tests.helpers.waiting import wait_until

APP = "tests.apps.seen_app"

pytestmark = pytest.mark.fleet(store="postgresql", app=APP)


@pytest.fixture
def flower(fleet: Fleet) -> Iterator[int]:
    """The port of a running Flower."""
    port = free_port()
    # Without this setting Flower's API needs a login.
    environment = fleet.environment | {"FLOWER_UNAUTHENTICATED_API": "1"}
    command = ["flower", f"--port={port}", "--address=127.0.0.1"]
    program = Program(command, environment, fleet.directory / "flower.log", APP)
    yield port
    program.close()


def test_flower_does_not_count_our_events_as_tasks(
    fleet: Fleet, client: Callable[[], Celery], flower: int
) -> None:
    """Flower also receives our events. It does not count them as tasks, and does not show them as
    tasks.
    """
    fleet.start("-P", "solo", "-E")

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{flower}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def answers() -> bool:
        try:
            return "flower_worker_online{" in get("/metrics")
        except OSError:
            return False

    wait_until(answers, "Flower has seen the worker")
    app = client()
    sent = [app.send_task("counted", (str(n), "fail" if n % 4 == 0 else "save")) for n in range(12)]
    for result in sent:
        outcome(result)

    def counted(kind: str) -> int:
        found = re.findall(
            rf'^flower_events_total{{.*type="{kind}".*}} (\S+)', get("/metrics"), re.M
        )
        return round(sum(map(float, found)))

    wait_until(
        lambda: counted("task-succeeded") + counted("task-failed") == 12, "all tasks have ended"
    )
    assert (counted("task-succeeded"), counted("task-failed")) == (9, 3)
    tasks = json.loads(get("/api/tasks"))
    assert {task: each["state"] for task, each in tasks.items()} == {
        result.id: "FAILURE" if n % 4 == 0 else "SUCCESS" for n, result in enumerate(sent)
    }
