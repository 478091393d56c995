"""Tests on all stores of values that a store cannot hold: the error is no outage, and nothing
changes.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymysql
import pytest
import redis
from sqlalchemy import event

from celery_singleton_state import KeyValueStore, KeyValueStoreError
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import (
    Ended,
    Leases,
    NewValue,
    StoreMisconfigured,
    StoreRefusesValue,
    Write,
)
from celery_singleton_state.store.redis.store import RedisStore
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.all_verbs import use_all, use_all_values
from tests.helpers.refused_values import LARGEST, ODD, PACKET, with_small_packets
from tests.helpers.rows import DONE, NEW, acquire, peek
from tests.helpers.servers import Valkey
from tests.helpers.stores import url_on
from tests.helpers.tables import execute
from tests.helpers.writes import enqueue, write

POLISH = NewValue('{"city":"Łódź"}', 1)


def with_small_sqlite(url: str) -> SqlStore:
    """Open an SQLite store whose connections accept no text longer than 10,000 bytes."""
    store = open_store(url, "kv_store", 2.0, auto_migrate=True)
    store.engine.dispose()

    @event.listens_for(store.engine, "connect")
    def limit(connection: sqlite3.Connection, _record: Any) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)

    return store


def of_size(size: int) -> NewValue:
    return NewValue(f'"{"x" * size}"', 1)


@pytest.fixture(params=["latin1", "check", "sqlite", "packet", "larger packet", "column"])
def store_and_refused_value(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[SqlStore, NewValue]]:
    """Yield a store, and a value that it cannot hold."""
    kind = request.param
    if kind == "sqlite":
        store = with_small_sqlite(url_on("sqlite", request, tmp_path))
        yield store, of_size(20_000)
    elif kind in ("packet", "larger packet"):
        url = url_on("mariadb", request, tmp_path)
        open_store(url, "kv_store", 2.0, auto_migrate=True).close()
        with with_small_packets(request.getfixturevalue("mariadb")):
            store = open_store(url, "kv_store", 2.0)
            # The server does not read the larger value, but closes the connection.
            yield store, of_size(PACKET if kind == "packet" else 200 * PACKET)
    elif kind == "column":
        url = url_on("mariadb", request, tmp_path)
        store = open_store(url, "kv_store", 2.0, auto_migrate=True)
        execute(url, "ALTER TABLE kv_store MODIFY value TEXT CHARACTER SET latin1 NOT NULL")
        yield store, POLISH
    elif kind == "check":
        url = url_on("postgresql", request, tmp_path)
        store = open_store(url, "kv_store", 2.0, auto_migrate=True)
        execute(url, "ALTER TABLE kv_store ADD CHECK (length(value) < 10000)")
        yield store, of_size(20_000)
    else:
        store = open_store(url_on("latin1", request, tmp_path), "kv_store", 2.0, auto_migrate=True)
        yield store, POLISH
    store.close()


def test_a_value_that_the_store_cannot_hold_is_no_outage(
    store_and_refused_value: tuple[SqlStore, NewValue],
) -> None:
    store, refused = store_and_refused_value
    lease = acquire(store).lease
    assert store.save(lease, write(NEW))
    before = peek(store)
    attempts: list[Callable[[], Any]] = [
        lambda: store.save(lease, write(refused, 2)),
        lambda: store.release(lease, DONE, write(refused, 2)),
        lambda: store.set_aside("other", refused.value),
        lambda: store.requests.put("other", None, refused),
    ]
    for attempt in attempts:
        with pytest.raises(StoreRefusesValue):
            attempt()
    with pytest.raises(StoreRefusesValue), store.transaction() as transaction:
        transaction.save(lease, write(refused, 2))
    after = peek(store)
    assert (after.value, after.fence, after.holder) == (NEW.value, before.fence, before.holder)
    assert after.write == before.write
    assert store.peek("other") is None
    # The refused write has used number 2 and was not answered. So the release has number 3, and
    # names write 1 as seen.
    assert store.release(lease, DONE, Write(3, 1, NEW))


def test_a_value_that_kv_cannot_hold_raises_its_own_error(
    store_and_refused_value: tuple[SqlStore, NewValue], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, refused = store_and_refused_value
    monkeypatch.setattr("celery_singleton_state.kv._OwnStore.open", lambda _: store)
    kv = KeyValueStore("memory://")
    kv.set("k", 1)
    with pytest.raises(KeyValueStoreError, match="cannot hold"):
        kv.set("k", refused.value)
    with pytest.raises(KeyValueStoreError, match="cannot hold"):
        kv.modify("k", lambda _: refused.value)
    assert kv.get("k") == 1


@pytest.mark.parametrize("key", ["a\0b", "a\udc80b"])
@pytest.mark.parametrize("name", ["postgresql", "latin1", "mariadb", "sqlite"])
def test_a_key_that_kv_cannot_hold_raises_its_own_error(
    name: str, key: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = url_on(name, request, tmp_path)
    open_store(url, "kv_store", 2.0, auto_migrate=True).close()
    with KeyValueStore(url) as kv:
        if key == "a\0b" and name in ("mariadb", "sqlite"):
            kv.set(key, 1)
            assert kv.get(key) == 1
            return
        with pytest.raises(KeyValueStoreError, match="cannot hold"):
            kv.set(key, 1)


@pytest.mark.parametrize("column", ["fence", "newest"])
def test_a_fence_at_its_largest_is_an_error_that_says_what_to_do(
    leases: Leases, column: str, request: pytest.FixtureRequest
) -> None:
    lease = acquire(leases).lease
    assert leases.release(lease, DONE)
    if isinstance(leases, SqlStore):
        key = leases._sql.key
        change = f"UPDATE kv_store SET {column} = {LARGEST} WHERE {key} = 'k'"
        leases._change(change, {})
    else:
        with redis.Redis.from_url(request.getfixturevalue("lease_url")) as client:
            client.hset("k", column, str(LARGEST))
    for _ in range(2):
        with pytest.raises(StoreRefusesValue, match=r"the fence .*is at its largest") as raised:
            leases.acquire("k", "b", 60, None)
    row = peek(leases)
    assert row.holder is None
    if isinstance(leases, SqlStore):
        leases._change(str(raised.value).split("fences: ")[1].rstrip(";"), {})
        assert acquire(leases).lease.fence >= lease.fence


@pytest.fixture(
    params=["memory", "sqlite", "postgresql", "latin1", "sql_ascii", "mariadb", "redis"]
)
def any_leases(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Leases]:
    opened: Leases
    if request.param == "redis":
        opened = RedisStore(request.getfixturevalue("lease_url"), io_timeout=2.0)
    else:
        url = url_on(request.param, request, tmp_path)
        opened = open_store(url, "kv_store", 2.0, auto_migrate=True)
    yield opened
    opened.close()


def test_a_message_may_have_any_id(any_leases: Leases) -> None:
    requests = any_leases.requests
    assert enqueue(requests, "k", ODD, 60) == ODD
    assert requests.queued("k").task_id == ODD
    assert peek(any_leases).queued_task_id == ODD
    acquired = any_leases.acquire("k", "a", 60, ODD)
    assert acquired is not None
    row = peek(any_leases)
    assert (row.task_id, row.queued_task_id) == (ODD, None)
    assert [each.task_id for each in any_leases.list("k")] == [ODD]
    assert any_leases.ticks(["k"])["k"].task_id == ODD
    assert requests.request_handoff(row, ODD, row.next_rank)
    assert peek(any_leases).handoff_to == ODD
    assert any_leases.renew([acquired.lease]).keys() == {"k"}
    assert any_leases.release(acquired.lease, Ended("failed", "[]"))
    requests.dequeue("k", ODD)


@pytest.mark.parametrize("name", ["latin1", "sql_ascii"])
def test_all_verbs_work_in_databases_of_other_encodings(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = url_on(name, request, tmp_path)
    store = open_store(url, "kv_store", 2.0, auto_migrate=True)
    use_all(store)
    # The text contains an ö, which both encodings can hold, each in its own way.
    lease = acquire(store, key="Köln").lease
    new = NewValue('{"city":"Köln"}', 1)
    assert store.save(lease, write(new))
    assert store.renew([lease, acquire(store, key="K").lease]).keys() == {"Köln", "K"}
    assert (peek(store, "Köln").value, list(store.ticks(["Köln"]))) == (new.value, ["Köln"])
    assert [row.key for row in store.list("Köl")] == ["Köln"]
    store.close()
    with KeyValueStore(url) as kv:
        use_all_values(kv)
        kv.prefix("Köln:").set("ö", "ü")
        assert (kv.prefix("Köln:").size(), kv.get("Köln:ö")) == (1, "ü")
        kv.prefix("Köln:").clear()
        assert kv.prefix("Köln:").is_empty()


def test_sql_ascii_holds_all_characters(sql_ascii_url: str) -> None:
    store = open_store(sql_ascii_url, "kv_store", 2.0, auto_migrate=True)
    lease = acquire(store, key="Łódź").lease
    assert store.renew([lease]).keys() == {"Łódź"}
    assert store.release(lease, DONE, write(POLISH))
    assert peek(store, "Łódź").value == POLISH.value
    store.close()


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("postgresql", None),
        ("sql_ascii", None),
        ("latin1", "encoding is LATIN1"),
        ("mariadb", None),
        ("sqlite", None),
    ],
)
def test_an_encoding_that_lacks_characters_is_named_at_start(
    name: str,
    warning: str | None,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = url_on(name, request, tmp_path)
    with caplog.at_level(logging.WARNING):
        store = open_store(url, "kv_store", 2.0, auto_migrate=True)
        store.check()
        store.check()
    store.close()
    assert warning is None or warning in caplog.text
    assert len(caplog.records) == bool(warning)


def test_a_column_that_lacks_characters_is_named_at_start(
    mariadb_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(mariadb_url, "kv_store", 2.0, auto_migrate=True)
    execute(mariadb_url, "ALTER TABLE kv_store MODIFY value TEXT CHARACTER SET latin1 NOT NULL")
    with caplog.at_level(logging.WARNING):
        store.check()
    store.close()
    assert "value (latin1) of table kv_store" in caplog.text


def test_an_authentication_that_needs_a_package_is_no_outage(
    mariadb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyMySQL is used without cryptography, and the user's authentication plugin is MySQL 8's
    default.
    """
    store = open_store(mariadb_url, "kv_store", 2.0, auto_migrate=True)
    store.engine.dispose()

    def connect(*_: object) -> None:
        raise RuntimeError("'cryptography' package is required for caching_sha2_password")

    with monkeypatch.context() as patch:
        patch.setattr(pymysql.connections.Connection, "connect", connect)
        with pytest.raises(StoreMisconfigured, match=r"'cryptography' package .*pymysql"):
            store.acquire("k", "a", 60, None)
    store.close()


