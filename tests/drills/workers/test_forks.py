"""Bodies that fork a child that outlives them.

Leases live for two minutes here, so that no lease becomes free by expiring.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from tests.helpers.fleet import Fleet, outcome
from tests.helpers.worker_rows import row_of, wait_until_free

SERVERS = ("sqlite", "postgresql", "mariadb")

pytestmark = pytest.mark.fleet(store=SERVERS, CELERY_SINGLETON_HEARTBEAT_INTERVAL="60")


def test_a_run_and_the_child_that_it_forked_both_go_on(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    app, until, childs_end = client(), tmp_path / "until", tmp_path / "childs end"
    fleet.start("-c", "1")
    sent = app.send_task("forks", (str(until), str(childs_end)))
    (forked,) = fleet.wait_for_notes("forked")
    until.touch()
    count = outcome(sent)
    row = wait_until_free(app, "forks")
    assert row.value == f'{{"n":{count}}}'
    os.kill(forked["child"], 0)
    childs_end.touch()
    (ended,) = fleet.wait_for_notes("child ends")
    assert ended["n"] == 0
    until.unlink()
    again = app.send_task("forks", (str(until), str(childs_end)))
    fleet.wait_for_notes("forked", 2)
    until.touch()
    assert outcome(again) > count


def test_a_killed_childs_lease_is_free_though_its_forked_child_lives(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """The pool's process is killed. The child that its body has forked has copies of the open files
    of the pool's process, and lives on.
    """
    app = client()
    fleet.start("-c", "1")
    app.send_task("forks", (str(tmp_path / "never"), str(tmp_path / "childs end")))
    (forked,) = fleet.wait_for_notes("forked")
    assert row_of(app, "forks").holder
    os.kill(forked["pid"], signal.SIGKILL)
    wait_until_free(app, "forks")
    os.kill(forked["child"], 0)
    (tmp_path / "childs end").touch()
    fleet.wait_for_notes("child ends")
