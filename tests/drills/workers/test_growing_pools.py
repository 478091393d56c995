"""A worker's pool grows, and still has a connection to the store for each of its bodies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from celery import Celery

from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until
from tests.helpers.worker_rows import connections


@pytest.fixture
def server(postgres_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the test to the server, which shows the workers' transactions."""
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        yield connection


def in_transactions(server: psycopg.Connection[Any]) -> int:
    found = server.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE xact_start IS NOT NULL"
        " AND application_name = 'celery-singleton-state' AND datname = current_database()"
    )
    return int((found.fetchone() or (0,))[0])


@pytest.mark.parametrize("how", ["autoscale", "pool_grow"])
def test_a_worker_that_grows_has_a_connection_for_each_body(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    postgres_url: str,
    server: psycopg.Connection[Any],
    tmp_path: Path,
    how: str,
) -> None:
    """20 bodies have a transaction open at the same time, although the pool was started with two
    greenlets.
    """
    bodies = 20
    fleet = make_fleet(postgres_url, TEST_PREFETCH="10")
    app, until = client(), tmp_path / "until"
    if how == "autoscale":
        fleet.start("-P", "gevent", f"--autoscale={bodies},2")
    else:
        fleet.start("-P", "gevent", "-c", "2")
        # The worker opens its connections with this run, before its pool grows.
        assert outcome(app.send_task("increment")) == 1
        (reply,) = app.control.pool_grow(bodies - 2, reply=True, timeout=10, limit=1)
        assert "pool will grow" in str(reply)
    results = [
        app.send_task("uses_the_store", (number, str(until), False)) for number in range(bodies)
    ]
    most = 0

    def all_have_one() -> bool:
        nonlocal most
        most = max(most, connections(server))
        return in_transactions(server) >= bodies

    wait_until(all_have_one, "each body is in its transaction")
    until.touch()
    assert [outcome(result) for result in results] == [1] * bodies
    assert max(most, connections(server)) <= bodies + 2
