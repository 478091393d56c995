"""Tests of making the table, and of upgrading an older table."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from celery_singleton_state import KeyValueStore
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.migrations.upgrade import migrate_url
from tests.helpers.all_verbs import use_all, use_all_values
from tests.helpers.tables import (
    ALL_COLUMNS,
    columns_and_indexes,
    execute,
    given_table,
    key_of,
)
from tests.helpers.waiting import wait_until


def test_the_table_is_made(shared_store_url: str) -> None:
    migrate_url(shared_store_url, "kv_store")
    columns, indexes = columns_and_indexes(shared_store_url)
    assert columns == ALL_COLUMNS
    assert indexes == [("idx_kv_store_updated_at", ["updated_at"])]


def test_a_second_upgrade_changes_nothing(shared_store_url: str) -> None:
    with KeyValueStore(shared_store_url) as kv:
        migrate_url(shared_store_url, "kv_store")
        kv.set("k", 1)
        migrate_url(shared_store_url, "kv_store")
        assert kv.get("k") == 1


@pytest.mark.parametrize("with_index", [True, False])
def test_a_table_of_three_columns_is_upgraded_with_its_rows(
    shared_store_url: str, with_index: bool
) -> None:
    key = key_of(shared_store_url)
    execute(shared_store_url, given_table(shared_store_url))
    if with_index:
        execute(shared_store_url, "CREATE INDEX idx_kv_store_updated_at ON kv_store (updated_at)")
    execute(
        shared_store_url,
        f"INSERT INTO kv_store ({key}, value) VALUES ('k', '{{\"n\":1}}')",
        f"INSERT INTO kv_store ({key}, value) VALUES ('singleton-state:s', '{{\"n\":4}}')",
    )
    rows = f"SELECT {key}, value, updated_at FROM kv_store ORDER BY {key}"
    before = execute(shared_store_url, rows)
    migrate_url(shared_store_url, "kv_store")
    after = execute(shared_store_url, rows)
    assert after == before
    columns, indexes = columns_and_indexes(shared_store_url)
    assert columns == ALL_COLUMNS
    assert [names for _, names in indexes] == [["updated_at"]]
    # A writer that knows only the first three columns can still write.
    execute(shared_store_url, f"INSERT INTO kv_store ({key}, value) VALUES ('later', '1')")


def test_a_value_that_was_there_before_is_the_first_state(shared_store_url: str) -> None:
    execute(
        shared_store_url,
        given_table(shared_store_url),
        f"INSERT INTO kv_store ({key_of(shared_store_url)}, value)"
        " VALUES ('singleton-state:s', '{\"n\":4}')",
    )
    migrate_url(shared_store_url, "kv_store")
    store = open_store(shared_store_url, "kv_store", 2)
    acquired = store.acquire("singleton-state:s", "h", 60, None)
    store.close()
    assert acquired is not None
    assert (acquired.value, acquired.write) == ('{"n":4}', 0)


def test_keys_are_compared_by_their_bytes(mariadb_url: str) -> None:
    """The old table ignores case when it compares keys, which is MariaDB's default."""
    execute(mariadb_url, given_table(mariadb_url))
    migrate_url(mariadb_url, "kv_store")
    store = open_store(mariadb_url, "kv_store", 2)
    assert store.acquire("singleton-state:a", "h", 60, None) is not None
    assert store.acquire("singleton-state:A", "h", 60, None) is not None
    assert store.acquire("singleton-state:Ä", "h", 60, None) is not None
    assert len(store.list("singleton-state:")) == 3
    store.close()


def test_the_table_may_have_another_name(shared_store_url: str) -> None:
    migrate_url(shared_store_url, "we_ird-Name")
    migrate_url(shared_store_url, "kv_store")
    assert columns_and_indexes(shared_store_url, "we_ird-Name")[0] == ALL_COLUMNS
    with (
        KeyValueStore(shared_store_url, "we_ird-Name") as one,
        KeyValueStore(shared_store_url) as other,
    ):
        one.set("k", 1)
        assert other.is_empty()
        use_all_values(one)
    store = open_store(shared_store_url, "we_ird-Name", 2)
    use_all(store)
    store.close()


