"""``celery singleton migrate``, and the errors of workers that need it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from celery import Celery

from tests.helpers.fleet import Fleet, Program, outcome
from tests.helpers.roles import OWNER, TABLE, WORKER, drop_roles, grant, make_roles, of
from tests.helpers.tables import execute, given_table

pytestmark = pytest.mark.fleet(store="postgresql", CELERY_SINGLETON_AUTO_MIGRATE="0")


def test_a_worker_without_its_table_names_the_command_that_makes_it(fleet: Fleet) -> None:
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


def test_a_worker_with_an_older_table_names_the_command_that_upgrades_it(
    fleet: Fleet, postgres_url: str
) -> None:
    execute(postgres_url, given_table(postgres_url))
    worker = fleet.start("-P", "solo", ready=False)
    worker.process.wait(timeout=30)
    assert "of an older release" in worker.output
    assert fleet.command("singleton", "migrate").returncode == 0
    fleet.start("-P", "solo")


def test_an_existing_table_with_another_name_is_upgraded(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], postgres_url: str
) -> None:
    """The table is in another schema, and its name must be quoted.

    The value that the table had before is the state that the singleton's first run loads.
    """
    table = '"Jobs"."we_ird Name-1"'
    execute(
        postgres_url,
        'CREATE SCHEMA "Jobs"',
        given_table(postgres_url, table),
        f"INSERT INTO {table} (key, value) VALUES ('singleton-state:increment', '{{\"n\":41}}')",
    )
    fleet = make_fleet(
        postgres_url,
        CELERY_SINGLETON_AUTO_MIGRATE="0",
        CELERY_SINGLETON_TABLE=table.replace('"', ""),
    )
    assert fleet.command("singleton", "migrate").returncode == 0
    fleet.start("-P", "solo")
    assert outcome(client().send_task("increment")) == 42
    (listed,) = json.loads(fleet.command("singleton", "ls", "--json").stdout)
    assert (listed["singleton"], listed["run_count"]) == ("increment", 1)
    execute(postgres_url, f"INSERT INTO {table} (key, value) VALUES ('of old', '1')")
    tables = execute(postgres_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert tables == []


@pytest.fixture
def restricted(make_fleet: Callable[..., Fleet], server_url: str) -> Iterator[Fleet]:
    """A fleet whose database role may use tables but not create one. No table exists yet."""
    make_roles(server_url)
    yield make_fleet(
        of(WORKER, server_url),
        CELERY_SINGLETON_AUTO_MIGRATE="0",
        CELERY_SINGLETON_TABLE=TABLE,
    )
    drop_roles(server_url)


def refused(program: Program) -> str:
    """Wait until a program that cannot start has ended, and return its output."""
    program.process.wait(timeout=30)
    assert program.process.returncode != 0
    return program.output


def test_a_role_that_may_only_use_the_table(
    restricted: Fleet, client: Callable[[], Celery], server_url: str
) -> None:
    fleet = restricted
    by_worker = fleet.command("singleton", "migrate")
    assert by_worker.returncode == 1
    assert f"Error: role {WORKER} may not create or upgrade table {TABLE}" in by_worker.stderr
    assert "Traceback" not in by_worker.stderr
    url = fleet.environment["CELERY_SINGLETON_STORE_URL"]
    fleet.environment["CELERY_SINGLETON_STORE_URL"] = of(OWNER, server_url)
    assert fleet.command("singleton", "migrate").returncode == 0
    fleet.environment["CELERY_SINGLETON_STORE_URL"] = url

    lacks = f"role {WORKER} lacks SELECT, INSERT, UPDATE, DELETE on table {TABLE}"
    grants = f"GRANT SELECT, INSERT, UPDATE, DELETE ON {TABLE} TO {WORKER};"
    for program in (
        fleet.start("-P", "solo", ready=False),
        fleet.start_beat("tests.apps.tasks"),
    ):
        output = refused(program)
        assert lacks in output
        assert grants in output

    grant(server_url)
    fleet.start("-c", "1")
    app = client()
    assert outcome(app.send_task("increment")) == 1
    assert outcome(app.send_task("sent_once", (3,))) == 3
    fleet.start_beat("tests.apps.tasks").wait_leads()
    listed = json.loads(fleet.command("singleton", "ls", "--json").stdout)
    assert {each["singleton"] for each in listed} == {"increment", 'sent_once{"number":3}'}