@pytest.mark.parametrize("name", ["sqlite", "sql_ascii"])
def test_a_text_that_is_not_utf_8_is_no_outage(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Another program has written the text. If the lease was acquired before the error, it must be
    given back.
    """
    url = url_on(name, request, tmp_path)
    store = open_store(url, "kv_store", 2.0, auto_migrate=True)
    store.set_aside("k", "{}")
    broken = "CAST(x'C5' AS TEXT)" if name == "sqlite" else "convert_from('\\xC5', 'SQL_ASCII')"
    store._change(f"UPDATE kv_store SET value = {broken}", {})
    with pytest.raises(StoreRefusesValue, match=r"not UTF-8|invalid byte sequence"):
        store.acquire("k", "a", 60, None)
    store.give_back("k", "a")
    assert list(store._rows("SELECT holder FROM kv_store", {})) == [(None,)]
    store.close()


def test_a_pending_run_too_large_for_redis_is_no_outage(lease_url: str, valkey: Valkey) -> None:
    """The server closes the connection in the middle of the request."""
    store = RedisStore(lease_url, io_timeout=2.0)
    lease = acquire(store).lease
    with redis.Redis.from_url(lease_url) as client:
        usual = client.config_get("proto-max-bulk-len")["proto-max-bulk-len"]
        client.config_set("proto-max-bulk-len", 1 << 20)
        try:
            for size in ((1 << 20) + 1, 20 << 20):
                with pytest.raises(StoreRefusesValue, match="proto-max-bulk-len"):
                    store.requests.request_run(peek(store), "x" * size)
        finally:
            client.config_set("proto-max-bulk-len", usual)
    assert store.requests.wanted("k") is None
    assert store.release(lease, DONE)
    store.close()
