"""Tests of docs/databases.md's roles on MariaDB: one makes the table, another only uses it."""

from __future__ import annotations

from collections.abc import Iterator

import pymysql
import pytest

from celery_singleton_state import KeyValueStore
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.store.base import StoreError, StoreMisconfigured
from tests.helpers.all_verbs import use_all, use_all_values
from tests.helpers.mariadb import MariaDB
from tests.helpers.roles import (
    OWNER,
    WORKER,
    drop_roles_on_mariadb,
    grant_on_mariadb,
    make_roles_on_mariadb,
    of,
)
from tests.helpers.tables import execute, given_table

PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE")
TABLE = "kv_store"


@pytest.fixture
def url(mariadb: MariaDB, mariadb_url: str) -> Iterator[str]:
    """Make the database and the roles of docs/databases.md, but not the table yet; return root's
    URL.
    """
    make_roles_on_mariadb(mariadb_url)
    yield mariadb.url("jobs")
    drop_roles_on_mariadb(mariadb_url)


@pytest.fixture
def worker_url(url: str) -> str:
    return of(WORKER, url)


@pytest.fixture
def table_and_grants(url: str) -> None:
    """Make the table, and grant the worker's rights, as docs/databases.md says."""
    migrate_url(of(OWNER, url), TABLE)
    grant_on_mariadb(url)


@pytest.mark.usefixtures("table_and_grants")
def test_the_documented_grants_are_enough(worker_url: str) -> None:
    store = open_store(worker_url, TABLE, 5.0)
    use_all(store)
    store.close()
    with KeyValueStore(worker_url, TABLE) as kv:
        use_all_values(kv)


@pytest.mark.usefixtures("table_and_grants")
def test_the_documented_grants_allow_nothing_more(mariadb: MariaDB) -> None:
    with (
        pymysql.connect(
            host="127.0.0.1", port=mariadb.port, user=WORKER, database="jobs"
        ) as worker,
        worker.cursor() as cursor,
    ):
        for forbidden in (
            f"ALTER TABLE {TABLE} ADD COLUMN more text",
            f"TRUNCATE {TABLE}",
            "CREATE TABLE another (n integer)",
            f"UPDATE {TABLE}_version SET version_num = '0'",
        ):
            with pytest.raises(pymysql.OperationalError, match="command denied"):
                cursor.execute(forbidden)


@pytest.mark.usefixtures("table_and_grants")
@pytest.mark.parametrize("privilege", PRIVILEGES)
def test_a_missing_privilege_is_named(url: str, worker_url: str, privilege: str) -> None:
    execute(url, f"REVOKE {privilege} ON {TABLE} FROM {WORKER}")
    store = open_store(worker_url, TABLE, 5.0)
    with pytest.raises(StoreMisconfigured, match=f"{privilege} command denied") as raised:
        store.check()
    store.close()
    advice = str(raised.value).partition("; run as the table's owner: ")[2]
    execute(url, advice.replace("<the worker's role>", WORKER))
    store = open_store(worker_url, TABLE, 5.0)
    use_all(store)
    store.close()


@pytest.mark.usefixtures("table_and_grants")
@pytest.mark.parametrize("revoked", PRIVILEGES)
def test_a_table_without_grants_is_not_made_again(url: str, worker_url: str, revoked: str) -> None:
    execute(url, f"REVOKE {revoked} ON {TABLE} FROM {WORKER}")
    with pytest.raises(StoreMisconfigured, match=f"{revoked} command denied"):
        open_store(worker_url, TABLE, 5.0, auto_migrate=True)


def test_a_role_that_may_not_make_the_table_gets_an_error(url: str, worker_url: str) -> None:
    execute(url, f"GRANT SELECT ON jobs.* TO {WORKER}")
    error = f"{WORKER} may not create or upgrade table {TABLE} .*CREATE command denied"
    with pytest.raises(StoreError, match=error):
        migrate_url(worker_url, TABLE)


def test_the_documented_role_upgrades_an_existing_table(url: str, worker_url: str) -> None:
    execute(url, given_table(url), f"INSERT INTO {TABLE} (`key`, value) VALUES ('k', '1')")
    migrate_url(of(OWNER, url), TABLE)
    grant_on_mariadb(url)
    with KeyValueStore(worker_url, TABLE) as kv:
        assert kv.get("k") == 1
