"""Tests of docs/databases.md's roles on PostgreSQL: one makes the table, another only uses it."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from celery_singleton_state import KeyValueStore, KeyValueStoreError
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.store.base import StoreError, StoreMisconfigured
from tests.helpers.all_verbs import use_all, use_all_values
from tests.helpers.roles import OWNER, TABLE, WORKER, drop_roles, grant, make_roles, of
from tests.helpers.tables import execute, given_table

PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE")


@pytest.fixture
def roles(postgres_url: str) -> Iterator[None]:
    """Make the roles of docs/databases.md, but not the table yet."""
    make_roles(postgres_url)
    yield
    drop_roles(postgres_url)


@pytest.fixture
def owner_url(roles: None, postgres_url: str) -> str:
    return of(OWNER, postgres_url)


@pytest.fixture
def worker_url(roles: None, postgres_url: str) -> str:
    return of(WORKER, postgres_url)


@pytest.fixture
def table_and_grants(postgres_url: str, owner_url: str) -> None:
    """Make the table, and grant the worker's rights, as docs/databases.md says."""
    migrate_url(owner_url, TABLE)
    grant(postgres_url)


@pytest.mark.usefixtures("table_and_grants")
def test_the_documented_grants_are_enough(worker_url: str) -> None:
    store = open_store(worker_url, TABLE, 5.0)
    use_all(store)
    store.close()
    with KeyValueStore(worker_url, TABLE) as kv:
        use_all_values(kv)


