"""Stores behind PgBouncer in transaction mode, where each transaction may get another connection.

The other tests of stores run behind PgBouncer, too: see the fixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state import (
    KeyValueStore,
    KeyValueStoreError,
    StateLoadFailed,
    singleton_task,
)
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.runtime import close_runtime
from celery_singleton_state.store.base import Ended, NewValue, StoreMisconfigured
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.all_verbs import use_all, use_all_values
from tests.helpers.pgbouncer import SERVER_CONNECTIONS, PgBouncer
from tests.helpers.servers import Postgres
from tests.helpers.writes import write

CLIENTS = 8
ADVICE = "prepared statements.* set prepare_threshold=none in singleton_store_url"
DONE = Ended("succeeded", "[]")


@pytest.fixture
def url(postgres: Postgres, pgbouncer: PgBouncer, postgres_url: str) -> str:
    """Return the pooler's URL of a migrated database to which the pooler has no connections yet."""
    migrate_url(postgres_url, "kv_store")
    return postgres_url.replace(f":{postgres.port}/", f":{pgbouncer.port}/")


@contextmanager
def opened(url: str) -> Iterator[SqlStore]:
    store = open_store(url, "kv_store", 5.0)
    yield store
    store.close()


def prepares(store: SqlStore) -> bool:
    """Return whether the store lets its driver prepare statements."""
    with store.engine.connect() as connection:
        driver: Any = connection.connection.dbapi_connection
        return driver.prepare_threshold is not None


def test_statements_are_prepared_unless_there_is_a_pooler(postgres_url: str, url: str) -> None:
    with opened(postgres_url) as direct, opened(url) as pooled:
        assert prepares(direct)
        assert not prepares(pooled)


def test_the_url_decides_about_prepared_statements(postgres_url: str, url: str) -> None:
    for each in (postgres_url, url):
        for said, prepared in {"none": False, "7": True}.items():
            with opened(f"{each}?prepare_threshold={said}") as store:
                assert prepares(store) == prepared


def test_a_wrong_prepare_threshold_is_refused() -> None:
    with pytest.raises(ImproperlyConfigured, match="prepare_threshold takes none, or how often"):
        open_store("postgresql://host/db?prepare_threshold=often", "kv_store", 5.0)


def test_all_verbs_of_a_store_work(url: str) -> None:
    with opened(url) as store:
        use_all(store)
    with KeyValueStore(url) as kv:
        use_all_values(kv)


@pytest.mark.parametrize("said", ["", "?prepare_threshold=none"])
def test_many_clients_share_few_connections(url: str, said: str) -> None:
    """Many clients at once acquire, renew, save and release, each its own lease."""

    def count_up(number: int) -> list[int]:
        key, fences = f"k{number}", []
        with opened(url + said) as store:
            for n in range(25):
                acquired = store.acquire(key, f"h{n}", 60, None)
                assert acquired is not None
                assert store.renew([acquired.lease]) == {key: None}
                with store.transaction() as transaction:
                    assert transaction.save(acquired.lease, write(NewValue(str(n), 1)))
                assert store.release(acquired.lease, DONE)
                fences.append(acquired.lease.fence)
        return fences

    with ThreadPoolExecutor(CLIENTS) as pool:
        for fences in pool.map(count_up, range(CLIENTS)):
            assert len(fences) == 25
            assert fences == sorted(set(fences))
    with opened(url) as store, store.transaction() as transaction:
        assert {row.run_count for row in store.list("k")} == {25}
        used = transaction.connection.exec_driver_sql(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        ).scalar_one()
    assert used <= SERVER_CONNECTIONS < CLIENTS


# -- the URL asks for prepared statements although there is a pooler


@pytest.fixture
def url_with_prepared_statements(url: str) -> str:
    """Return a URL that asks for prepared statements, although they cannot work.

    Another client has already used the names of the prepared statements on each of the pooler's
    connections.
    """
    with ExitStack() as stack:

        def connect(threshold: int | None) -> psycopg.Connection[Any]:
            dsn = url.replace("+psycopg", "")
            connection = psycopg.connect(dsn, prepare_threshold=threshold)
            return stack.enter_context(connection)

        for _ in range(SERVER_CONNECTIONS):
            client = connect(0)
            client.autocommit = True
            for number in range(10):
                client.execute(f"SELECT {number}")
            # Let the next client get another of the pooler's connections.
            connect(None).execute("SELECT 1")
    return f"{url}?prepare_threshold=0"


def test_a_stores_error_names_the_setting(url_with_prepared_statements: str) -> None:
    verbs: tuple[Callable[[SqlStore], object], ...] = (
        lambda store: store.check(),
        lambda store: store.acquire("k", "h", 60, None),
        lambda store: store.list("k"),
    )
    for verb in verbs:
        with (
            opened(url_with_prepared_statements) as store,
            pytest.raises(StoreMisconfigured, match=ADVICE),
        ):
            verb(store)


def test_the_error_of_a_migrating_store_names_the_setting(
    url_with_prepared_statements: str,
) -> None:
    with pytest.raises(StoreMisconfigured, match=ADVICE):
        open_store(url_with_prepared_statements, "kv_store", 5.0, auto_migrate=True)


def test_a_key_value_stores_error_names_the_setting(url_with_prepared_statements: str) -> None:
    advice = ADVICE.replace("singleton_store_url", "the URL")
    with (
        KeyValueStore(url_with_prepared_statements) as kv,
        pytest.raises(KeyValueStoreError, match=advice),
    ):
        kv.set("k", 1)


@pytest.mark.usefixtures("url_with_prepared_statements")
def test_a_transactions_error_names_the_setting(url: str) -> None:
    with opened(url) as store:
        acquired = store.acquire("k", "h", 60, None)
        assert acquired is not None

        def save() -> None:
            with store.transaction() as transaction:
                driver: Any = transaction.connection.connection.dbapi_connection
                driver.prepare_threshold = 0
                transaction.save(acquired.lease, write(NewValue("1", 1)))

        with pytest.raises(StoreMisconfigured, match=ADVICE):
            save()


def test_a_run_fails_at_once(
    url_with_prepared_statements: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting does not correct a wrong setting, so acquire is not retried at once."""
    asked = []
    acquire = SqlStore.acquire

    def count(self: SqlStore, *arguments: Any) -> Any:
        asked.append(arguments)
        return acquire(self, *arguments)

    monkeypatch.setattr(SqlStore, "acquire", count)
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.singleton_store_url = url_with_prepared_statements

    @singleton_task(app, name="count", shared=False)
    def task(self: Any) -> None: ...

    with pytest.raises(StateLoadFailed, match=ADVICE):
        task()
    assert len(asked) == 1
    close_runtime(app)


def test_a_migration_prepares_no_statements(url_with_prepared_statements: str) -> None:
    migrate_url(url_with_prepared_statements, "kv_store")
    migrate_url(url_with_prepared_statements, "another")
