"""``celery singleton migrate``, and what a worker says that needs it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.processes.fleet import Fleet
from tests.test_migrate import execute, given_table


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet], postgres_url: str) -> Fleet:
    return make_fleet(postgres_url, CELERY_SINGLETON_AUTO_MIGRATE="0")


def test_a_worker_without_its_table_names_the_command_that_mends_it(fleet: Fleet) -> None:
    worker = fleet.start("-P", "solo", ready=False)
    worker.process.wait(timeout=30)
    assert worker.process.returncode != 0
    assert "table kv_store is missing or of an older release" in worker.output
    assert "celery -A <your app> singleton migrate" in worker.output

    listed = fleet.command("singleton", "ls")
    assert listed.returncode == 1
    assert "singleton migrate" in listed.stderr
    assert "Traceback" not in listed.stderr

    for _ in range(2):
        migrated = fleet.command("singleton", "migrate")
        assert (migrated.returncode, migrated.stdout) == (0, "table kv_store is ready\n")
    assert json.loads(fleet.command("singleton", "ls", "--json").stdout) == []
    fleet.start("-P", "solo")


def test_a_worker_with_an_older_table_says_the_same(fleet: Fleet, postgres_url: str) -> None:
    execute(postgres_url, given_table(postgres_url))
    worker = fleet.start("-P", "solo", ready=False)
    worker.process.wait(timeout=30)
    assert "of an older release" in worker.output
    assert fleet.command("singleton", "migrate").returncode == 0
    fleet.start("-P", "solo")
