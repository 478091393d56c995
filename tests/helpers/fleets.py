"""Fixtures: the fleet that a test's markers describe, and client apps.

``@pytest.mark.fleet(…)`` describes the fleet of ``fleet`` and ``make_fleet``. A test's own marker
adds to its module's marker, and overrides it.

:param store: the name of a store, or of a fixture that returns its URL. Default: an SQLite file.
:param broker: ``valkey``, or the kind of the queue on RabbitMQ. Default: ``valkey``.
:param leases: the name of a fixture that returns the URL of a Redis server for leases. Default: the
    store keeps the leases.
:param app: the app of the fleet's workers, beats and commands.

With a tuple of stores or brokers the test runs once on each of them. All other parameters are
environment variables.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import kombu.pools
import pytest
import redis
from celery import Celery

from celery_singleton_state.runtime import close_runtime
from tests.helpers.fleet import Fleet
from tests.helpers.queues import KIND, use_queues
from tests.helpers.rabbitmq import RabbitMQ
from tests.helpers.servers import Valkey
from tests.helpers.stores import url_on

_databases = itertools.count()
_fleets = pytest.StashKey[list[Fleet]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Add the output of the test's programs to the report of a failure, because the failure may not
    occur again.
    """
    report = yield
    if report.failed:
        for fleet in item.stash.get(_fleets, []):
            report.sections += fleet.outputs()
    return report


def _marked(node: pytest.Item) -> dict[str, Any]:
    """Return all settings of a test's markers."""
    found: dict[str, Any] = {}
    for marker in node.iter_markers("fleet"):
        found = marker.kwargs | found
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked = _marked(metafunc.definition)
    for name in ("store", "broker"):
        fixture, values = f"fleet_{name}", marked.get(name)
        if fixture in metafunc.fixturenames and isinstance(values, tuple):
            metafunc.parametrize(fixture, values, indirect=True)


@pytest.fixture
def fleet_store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of the store that the test's fleet uses."""
    marked = _marked(request.node).get("store", "sqlite")
    return url_on(getattr(request, "param", marked), request, tmp_path)


@pytest.fixture
def fleet_broker(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment variables that say which broker the test's fleet uses."""
    marked = _marked(request.node).get("broker", "valkey")
    kind: str = getattr(request, "param", marked)
    if kind == "valkey":
        return {}
    rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
    return {"CELERY_BROKER_URL": rabbitmq.url, "TEST_QUEUE": tmp_path.name, KIND: kind}


@pytest.fixture
def broker_url(valkey: Valkey) -> str:
    """The URL of an empty database on Valkey, for messages and results."""
    url = f"redis://127.0.0.1:{valkey.port}/{next(_databases) % 15}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def fleet_settings(
    request: pytest.FixtureRequest, fleet_broker: dict[str, str]
) -> dict[str, object]:
    """All settings in the test's markers except the store."""
    marked = _marked(request.node)
    leases = marked.pop("leases", None)
    settings = {name: marked[name] for name in marked.keys() - {"store", "broker"}} | fleet_broker
    if leases:
        settings["CELERY_SINGLETON_LEASE_URL"] = request.getfixturevalue(leases)
    return settings


@pytest.fixture
def make_fleet(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    broker_url: str,
    fleet_store: str,
    fleet_settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Fleet]]:
    """A function that makes a fleet as the test's markers describe it; its arguments are another
    store and more settings. The test's process gets the fleet's settings too, so that it can be a
    client.
    """
    made = request.node.stash[_fleets] = []

    def make(store_url: str = fleet_store, **settings: Any) -> Fleet:
        fleet = Fleet(tmp_path, broker_url, store_url, **fleet_settings | settings)
        for name, value in fleet.environment.items():
            if os.environ.get(name) != value and name.startswith(("CELERY_", "TEST_")):
                monkeypatch.setenv(name, value)
        made.append(fleet)
        return fleet

    yield make
    for fleet in made:
        fleet.close()


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Fleet:
    """The fleet that the test's markers describe, before any of its programs is started."""
    return make_fleet()


@pytest.fixture
def client(make_fleet: Callable[..., Fleet]) -> Iterator[Callable[[], Celery]]:
    """A function that makes client apps. They know no tasks, so they send by name, as a web server
    may.
    """
    made: list[Celery] = []

    def make() -> Celery:
        made.append(Celery("client", set_as_current=False))
        made[-1].conf.update(
            task_serializer=os.environ.get("TEST_SERIALIZER", "json"),
            result_serializer=os.environ.get("TEST_SERIALIZER", "json"),
            accept_content=["json", os.environ.get("TEST_SERIALIZER", "json")],
        )
        use_queues(made[-1], os.environ.get("TEST_QUEUE", "celery"))
        if os.environ.get("CELERY_BROKER_URL", "").startswith("amqp"):
            # Wait for each confirmation, because a RabbitMQ that is killed may lose an unconfirmed
            # message.
            made[-1].conf.broker_transport_options = {"confirm_publish": True}
        # Poll for results instead of listening: a listening socket would outlive the test.
        made[-1].backend.on_task_call = lambda *_: None
        made[-1].backend.remove_pending_result = lambda *_: None
        return made[-1]

    yield make
    for app in made:
        close_runtime(app)
        app.close()
        app.backend.client.connection_pool.disconnect()
    kombu.pools.reset()
