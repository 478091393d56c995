"""Workers that keep the leases of singletons without a state in Redis."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from celery_singleton_state import LeaderHandoffFailed
from tests.helpers.fleet import Fleet, outcome

pytestmark = pytest.mark.fleet(store="postgresql", leases="lease_url")


def test_two_deliveries_do_not_run_at_the_same_time(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    app, go = client(), tmp_path / "go"
    fleet.start("-c", "2")
    first = app.send_task("held", (str(go),))
    (entered,) = fleet.wait_for_notes("enter")
    error = outcome(app.send_task("held", ("",)))
    assert isinstance(error, LeaderHandoffFailed)
    assert outcome(app.send_task("increment")) == 1
    held, stateful = json.loads(fleet.command("singleton", "ls", "--json").stdout)
    assert (held["singleton"], held["task_id"]) == ("held", first.id)
    assert (stateful["singleton"], stateful["run_count"]) == ("increment", 1)
    go.touch()
    assert outcome(first) == "held"
    assert entered["task"] == "held"


def test_a_killed_childs_lease_is_free_at_once(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """The worker notices its child's death and releases the lease, long before it would expire."""
    fleet.environment["CELERY_SINGLETON_HEARTBEAT_INTERVAL"] = "60"
    app = client()
    worker = fleet.start("-c", "1")
    app.send_task("held", ("never",))
    child = int(fleet.wait_for_notes("enter")[0]["pid"])
    os.kill(child, signal.SIGKILL)
    fleet.wait_for_output(worker, "singleton-state:held is free")
    shown = json.loads(fleet.command("singleton", "show", "held", "--json").stdout)
    assert [run["outcome"] for run in shown["history"]] == ["lost"]


def test_a_queued_message_is_not_sent_again(fleet: Fleet) -> None:
    """The task has ``enqueue_once``. A client that has imported the task sends it twice."""
    script = (
        "from tests.apps.tasks import sent_once;"
        "print(sent_once.delay(1).id, sent_once.delay(1).id, sent_once.delay(2).id)"
    )
    sent = subprocess.run(
        [sys.executable, "-c", script], env=fleet.environment, capture_output=True, text=True
    )
    one, again, other = sent.stdout.split()
    assert one == again != other


def test_a_state_needs_a_database(fleet: Fleet) -> None:
    del fleet.environment["CELERY_SINGLETON_STORE_URL"]
    worker = fleet.start("-P", "solo", ready=False)
    assert worker.process.wait(timeout=30) != 0
    assert "set singleton_store_url as well" in worker.output
