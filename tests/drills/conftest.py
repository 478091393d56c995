"""Drills use the fleets of the other tests with processes, on RabbitMQ as well."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import running
from tests.drills.beat_hosts import Hosts, Schedule
from tests.processes.conftest import broker_url, client, make_fleet, pytest_runtest_makereport
from tests.processes.fleet import Fleet
from tests.rabbitmq import RabbitMQ
from tests.servers import Proxy

__all__ = ["broker_url", "client", "make_fleet", "pytest_runtest_makereport"]


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    yield from running(RabbitMQ)


@pytest.fixture
def own_rabbitmq() -> Iterator[RabbitMQ]:
    """A server that the test may stop."""
    yield from running(RabbitMQ)


@pytest.fixture
def make_hosts(
    make_fleet: Callable[..., Fleet],
    broker_url: str,
    postgres_url: str,
    make_proxy: Callable[[int], Proxy],
) -> Iterator[Callable[..., Hosts]]:
    """Makes hosts for beats, on a schedule."""
    made: list[Hosts] = []

    def make(schedule: Schedule, **settings: object) -> Hosts:
        fleet = make_fleet(postgres_url, TEST_SCHEDULE=json.dumps(schedule), **settings)
        made.append(Hosts(fleet, schedule, postgres_url, broker_url, make_proxy))
        return made[-1]

    yield make
    for hosts in made:
        hosts.close()
