"""Behind a pooler that gives each transaction any of its connections."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.migrate import migrate_url
from celery_singleton_state.store import SqlStore, open_store
from celery_singleton_state.store.base import Ended, NewValue
from tests.pgbouncer import SERVER_CONNECTIONS, PgBouncer
from tests.storm.fleet import port_of

CLIENTS = 8
DONE = Ended("succeeded", "[]")


@pytest.fixture
def url(pgbouncer: PgBouncer, postgres_url: str) -> str:
    """A database whose table is made through the pooler."""
    pooled = postgres_url.replace(f":{port_of(postgres_url)}/", f":{pgbouncer.port}/")
    migrate_url(pooled, "kv_store")
    return pooled


@contextmanager
def opened(url: str) -> Iterator[SqlStore]:
    store = open_store(url, "kv_store", 5.0)
    yield store
    store.close()


def prepares(store: SqlStore) -> bool:
    """Whether it has its driver prepare statements."""
    with store.engine.connect() as connection:
        driver: Any = connection.connection.dbapi_connection
        return driver.prepare_threshold is not None


def test_statements_are_prepared_unless_a_pooler_is_in_between(postgres_url: str, url: str) -> None:
    with opened(postgres_url) as direct, opened(url) as pooled:
        assert prepares(direct)
        assert not prepares(pooled)


def test_what_the_url_says_is_done(postgres_url: str, url: str) -> None:
    for each in (postgres_url, url):
        for said, prepared in {"none": False, "7": True}.items():
            with opened(f"{each}?prepare_threshold={said}") as store:
                assert prepares(store) == prepared


def test_what_the_url_cannot_say_is_refused() -> None:
    with pytest.raises(ImproperlyConfigured, match="prepare_threshold=often is not allowed"):
        open_store("postgresql://host/db?prepare_threshold=often", "kv_store", 5.0)


def test_many_clients_share_few_connections(url: str) -> None:
    """Each takes, renews, saves and releases its own lease, in turns with all the others."""

    def count_up(number: int) -> list[int]:
        key, fences = f"k{number}", []
        with opened(url) as store:
            for n in range(25):
                acquired = store.acquire(key, f"h{n}", 60, None)
                assert acquired is not None
                assert store.renew([acquired.lease]) == {key: None}
                with store.transaction() as transaction:
                    assert transaction.save(acquired.lease, NewValue(str(n), 1))
                assert store.release(acquired.lease, DONE)
                fences.append(acquired.lease.fence)
        return fences

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert list(pool.map(count_up, range(CLIENTS))) == [list(range(1, 26))] * CLIENTS
    with opened(url) as store, store.transaction() as transaction:
        assert {row.run_count for row in store.list("k")} == {25}
        used = transaction.connection.exec_driver_sql(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        ).scalar_one()
    assert used <= SERVER_CONNECTIONS < CLIENTS
