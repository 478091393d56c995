"""The largest number of connections that a process opens to its store, counted by the server."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from celery import Celery

from tests.helpers.fleet import ROOT, Fleet, outcome
from tests.helpers.waiting import wait_until
from tests.helpers.worker_rows import connections

PAGE = (ROOT / "docs" / "databases.md").read_text()
BODIES = 2
#: Maps each pool to its row of the table in docs/databases.md, and to two numbers of connections
#: that the row means for BODIES bodies: if each body uses the store beside its open transaction,
#: and if none does.
BUDGETS = {
    "prefork": ("each process of a prefork pool | 3 |", 3 * BODIES + 1, 2 * BODIES + 1),
    "threads": ("threads, gevent: a worker | concurrency + 2 |", BODIES + 2, BODIES + 1),
    "gevent": ("threads, gevent: a worker | concurrency + 2 |", BODIES + 2, BODIES + 1),
    "solo": ("solo: a worker | 3 | 2", 3, 2),
}
RENEWALS = 5


@pytest.fixture
def server(server_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the database server, to count the workers' connections."""
    dsn = server_url.replace("+psycopg", "")
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize(
    ("pool", "beside"),
    [
        ("prefork", True),
        ("prefork", False),
        ("threads", True),
        ("threads", False),
        ("gevent", True),
        ("solo", True),
    ],
)
def test_a_worker_under_load_keeps_to_the_budget(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    server_url: str,
    server: psycopg.Connection[Any],
    tmp_path: Path,
    pool: str,
    beside: bool,
) -> None:
    """Each body has a transaction open while heartbeats renew its lease. With ``beside``, the body
    changes other values in the store at the same time.

    No worker needs more connections, so the worker opens as many as are documented.
    """
    row, most, usual = BUDGETS[pool]
    assert row in PAGE
    fleet = make_fleet(server_url, CELERY_SINGLETON_HEARTBEAT_INTERVAL="0.5")
    app, until = client(), tmp_path / "until"
    fleet.start("-P", pool, "-c", str(BODIES))
    bodies = 1 if pool == "solo" else BODIES
    results = [
        app.send_task("uses_the_store", (number, str(until), beside)) for number in range(bodies)
    ]
    fleet.wait_for_notes("enter", bodies)

    counts, expiries = [], set()

    def renewed() -> bool:
        counts.append(connections(server))
        rows = server.execute("SELECT key, expires_at FROM kv_store WHERE holder IS NOT NULL")
        expiries.update(rows.fetchall())
        return len(expiries) >= RENEWALS * bodies

    wait_until(renewed, "the leases are renewed many times")
    until.touch()
    assert [outcome(result) for result in results] == [1] * bodies
    counts.append(connections(server))
    assert max(counts) == (most if beside else usual)


def test_one_process_of_a_prefork_worker_renews_for_all(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    server_url: str,
    server: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    """Eight children are in long bodies. Each keeps the connection of its run's first statement,
    and sends no other statement.

    The worker's main process has one connection, and renews all eight leases by one statement.
    """
    assert "each process of a prefork pool | 3 | 1, and 2 with `self.transaction()`" in PAGE
    assert "a prefork worker's own process | 3 | 1" in PAGE
    fleet = make_fleet(
        server_url,
        CELERY_SINGLETON_HEARTBEAT_INTERVAL="1",
        CELERY_SINGLETON_HEARTBEAT_THRESHOLD="8",
    )
    app, until, children = client(), tmp_path / "until", 8
    fleet.start("-c", str(children))
    results = [app.send_task("long_body", (n, str(until))) for n in range(children)]
    fleet.wait_for_notes("enter", children)
    expiries: set[tuple[str, Any]] = set()

    def renewed() -> bool:
        rows = server.execute("SELECT key, expires_at FROM kv_store WHERE holder IS NOT NULL")
        expiries.update(rows.fetchall())
        return len(expiries) >= 3 * children

    wait_until(renewed, "all leases are renewed twice")
    assert connections(server) == children + 1
    renewals = server.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%SKIP LOCKED%'"
        " AND application_name = 'celery-singleton-state' AND datname = current_database()"
    ).fetchone()
    assert renewals == (1,)
    until.touch()
    assert [outcome(result) for result in results] == [1] * children


def test_a_prefork_workers_main_process_connects_when_a_child_dies(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    server_url: str,
    server: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    fleet = make_fleet(server_url, CELERY_SINGLETON_HEARTBEAT_INTERVAL="30")
    worker = fleet.start("-c", "1")
    wait_until(lambda: connections(server) == 0, "the connections of the worker's start are closed")
    client().send_task("finishes", (str(tmp_path / "never"),))
    (note,) = fleet.wait_for_notes("enter")
    assert connections(server) == 1
    os.kill(note["pid"], signal.SIGKILL)
    fleet.wait_for_output(worker, "is free: its holder")
    assert 1 <= connections(server) <= 3
