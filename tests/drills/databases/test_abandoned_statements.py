"""Statements that workers gave up also end on the server, and leave connections for others."""

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
#: The largest number of connections that docs/databases.md allows: three for each process of the
#: pool, and three for the parent process.
MOST = 3 * (PROCESSES + 1)
#: For how many failed deliveries the test waits while the store hangs. Each delivery fails after
#: several statements.
GIVEN_UP = 3 * PROCESSES


@pytest.fixture(params=["direct", "pgbouncer"])
def url(request: pytest.FixtureRequest, postgres: Postgres, server_url: str) -> str:
    """The URL at which workers reach a migrated database: directly, and through PgBouncer."""
    migrate_url(server_url, "kv_store")
    if request.param == "direct":
        return server_url
    pgbouncer: PgBouncer = request.getfixturevalue("pgbouncer")
    return pgbouncer.url(server_url.rpartition("/")[2])


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Lock the whole table from another session."""
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute("LOCK TABLE kv_store IN ACCESS EXCLUSIVE MODE")
        yield


@contextmanager
def standby_gone(server: Postgres) -> Iterator[None]:
    """Make commits wait for a synchronous standby that does not exist."""
    server.configure("synchronous_standby_names", "gone")
    try:
        yield
    finally:
        server.configure("synchronous_standby_names", "")


def most_connections(server: Postgres, url: str, worker: Worker) -> int:
    """Return how many server processes a database had at most while a worker gave up statement
    after statement.

    Each count uses a new connection, as another application would. So this function fails if the
    worker leaves no connection for others.
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
    """Eight processes ask for leases in a table that another session has locked. Each process gives
    its statement up after two seconds, and asks again over a new connection.

    Before abandoned statements were ended, the server had 55 processes after 11 seconds, and 47
    behind PgBouncer after 24 seconds.
    """
    fleet, app = make_fleet(url), client()
    worker = fleet.start("-c", str(PROCESSES))
    with locked(server_url):
        results = [app.send_task("keyed", (number,)) for number in range(2 * PROCESSES)]
        most = most_connections(postgres, url, worker)
    assert [outcome(result) for result in results] == list(range(1, len(results) + 1))
    # The session that has locked the table uses one more connection.
    assert most <= MOST + 1


def test_a_standby_that_is_gone_does_not_take_all_connections_from_others(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], own_postgres: Postgres
) -> None:
    """Eight processes ask for leases, and the commits wait for a synchronous standby that is gone.
    Each process gives up, but its commit goes on waiting on the server, unless something ends it.
    Before such commits were ended, the server had 56 processes after 11 seconds.
    """
    url = own_postgres.create_database("shop")
    fleet, app = make_fleet(url), client()
    worker = fleet.start("-c", str(PROCESSES))
    with standby_gone(own_postgres):
        results = [app.send_task("keyed", (number,)) for number in range(2 * PROCESSES)]
        most = most_connections(own_postgres, url, worker)
    assert [outcome(result) for result in results] == list(range(1, len(results) + 1))
    assert most <= MOST
