"""Drills use the fleets of the other tests with processes, on RabbitMQ as well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes.conftest import broker_url, client, make_fleet, pytest_runtest_makereport
from tests.rabbitmq import RabbitMQ

__all__ = ["broker_url", "client", "make_fleet", "pytest_runtest_makereport"]


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    server = RabbitMQ()
    yield server
    server.close()


@pytest.fixture
def own_rabbitmq() -> Iterator[RabbitMQ]:
    """A server that the test may stop."""
    server = RabbitMQ()
    yield server
    server.close()
