"""Fixtures for all tests: servers, databases, stores and apps."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import celery._state
import celery.app.builtins  # registers Celery's built-in shared tasks before the first test
import pytest
import redis
from celery import Celery
from hypothesis.configuration import set_hypothesis_home_dir

from celery_singleton_state.lease import holder_files
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.mariadb import MariaDB
from tests.helpers.pgbouncer import PgBouncer
from tests.helpers.rabbitmq import RabbitMQ
from tests.helpers.servers import Postgres, Proxy, Valkey, running
from tests.helpers.stores import STORES, apps_on, url_on

pytest_plugins = ["tests.helpers.fleets"]

# Keep hypothesis's own files out of the checkout.
_hypothesis_home = tempfile.mkdtemp(prefix="test-hypothesis-")
atexit.register(shutil.rmtree, _hypothesis_home)
set_hypothesis_home_dir(_hypothesis_home)


_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def _only_the_tasks_of_the_test() -> Iterator[None]:
    """Remove the shared tasks that a test made: Celery adds them to every app that is
    made later.
    """
    shared = celery._state._on_app_finalizers
    before = set(shared)
    yield
    shared &= before


@pytest.fixture(autouse=True)
def _only_the_settings_of_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide Celery's environment variables from the test, and keep its files out of the checkout."""
    for name in list(os.environ):
        if name.startswith("CELERY_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(holder_files, "root", lambda: tmp_path / "holder_files")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    yield from running(Postgres)


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server of this test's own, which it may stop."""
    yield from running(Postgres)


@pytest.fixture(scope="session")
def pgbouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    yield from running(lambda: PgBouncer(postgres.port))


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    yield from running(RabbitMQ)


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    yield from running(MariaDB)


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    yield from running(Valkey)


@pytest.fixture
def lease_url(valkey: Valkey) -> str:
    """The URL of an empty Redis database for leases."""
    url = f"redis://127.0.0.1:{valkey.port}/15"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A server of this test's own, which it may stop, and which keeps its data then."""
    yield from running(lambda: Valkey(durable=True))


@pytest.fixture
def server_url(postgres: Postgres) -> Iterator[str]:
    """The URL of a new, empty database without a pooler, so that its connections, roles and log can
    be seen.
    """
    name = f"test_{os.getpid()}_{next(_numbers)}"
    yield postgres.create_database(name)
    postgres.drop_database(name)


def _encoded(postgres: Postgres, encoding: str) -> Iterator[str]:
    name = f"test_{os.getpid()}_{next(_numbers)}"
    yield postgres.create_database(name, encoding)
    postgres.drop_database(name)


@pytest.fixture
def latin1_url(postgres: Postgres) -> Iterator[str]:
    """The URL of a new, empty database in LATIN1, which has only the letters of western Europe."""
    yield from _encoded(postgres, "LATIN1")


@pytest.fixture
def sql_ascii_url(postgres: Postgres) -> Iterator[str]:
    """The URL of a new, empty database in SQL_ASCII, which accepts any bytes without a check."""
    yield from _encoded(postgres, "SQL_ASCII")


@pytest.fixture
def postgres_url(server_url: str, request: pytest.FixtureRequest) -> str:
    """The URL of a new, empty database; behind PgBouncer if ``SINGLETON_TEST_POOLED`` is set."""
    if not os.environ.get("SINGLETON_TEST_POOLED"):
        return server_url
    pgbouncer: PgBouncer = request.getfixturevalue("pgbouncer")
    return pgbouncer.url(server_url.rpartition("/")[2])


@pytest.fixture(scope="session")
def _pooled_database(postgres: Postgres, pgbouncer: PgBouncer) -> str:
    name = f"pooled_{os.getpid()}"
    postgres.create_database(name)
    migrate_url(pgbouncer.url(name), "kv_store")
    return name


@pytest.fixture
def pgbouncer_url(postgres: Postgres, pgbouncer: PgBouncer, _pooled_database: str) -> str:
    """The URL of a database behind PgBouncer, with its table and no rows.

    All tests share the database, so that a test gets the pooler's connections from earlier tests.
    """
    postgres.empty_database(_pooled_database, but_for="kv_store")
    return pgbouncer.url(_pooled_database)


@pytest.fixture
def own_mariadb() -> Iterator[MariaDB]:
    """A server of this test's own, which it may stop."""
    yield from running(MariaDB)


@pytest.fixture
def mariadb_url(mariadb: MariaDB) -> Iterator[str]:
    """The URL of a new, empty database on MariaDB."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    yield mariadb.create_database(name)
    mariadb.drop_database(name)


@pytest.fixture
def own_rabbitmq() -> Iterator[RabbitMQ]:
    """A server of this test's own, which it may stop."""
    yield from running(RabbitMQ)


@pytest.fixture
def make_proxy() -> Iterator[Callable[[int], Proxy]]:
    """A function that makes a proxy in front of a port."""
    made: list[Proxy] = []

    def make(port: int) -> Proxy:
        made.append(Proxy(port))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database: the test runs once for each kind of store."""
    return url_on(request.param, request, tmp_path)


@pytest.fixture(params=STORES[1:])
def shared_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database: the test runs once for each store that processes can share."""
    return url_on(request.param, request, tmp_path)


@pytest.fixture
def store(store_url: str) -> Iterator[SqlStore]:
    """An open store with its table."""
    opened = open_store(store_url, "kv_store", io_timeout=2.0, pool_size=8, auto_migrate=True)
    yield opened
    opened.close()


@pytest.fixture
def make_app(store_url: str) -> Iterator[Callable[..., Celery]]:
    """A function that makes apps on the test's store."""
    yield from apps_on(store_url)


@pytest.fixture
def app(make_app: Callable[..., Celery]) -> Celery:
    return make_app()


@pytest.fixture
def memory_app() -> Iterator[Celery]:
    """An app with a store in memory, for tests that do not depend on the kind of store."""
    for make in apps_on("memory://"):
        yield make()
