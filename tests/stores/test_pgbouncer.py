"""What is different behind a pooler that gives each transaction any of its connections.

That the stores' other tests pass behind it, too, the fixtures see to.
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
    """A database of which the pooler has no connections yet, with its table."""
    migrate_url(postgres_url, "kv_store")
    return postgres_url.replace(f":{postgres.port}/", f":{pgbouncer.port}/")


@contextmanager
def opened(url: str) -> Iterator[SqlStore]:
    store = open_store(url, "kv_store", 5.0)
    yield store
    store.close()


def prepares(store: SqlStore) -> bool:
    """Whether it lets its driver prepare statements."""
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
    with pytest.raises(ImproperlyConfigured, match="prepare_threshold takes none, or how often"):
        open_store("postgresql://host/db?prepare_threshold=often", "kv_store", 5.0)


def test_all_that_is_done_with_a_store(url: str) -> None:
    with opened(url) as store:
        use_all(store)
    with KeyValueStore(url) as kv:
        use_all_values(kv)


@pytest.mark.parametrize("said", ["", "?prepare_threshold=none"])
def test_many_clients_share_few_connections(url: str, said: str) -> None:
    """Each takes, renews, saves and releases its own lease, in turns with all the others."""

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


# -- told to prepare statements all the same


@pytest.fixture
def misled(url: str) -> str:
    """A URL that wants prepared statements, where another client of the pooler's has taken their
    names on each of its connections.
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
            # The next client gets another of the pooler's connections.
            connect(None).execute("SELECT 1")
    return f"{url}?prepare_threshold=0"


def test_a_store_says_what_to_set(misled: str) -> None:
    verbs: tuple[Callable[[SqlStore], object], ...] = (
        lambda store: store.check(),
        lambda store: store.acquire("k", "h", 60, None),
        lambda store: store.list("k"),
    )
    for verb in verbs:
        with opened(misled) as store, pytest.raises(StoreMisconfigured, match=ADVICE):
            verb(store)


def test_a_store_that_makes_its_table_says_the_same(misled: str) -> None:
    with pytest.raises(StoreMisconfigured, match=ADVICE):
        open_store(misled, "kv_store", 5.0, auto_migrate=True)


def test_a_key_value_store_says_the_same(misled: str) -> None:
    advice = ADVICE.replace("singleton_store_url", "the URL")
    with KeyValueStore(misled) as kv, pytest.raises(KeyValueStoreError, match=advice):
        kv.set("k", 1)


@pytest.mark.usefixtures("misled")
def test_a_transaction_says_the_same(url: str) -> None:
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


def test_a_run_fails_at_once(misled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What will not pass by itself is not tried again in place."""
    asked = []
    acquire = SqlStore.acquire

    def count(self: SqlStore, *arguments: Any) -> Any:
        asked.append(arguments)
        return acquire(self, *arguments)

    monkeypatch.setattr(SqlStore, "acquire", count)
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.singleton_store_url = misled

    @singleton_task(app, name="count", shared=False)
    def task(self: Any) -> None: ...

    with pytest.raises(StateLoadFailed, match=ADVICE):
        task()
    assert len(asked) == 1
    close_runtime(app)


def test_migrating_prepares_nothing(misled: str) -> None:
    migrate_url(misled, "kv_store")
    migrate_url(misled, "another")
