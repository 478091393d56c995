"""Fixtures: the fleet of a test, as its markers describe it, and a client of it.

``@pytest.mark.fleet(…)`` says what ``fleet`` is and what ``make_fleet`` makes. What a test's own
marker says is added to what its module's says, and counts first.

:param store: a store's name, or a fixture's that gives its URL; an SQLite file without it.
:param broker: ``valkey``, or the kind of its queue on RabbitMQ.
:param leases: the name of a fixture that gives the URL of a server of leases.
:param app: the app of its workers, beats and commands.

A tuple of stores or brokers has the test run once on each of them. All other settings are
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
    """A failure shows what its workers said: it may not come again for whoever looks into it."""
    report = yield
    if report.failed:
        for fleet in item.stash.get(_fleets, []):
            report.sections += fleet.outputs()
    return report


def _marked(node: pytest.Item) -> dict[str, Any]:
    """What the markers of a test say together."""
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
    """The URL of the store of the test's fleet."""
    marked = _marked(request.node).get("store", "sqlite")
    return url_on(getattr(request, "param", marked), request, tmp_path)


@pytest.fixture
def fleet_broker(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The settings of the test's fleet that say which broker it has."""
    marked = _marked(request.node).get("broker", "valkey")
    kind: str = getattr(request, "param", marked)
    if kind == "valkey":
        return {}
    rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
    return {"CELERY_BROKER_URL": rabbitmq.url, "TEST_QUEUE": tmp_path.name, KIND: kind}


@pytest.fixture
def broker_url(valkey: Valkey) -> str:
    """An empty database of Valkey, for messages and for results."""
    url = f"redis://127.0.0.1:{valkey.port}/{next(_databases) % 15}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def fleet_settings(
    request: pytest.FixtureRequest, fleet_broker: dict[str, str]
) -> dict[str, object]:
    """All settings that the test's markers say, but for the store."""
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
    """Makes a fleet as the test's markers say, or on another store and with more settings; and
    lets this process talk to it as a client.
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
    """The fleet of the test; no program of it runs yet."""
    return make_fleet()


@pytest.fixture
def client(make_fleet: Callable[..., Fleet]) -> Iterator[Callable[[], Celery]]:
    """An app without tasks, with the fleet's settings: what sends by name, as a web server may."""
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
            # What RabbitMQ did not confirm it loses when it is killed.
            made[-1].conf.broker_transport_options = {"confirm_publish": True}
        # Results are asked for; listening for them holds a socket that outlives the test.
        made[-1].backend.on_task_call = lambda *_: None
        made[-1].backend.remove_pending_result = lambda *_: None
        return made[-1]

    yield make
    for app in made:
        close_runtime(app)
        app.close()
        app.backend.client.connection_pool.disconnect()
    kombu.pools.reset()