def test_the_table_may_be_in_another_schema(postgres_url: str) -> None:
    execute(postgres_url, "CREATE SCHEMA jobs")
    for _ in range(2):
        migrate_url(postgres_url, "jobs.kv_store")
    store = open_store(postgres_url, "jobs.kv_store", 2)
    use_all(store)
    store.close()
    with KeyValueStore(postgres_url, "jobs.kv_store") as kv:
        use_all_values(kv)
    tables = execute(
        postgres_url,
        "SELECT table_schema, table_name FROM information_schema.tables"
        " WHERE table_name LIKE 'kv_store%%' ORDER BY 2",
    )
    assert tables == [("jobs", "kv_store"), ("jobs", "kv_store_version")]


def fill_factor(url: str, name: str = "kv_store") -> list[str] | None:
    options: list[str] | None
    ((options,),) = execute(url, f"SELECT reloptions FROM pg_class WHERE relname = '{name}'")
    return options


@pytest.mark.parametrize("before", ["nothing", "a full table"])
def test_most_renewals_are_heap_only_updates(postgres_url: str, before: str) -> None:
    """A renewal finds space for the row's new version in the same page, however long the row is. So
    PostgreSQL changes no index, and can reuse the space of the old version without a vacuum.
    """
    if before == "a full table":
        fill = (
            "INSERT INTO kv_store (key, value)"
            " SELECT 'k' || n, repeat(md5(n::text), 10) FROM generate_series(0, 49) AS n"
        )
        execute(postgres_url, given_table(postgres_url), fill)
    migrate_url(postgres_url, "kv_store")
    assert fill_factor(postgres_url) == ["fillfactor=80"]
    store = open_store(postgres_url, "kv_store", 5)
    acquired = [store.acquire(f"k{n}", "h", 60, str(n) * (1800 // len(str(n)))) for n in range(50)]
    store.close()
    statistics = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname='kv_store'"

    def updates_once(number: int) -> Callable[[], tuple[int, int] | None]:
        def updates() -> tuple[int, int] | None:
            ((of_all, of_none),) = execute(postgres_url, statistics)
            return (of_all, of_none) if of_all >= number else None

        return updates

    first = 50 if before == "a full table" else 0
    _, before_renewals = wait_until(updates_once(first), "the acquisitions are counted")
    store = open_store(postgres_url, "kv_store", 5)
    leases = [found.lease for found in acquired if found is not None]
    for _ in range(4):
        for part in range(5):
            assert len(store.renew(leases[part::5])) == 10
    # The server's process reports its counts only when its connection is closed, so close it first.
    store.close()
    _, after_renewals = wait_until(updates_once(first + 200), "the renewals are counted")
    assert after_renewals - before_renewals > 170


def test_the_owners_fill_factor_is_kept(postgres_url: str) -> None:
    execute(
        postgres_url,
        given_table(postgres_url),
        "ALTER TABLE kv_store SET (fillfactor = 55, autovacuum_enabled = on)",
    )
    migrate_url(postgres_url, "kv_store")
    assert fill_factor(postgres_url) == ["fillfactor=55", "autovacuum_enabled=on"]


def test_the_owners_other_storage_parameters_are_kept(postgres_url: str) -> None:
    execute(
        postgres_url,
        given_table(postgres_url, '"we ird"'),
        'ALTER TABLE "we ird" SET (autovacuum_enabled = on)',
    )
    migrate_url(postgres_url, "we ird")
    assert fill_factor(postgres_url, "we ird") == ["autovacuum_enabled=on", "fillfactor=80"]


def test_a_partitioned_table_is_upgraded_without_a_fill_factor(postgres_url: str) -> None:
    execute(
        postgres_url,
        f"{given_table(postgres_url)} PARTITION BY HASH (key)",
        "CREATE TABLE part PARTITION OF kv_store FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
        "CREATE INDEX idx_kv_store_updated_at ON kv_store (updated_at)",
    )
    migrate_url(postgres_url, "kv_store")
    assert columns_and_indexes(postgres_url)[0] == ALL_COLUMNS


def test_several_processes_upgrade_one_table_at_once(shared_store_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=migrate_url, args=(shared_store_url, "kv_store")) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert columns_and_indexes(shared_store_url)[0] == ALL_COLUMNS


def test_several_threads_upgrade_tables_at_once(tmp_path: Any) -> None:
    """The threads must not disturb each other, although Alembic's helpers are global in the
    process.
    """
    urls = [f"sqlite:///{tmp_path}/{n}.db" for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda url: migrate_url(url, "kv_store"), urls))
    assert all(columns_and_indexes(url)[0] == ALL_COLUMNS for url in urls)
