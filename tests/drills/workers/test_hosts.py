"""Hosts that share a directory for temporary files, and hosts without one.

Leases live for two minutes here, so that no lease becomes free by expiring.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from celery_singleton_state import LeaderHandoffFailed
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.worker_rows import row_of

pytestmark = pytest.mark.fleet(CELERY_SINGLETON_HEARTBEAT_INTERVAL="60")


def test_a_live_run_is_left_alone_by_a_host_that_shares_its_files_and_not_its_locks(
    fleet: Fleet, client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A's body runs. B is another host that sees A's holder files, but not A's locks on them (NFS
    with ``local_lock``, CIFS with ``nobrl``, Lustre with ``localflock``). B starts, and a delivery
    on B finds A's lease taken. B must not conclude that A is dead.
    """
    app, until = client(), tmp_path / "until"
    fleet.start("-P", "solo")
    running = app.send_task("held", (str(until),))
    fleet.wait_for_notes("enter")
    holder = row_of(app, "held").holder
    (tmp_path / "boot_id").write_text("another host's")
    fleet.environment["TEST_BOOT_ID"] = str(tmp_path / "boot_id")
    fleet.start("-P", "solo", "-Q", "elsewhere", app="tests.apps.kernel_app")
    meeting = app.send_task("held", (str(until),), queue="elsewhere")
    assert isinstance(outcome(meeting), LeaderHandoffFailed)
    assert row_of(app, "held").holder == holder is not None
    until.touch()
    assert outcome(running) == "held"


def test_a_worker_runs_without_a_directory_for_temporary_files(
    fleet: Fleet, client: Callable[[], Celery]
) -> None:
    """The worker has no directory for temporary files, as in a container with a read-only file
    system and no ``tmpfs``. The test uses threads, because a prefork pool cannot start without
    temporary files.
    """
    fleet.environment["TEST_NO_TEMPDIR"] = "1"
    worker = fleet.start("-P", "threads", app="tests.apps.kernel_app")
    assert outcome(client().send_task("increment")) == 1
    assert "if a process dies, its leases must expire" in worker.output
