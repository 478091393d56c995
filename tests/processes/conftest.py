"""Fleets of real workers, and the test's own connection to their app."""

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

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.runtime import close_runtime
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.fleet import Fleet
from tests.helpers.queues import use_queues
from tests.helpers.servers import Valkey

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


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """What is asked of a store is held by the tests of each; here one will do."""
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def store(fleet: Fleet, store_url: str) -> Iterator[SqlStore]:
    """The fleet's, opened by the test."""
    opened = open_store(store_url, "kv_store", 5.0, auto_migrate=True)
    yield opened
    opened.close()


@pytest.fixture
def broker_url(valkey: Valkey) -> str:
    """An empty database of the broker."""
    url = f"redis://127.0.0.1:{valkey.port}/{next(_databases) % 15}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def make_fleet(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    broker_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Fleet]]:
    """Makes a fleet on a store, and lets this process talk to it as a client."""
    made = request.node.stash[_fleets] = []

    def make(store_url: str, **settings: Any) -> Fleet:
        fleet = Fleet(tmp_path, broker_url, store_url, **settings)
        for name, value in fleet.environment.items():
            if os.environ.get(name) != value and name.startswith(("CELERY_", "TEST_")):
                monkeypatch.setenv(name, value)
        made.append(fleet)
        return fleet

    yield make
    for fleet in made:
        fleet.close()


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