@pytest.mark.usefixtures("table_and_grants")
def test_the_documented_grants_allow_nothing_more(worker_url: str) -> None:
    with psycopg.connect(worker_url.replace("+psycopg", ""), autocommit=True) as connection:
        for forbidden in (
            f"ALTER TABLE {TABLE} ADD COLUMN more text",
            f"TRUNCATE {TABLE}",
            "CREATE TABLE jobs.another (n integer)",
            f"UPDATE {TABLE}_version SET version_num = '0'",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(forbidden)


@pytest.mark.usefixtures("table_and_grants")
@pytest.mark.parametrize("privilege", PRIVILEGES)
def test_a_missing_privilege_is_named(owner_url: str, worker_url: str, privilege: str) -> None:
    execute(owner_url, f"REVOKE {privilege} ON {TABLE} FROM shop_worker")
    store = open_store(worker_url, TABLE, 5.0)
    with pytest.raises(StoreMisconfigured) as raised:
        store.check()
    store.close()
    lacks, advice = str(raised.value).split("; run as its owner: ")
    assert lacks == f"role shop_worker lacks {privilege} on table {TABLE}"
    execute(owner_url, advice)
    store = open_store(worker_url, TABLE, 5.0)
    use_all(store)
    store.close()


@pytest.mark.usefixtures("table_and_grants")
def test_all_missing_privileges_are_named(owner_url: str, worker_url: str) -> None:
    execute(owner_url, f"REVOKE ALL ON {TABLE} FROM shop_worker")
    store = open_store(worker_url, TABLE, 5.0)
    with pytest.raises(StoreMisconfigured, match="lacks SELECT, INSERT, UPDATE, DELETE on table"):
        store.check()
    with pytest.raises(StoreMisconfigured, match=r"permission denied .* GRANT SELECT, INSERT"):
        store.acquire("k", "h", 60, None)
    store.close()
    with (
        KeyValueStore(worker_url, TABLE) as kv,
        pytest.raises(KeyValueStoreError, match=r"permission denied .* GRANT SELECT, INSERT"),
    ):
        kv.set("k", 1)


@pytest.mark.usefixtures("table_and_grants")
def test_a_missing_right_to_use_the_schema_is_named(owner_url: str, worker_url: str) -> None:
    execute(owner_url, "REVOKE USAGE ON SCHEMA jobs FROM shop_worker")
    store = open_store(worker_url, TABLE, 5.0)
    with pytest.raises(StoreMisconfigured, match=r"for schema jobs; .* GRANT USAGE ON SCHEM"):
        store.check()
    store.close()


@pytest.mark.usefixtures("table_and_grants")
def test_grants_on_single_columns_are_enough_for_the_check(owner_url: str, worker_url: str) -> None:
    execute(
        owner_url,
        f"REVOKE UPDATE ON {TABLE} FROM shop_worker",
        f"GRANT UPDATE (value, updated_at) ON {TABLE} TO shop_worker",
    )
    store = open_store(worker_url, TABLE, 5.0)
    store.check()
    store.close()


@pytest.mark.usefixtures("table_and_grants")
@pytest.mark.parametrize("revoked", PRIVILEGES)
def test_a_table_without_grants_is_not_made_again(
    owner_url: str, worker_url: str, revoked: str
) -> None:
    execute(owner_url, f"REVOKE {revoked} ON {TABLE} FROM shop_worker")
    with pytest.raises(StoreMisconfigured, match=f"lacks {revoked} on"):
        open_store(worker_url, TABLE, 5.0, auto_migrate=True)


def test_a_role_that_may_not_make_the_table_gets_an_error(worker_url: str) -> None:
    """A worker with ``singleton_auto_migrate`` raises this error, and so does ``migrate``."""
    error = (
        "shop_worker may not create or upgrade table jobs.kv_store .*permission denied for schema"
    )
    with pytest.raises(StoreError, match=error):
        open_store(worker_url, TABLE, 5.0, auto_migrate=True)
    with pytest.raises(StoreError, match=error):
        migrate_url(worker_url, TABLE)


def test_a_role_that_does_not_own_the_table_gets_an_error(
    postgres_url: str, owner_url: str
) -> None:
    execute(postgres_url, given_table(postgres_url, TABLE))
    error = "shop_migrate may not create or upgrade table jobs.kv_store "
    with pytest.raises(StoreError, match=rf"{error}\(permission denied for table"):
        migrate_url(owner_url, TABLE)
    execute(postgres_url, f"GRANT ALL ON {TABLE} TO shop_migrate")
    with pytest.raises(StoreError, match=rf"{error}\(must be owner of"):
        migrate_url(owner_url, TABLE)
    execute(postgres_url, f"ALTER TABLE {TABLE} OWNER TO shop_migrate")
    migrate_url(owner_url, TABLE)


#: Row-level security policies, and the result of the worker's check with each: "all" if it may read
#: and write all rows, "its own" if it could write and read a row of its own, or else the statement
#: that the policies refuse.
POLICIES = [
    ((), "insert"),
    (("CREATE POLICY p ON {table} USING (true)",), "all"),
    (("CREATE POLICY p ON {table} TO shop_worker USING (true) WITH CHECK (true)",), "all"),
    (("CREATE POLICY p ON {table} TO shop_migrate USING (true)",), "insert"),
    (("CREATE POLICY p ON {table} USING (false)",), "insert"),
    (("CREATE POLICY p ON {table} USING (key LIKE 'singleton-%%')",), "its own"),
    (("CREATE POLICY p ON {table} USING (pg_has_role('shop_worker', 'MEMBER'))",), "its own"),
    (("CREATE POLICY p ON {table} USING (key LIKE 'other-%%')",), "insert"),
    (("CREATE POLICY p ON {table} USING (true) WITH CHECK (false)",), "insert"),
    (("CREATE POLICY p ON {table} FOR SELECT USING (true)",), "insert"),
    (
        (
            "CREATE POLICY r ON {table} FOR SELECT USING (true)",
            "CREATE POLICY a ON {table} FOR INSERT WITH CHECK (true)",
        ),
        "update",
    ),
    (
        (
            "CREATE POLICY r ON {table} FOR SELECT USING (true)",
            "CREATE POLICY a ON {table} FOR INSERT WITH CHECK (true)",
            "CREATE POLICY w ON {table} FOR UPDATE USING (true)",
        ),
        "delete",
    ),
    (
        (
            "CREATE POLICY r ON {table} FOR SELECT USING (true)",
            "CREATE POLICY a ON {table} FOR INSERT WITH CHECK (true)",
            "CREATE POLICY w ON {table} FOR UPDATE USING (true)",
            "CREATE POLICY d ON {table} FOR DELETE USING (true)",
        ),
        "all",
    ),
    (
        (
            "CREATE POLICY p ON {table} USING (true)",
            "CREATE POLICY q ON {table} AS RESTRICTIVE USING (key <> 'k')",
        ),
        "its own",
    ),
    (
        (
            "CREATE POLICY p ON {table} USING (true)",
            "CREATE POLICY q ON {table} AS RESTRICTIVE FOR DELETE USING (key <> key)",
        ),
        "delete",
    ),
]


@pytest.mark.usefixtures("table_and_grants")
@pytest.mark.parametrize(("policies", "found"), POLICIES)
def test_row_level_security_that_can_hide_a_lease_is_found_at_start(
    owner_url: str,
    worker_url: str,
    policies: tuple[str, ...],
    found: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The check at start writes rows of its own, and must leave none behind."""
    enable = f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY"
    execute(owner_url, enable, *(policy.format(table=TABLE) for policy in policies))
    store = open_store(worker_url, TABLE, 5.0)
    if found == "all":
        use_all(store)
    elif found == "its own":
        store.check()
        store.check()
        task = store.acquire("singleton-state:t", "h", 60, None)
        assert task is not None
        assert store.give_back("singleton-state:t", "h") is not None
        assert store.prune(["singleton-state:t"], -1.0) == ["singleton-state:t"]
    else:
        with pytest.raises(StoreMisconfigured, match="row-level security is active") as raised:
            store.check()
        assert f"refuse to {found} a row whose key begins with singleton-state:" in str(
            raised.value
        )
        assert "GRANT" not in str(raised.value)
    store.close()
    warnings = [each.message for each in caplog.records if "row-level security" in each.message]
    assert len(warnings) == (found == "its own")
    owner = open_store(owner_url, TABLE, 5.0)
    owner.check()
    assert not owner.list("singleton-")
    owner.close()


@pytest.mark.usefixtures("table_and_grants")
def test_a_policy_that_refuses_a_row_is_no_missing_grant(owner_url: str, worker_url: str) -> None:
    execute(owner_url, f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY")
    store = open_store(worker_url, TABLE, 5.0)
    with pytest.raises(StoreMisconfigured, match="row-level security") as raised:
        store.acquire("k", "h", 60, None)
    assert "GRANT" not in str(raised.value)
    advice = str(raised.value).split("run as its owner: ")[1].split(";")[0]
    execute(owner_url, advice.replace("<the worker's role>", WORKER))
    use_all(store)
    store.close()
