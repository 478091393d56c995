"""Drills use the fleets of the other tests with processes."""

from tests.processes.conftest import broker_url, client, make_fleet, pytest_runtest_makereport

__all__ = ["broker_url", "client", "make_fleet", "pytest_runtest_makereport"]
