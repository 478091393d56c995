"""Statements that workers give up end on the server, too, and leave connections for others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
from celery import Celery

from celery_singleton_state.migrations.upgrade import migrate_url
from tests.helpers.fleet import Fleet, Worker, outcome
from tests.helpers.pgbouncer import PgBouncer
from tests.helpers.servers import Postgres
from tests.helpers.waiting import wait_until

PROCESSES = 8
#: As docs/databases.md has it: of each process, and of the worker's own.
MOST = 3 * (PROCESSES + 1)
#: Times that deliveries are put off while the store hangs: each time after several statements.
GIVEN_UP = 3 * PROCESSES


@pytest.fixture(params=["direct", "pgbouncer"])
def url(request: pytest.FixtureRequest, postgres: Postgres, server_url: str) -> str:
    """A database with its table, as workers reach it."""
    migrate_url(server_url, "kv_store")
    if request.param == "direct":
        return server_url
    pgbouncer: PgBouncer = request.getfixturevalue("pgbouncer")
    return pgbouncer.url(server_url.rpartition("/")[2])


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Another session has the table for itself."""
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute("LOCK TABLE kv_store IN ACCESS EXCLUSIVE MODE")
        yield


@contextmanager
def standby_gone(server: Postgres) -> Iterator[None]:
    """Commits wait for a standby that does not come."""
    server.configure("synchronous_standby_names", "gone")
    try:
        yield
    finally:
        server.configure("synchronous_standby_names", "")


def most_connections(server: Postgres, url: str, worker: Worker) -> int:
    """The most server processes of a database that are seen while a worker gives up again and
    again; whoever looks is another application that connects.
    """
    name = url.rpartition("/")[2]
    seen = 0

    def given_up() -> bool:
        nonlocal seen
        backends = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'"
        (now,) = server.column("postgres", backends)
        seen = max(seen, now)
        return worker.output.count("StateLoadFailed") >= GIVEN_UP

    wait_until(given_up, f"{GIVEN_UP} deliveries are put off", deadline=60)
    return seen


def test_a_locked_table_does_not_take_all_connections_from_others(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    postgres: Postgres,
    server_url: str,
    url: str,
) -> None:
    """Eight processes ask for leases in a table that another session has locked: each gives its
    statement up after two seconds, and asks again over a new connection. Without an end to those
    the server had 55 processes after 11 seconds, and 47 behind PgBouncer after 24.
    """
    fleet, app = make_fleet(url), client()
    worker = fleet.start("-c", str(PROCESSES))
    with locked(server_url):
        results = [app.send_task("keyed", (number,)) for number in range(2 * PROCESSES)]
        most = most_connections(postgres, url, worker)
    assert [outcome(result) for result in results] == list(range(1, len(results) + 1))
    # The session that has the table is one more.
    assert most <= MOST + 1


def test_a_standby_that_is_gone_does_not_take_all_connections_from_others(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], own_postgres: Postgres
) -> None:
    """Eight processes ask for leases, whose commits wait for a synchronous standby: the server
    commits what is given up, and tells nobody; it had 56 processes for that after 11 seconds.
    """
    url = own_postgres.create_database("shop")
    fleet, app = make_fleet(url), client()
    worker = fleet.start("-c", str(PROCESSES))
    with standby_gone(own_postgres):
        results = [app.send_task("keyed", (number,)) for number in range(2 * PROCESSES)]
        most = most_connections(own_postgres, url, worker)
    assert [outcome(result) for result in results] == list(range(1, len(results) + 1))
    assert most <= MOST
