"""Fixtures of the drills: hosts, shops, standbys and servers that a test may stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.beat_hosts import Hosts, Schedule
from tests.helpers.fleet import Fleet
from tests.helpers.mariadb import MariaDB
from tests.helpers.servers import Postgres, Proxy, Standby
from tests.helpers.shop import Gate, Shop


@pytest.fixture
def make_hosts(
    make_fleet: Callable[..., Fleet],
    broker_url: str,
    postgres_url: str,
    make_proxy: Callable[[int], Proxy],
) -> Iterator[Callable[..., Hosts]]:
    """A function that makes hosts for the beats of a schedule."""
    made: list[Hosts] = []

    def make(schedule: Schedule, **settings: object) -> Hosts:
        fleet = make_fleet(postgres_url, TEST_SCHEDULE=json.dumps(schedule), **settings)
        made.append(Hosts(fleet, schedule, postgres_url, broker_url, make_proxy))
        return made[-1]

    yield make
    for hosts in made:
        hosts.close()


@pytest.fixture(params=["postgresql", "mariadb"])
def own_server(request: pytest.FixtureRequest) -> Postgres | MariaDB:
    """A database server that the test may stop or stall: the test runs once for each kind."""
    name = {"postgresql": "own_postgres", "mariadb": "own_mariadb"}[request.param]
    server: Postgres | MariaDB = request.getfixturevalue(name)
    return server


@pytest.fixture
def make_shop(
    make_fleet: Callable[..., Fleet], make_proxy: Callable[[int], Proxy]
) -> Iterator[Callable[..., Shop]]:
    """A function that makes a shop on a database server."""
    made: list[Shop] = []

    def make(server: Postgres | MariaDB, **settings: object) -> Shop:
        made.append(Shop(server, make_fleet, make_proxy(server.port), **settings))
        return made[-1]

    yield make
    for shop in made:
        shop.close()


@pytest.fixture
def make_gate(tmp_path: Path) -> Callable[[str], Gate]:
    """A function that makes gates, at which bodies wait until the test opens them."""
    return lambda name: Gate(tmp_path, name)


@pytest.fixture
def link(own_postgres: Postgres, make_proxy: Callable[[int], Proxy]) -> Proxy:
    """A proxy between a standby and its primary."""
    return make_proxy(own_postgres.port)


@pytest.fixture
def make_standby(link: Proxy) -> Iterator[Callable[[], Standby]]:
    """A function that makes standbys of the test's own server. A standby has the data that the
    server has at this time.
    """
    made: list[Standby] = []

    def make() -> Standby:
        made.append(Standby(link.port))
        return made[-1]

    yield make
    for standby in made:
        standby.close()
