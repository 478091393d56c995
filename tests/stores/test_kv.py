"""Tests of the table as a plain key-value store, on all kinds of stores."""

from __future__ import annotations

import contextlib
import multiprocessing
import ssl
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from sqlalchemy.exc import ArgumentError

from celery_singleton_state import KeyValueStore, KeyValueStoreError
from celery_singleton_state.migrations.upgrade import migrate_url
from celery_singleton_state.runtime import close_runtime, runtime_of
from celery_singleton_state.store.base import Ended, NewValue
from tests.helpers.writes import write


@pytest.fixture
def app(store_url: str) -> Iterator[Celery]:
    app = Celery("shop", set_as_current=False)
    app.conf.update(singleton_store_url=store_url, singleton_auto_migrate=True)
    yield app
    close_runtime(app)


@pytest.fixture
def kv(app: Celery) -> KeyValueStore:
    return KeyValueStore.from_app(app)


@pytest.mark.parametrize("value", [0, -1.5, "", "ä😀\0", None, True, [], {"a": [1, {"b": None}]}])
def test_values_come_back(kv: KeyValueStore, value: Any) -> None:
    kv.set("k", value)
    assert kv.get("k", "default") == value
    assert kv.has("k")


def test_bytes_come_back(kv: KeyValueStore) -> None:
    kv.set_bytes("k", bytes(range(256)))
    assert kv.get_bytes("k") == bytes(range(256))
    assert kv.get_bytes("other") is None


def test_a_missing_key_has_no_value(kv: KeyValueStore) -> None:
    assert kv.get("k") is None
    assert kv.get("k", 7) == 7
    assert not kv.has("k")
    assert not kv.remove("k")
    assert kv.is_empty()
    assert kv.size() == 0


def test_set_overwrites(kv: KeyValueStore) -> None:
    kv.set("k", 1)
    kv.set("k", 2)
    assert (kv.get("k"), kv.size()) == (2, 1)


def test_remove(kv: KeyValueStore) -> None:
    kv.set("k", 1)
    assert kv.remove("k")
    assert not kv.remove("k")
    assert kv.is_empty()


def test_a_prefix_sees_only_its_own_keys(kv: KeyValueStore) -> None:
    a, b = kv.prefix("a%_:"), kv.prefix("b:")
    a.set("k", 1)
    b.set("k", 2)
    kv.set("aX_:k", 3)
    kv.set("A%_:k", 4)
    assert (a.get("k"), b.get("k"), kv.get("a%_:k")) == (1, 2, 1)
    assert (a.size(), b.size(), kv.size()) == (1, 1, 4)
    a.clear()
    assert (a.is_empty(), b.size(), kv.size()) == (True, 1, 3)
    assert kv.prefix("b").prefix(":").get("k") == 2


def test_modify(kv: KeyValueStore) -> None:
    assert kv.modify("k", lambda n: n + 1, default=0) == 1
    assert kv.modify("k", lambda n: n + 1, default=0) == 2
    assert kv.get("k") == 2


def test_modify_of_a_null(kv: KeyValueStore) -> None:
    kv.set("k", None)
    assert kv.modify("k", lambda value: [value], default=7) == [None]


def test_modify_passes_an_error_on_and_keeps_the_value(kv: KeyValueStore) -> None:
    def fail(value: Any) -> Any:
        raise ArgumentError("the user's own")

    kv.set("k", 1)
    with pytest.raises(ArgumentError):
        kv.modify("k", fail)
    assert kv.get("k") == 1
    with pytest.raises(ArgumentError):
        kv.modify("new", fail)
    assert not kv.has("new")


def test_modify_is_atomic_among_threads(kv: KeyValueStore) -> None:
    """No two threads may read the same value; otherwise an increment would be lost."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: kv.modify("k", lambda n: n + 1, default=0), range(100)))
    assert kv.get("k") == 100


def count_up(url: str, times: int) -> None:
    with KeyValueStore(url) as kv:
        for _ in range(times):
            kv.modify("k", lambda n: n + 1, default=0)


def test_modify_is_atomic_among_processes(shared_store_url: str) -> None:
    migrate_url(shared_store_url, "kv_store")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=count_up, args=(shared_store_url, 100)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 2
    with KeyValueStore(shared_store_url) as kv:
        assert kv.get("k") == 200


def test_modify_while_another_removes_the_key(kv: KeyValueStore) -> None:
    """A's statement makes the row; B removes the row; then A's next statement tries to lock it. No
    call fails.
    """
    with ThreadPoolExecutor(2) as pool:
        for done in [
            pool.submit(kv.modify, "k", lambda n: n + 1, 0)
            if n % 2
            else pool.submit(kv.remove, "k")
            for n in range(200)
        ]:
            done.result()


def test_a_value_that_json_lacks_is_refused(kv: KeyValueStore) -> None:
    with pytest.raises(TypeError, match="key 'k': <object object"):
        kv.set("k", object())
    assert not kv.has("k")


@pytest.mark.parametrize(
    ("value", "told_of"),
    [
        ({42: "a"}, "value[42]: the key 42 (int) comes back as '42' (str)"),
        ([float("nan")], "value[0]: nan (float) comes back as None"),
        ((1,), "value: tuple comes back as list"),
        (b"x", "value: bytes comes back as str"),
        ({"c": Counter("a")}, "value['c']: Counter comes back as dict; use a plain dict"),
    ],
)
def test_a_value_that_would_come_back_changed_is_refused(
    app: Celery, kv: KeyValueStore, value: Any, told_of: str
) -> None:
    kv.set("k", 1)
    for refused in (lambda: kv.set("k", value), lambda: kv.modify("k", lambda _: value)):
        with pytest.raises(TypeError) as caught:
            refused()
        assert str(caught.value).startswith("key 'k': the value would not come back the same: ")
        assert told_of in str(caught.value)
    assert kv.get("k") == 1
    lenient = KeyValueStore.from_app(app, round_trip=False).prefix("l:")
    lenient.set("k", value)
    assert lenient.has("k")


def test_a_value_that_holds_itself_is_refused(kv: KeyValueStore) -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(TypeError, match="key 'k': the value is nested too deeply"):
        kv.set("k", circle)


def test_a_value_of_one_type_that_would_come_back_changed_is_refused(app: Celery) -> None:
    typed = KeyValueStore.from_app(app).for_schema(dict[int, Any])
    typed.set("k", {42: [1]})
    assert typed.get("k") == {42: [1]}
    with pytest.raises(KeyValueStoreError, match=r"key 'k': .*state\[42\]: set comes back as list"):
        typed.set("k", {42: {1}})
    lenient = KeyValueStore.from_app(app, round_trip=False).for_schema(dict[int, Any])
    lenient.set("k", {42: {1}})
    assert typed.get("k") == {42: [1]}


def test_an_error_names_a_type_that_has_no_name(app: Celery) -> None:
    typed = KeyValueStore.from_app(app).for_schema(int | None)
    with pytest.raises(KeyValueStoreError, match=r"does not fit int \| None: TypeError"):
        typed.set("k", object())


def test_a_key_that_cannot_be_text_is_refused(kv: KeyValueStore) -> None:
    with pytest.raises(KeyValueStoreError):
        kv.set("\ud800", 1)


def test_reading_within_a_transaction(app: Celery, kv: KeyValueStore, store_url: str) -> None:
    """On SQLite a reader must not ask for the file's only write lock."""
    if store_url == "memory://":
        # A store in memory has a single connection, which the transaction uses, so nothing else can
        # read.
        return
    kv.set("k", 1)
    with runtime_of(app).store.transaction():
        assert kv.get("k") == 1


@dataclass
class Config:
    n: int = 0


def test_values_of_one_type(kv: KeyValueStore) -> None:
    typed = kv.for_schema(Config)
    typed.set("k", Config(3))
    assert typed.get("k") == Config(3)
    assert typed.get("other") is None
    assert typed.get("other", Config(9)) == Config(9)
    assert typed.modify("k", lambda found: Config(found.n + 1 if found else 0)) == Config(4)
    assert kv.get("k") == {"n": 4}


def test_values_of_another_type_are_refused(kv: KeyValueStore) -> None:
    typed = kv.for_schema(Config)
    kv.set("k", {"n": "many"})
    with pytest.raises(KeyValueStoreError, match="key 'k'"):
        typed.get("k")
    with pytest.raises(KeyValueStoreError, match="key 'k'"):
        typed.set("k", "no config")  # type: ignore[arg-type]
    assert kv.get("k") == {"n": "many"}


def test_leases_are_never_touched(app: Celery, kv: KeyValueStore) -> None:
    """The key-value store may remove or overwrite a singleton's state, but never the fence in its
    row.
    """
    store = runtime_of(app).store
    acquired = store.acquire("singleton-state:s", "holder", 60, None)
    assert acquired is not None
    assert not kv.has("singleton-state:s")
    assert kv.is_empty()
    store.release(acquired.lease, Ended("succeeded", "[]"), write(NewValue('{"n":1}', 1)))
    assert kv.get("singleton-state:s") == {"n": 1}

    for empty in (lambda: kv.remove("singleton-state:s"), kv.clear):
        kv.set("singleton-state:s", {"n": 5})
        empty()
        assert kv.is_empty()
        row = store.peek("singleton-state:s")
        assert row is not None
        assert (row.value, row.schema_version, row.run_count) == ("null", None, 1)
        assert row.fence == acquired.lease.fence

    again = store.acquire("singleton-state:s", "holder", 60, None)
    assert again is not None
    assert again.lease.fence > acquired.lease.fence
    kv.set("singleton-state:s", {"n": 9})
    kv.clear()
    row = store.peek("singleton-state:s")
    assert row is not None
    assert (row.holder, row.held) == ("holder", True)


def test_a_value_that_is_not_json_raises_an_error(app: Celery, kv: KeyValueStore) -> None:
    runtime_of(app).store.set_aside("k", "{broken")
    with pytest.raises(KeyValueStoreError, match="key 'k': its value cannot be read"):
        kv.get("k")
    with pytest.raises(KeyValueStoreError):
        kv.modify("k", lambda value: value)


def test_an_unavailable_database_raises_the_packages_error(tmp_path: Any) -> None:
    for url in (
        "postgresql://nobody@127.0.0.1:1/none",
        f"sqlite:///{tmp_path}/no/such/folder/store.db",
    ):
        with pytest.raises(KeyValueStoreError):
            KeyValueStore(url, timeout=1).get("k")


def test_a_missing_table_names_the_command(postgres_url: str) -> None:
    with (
        KeyValueStore(postgres_url) as kv,
        pytest.raises(KeyValueStoreError, match="celery -A <your app> singleton migrate"),
    ):
        kv.get("k")


def test_a_forked_child_has_connections_of_its_own(shared_store_url: str) -> None:
    """The parent's connection must still work after a child has used the store and exited."""
    migrate_url(shared_store_url, "kv_store")
    with KeyValueStore(shared_store_url) as kv:
        kv.set("k", 1)
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=lambda: kv.modify("k", lambda n: n + 1))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert kv.modify("k", lambda n: n + 1) == 3


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("no url", ImproperlyConfigured, "^the URL 'no url' is not a URL"),
        ("postgresql://u:hunter2@h/db?sslmode=maybe", ImproperlyConfigured, "^the URL: .*sslmode"),
        ("mysql://u:hunter2@h:1", ImproperlyConfigured, "^the URL 'mysql.*names no database"),
        ("mysql://u:hunter2@127.0.0.1:1/db?ssl_ca={gone}", KeyValueStoreError, "^the URL: no conn"),
    ],
)
def test_errors_about_a_url_name_the_argument_and_no_setting(
    url: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    """This holds for a URL that cannot be parsed, and for a connection that cannot be made."""
    gone = tmp_path / "ca.pem"
    gone.write_text(Path(certificates()).read_text())
    with KeyValueStore(url.format(gone=gone)) as store:
        with contextlib.suppress(ImproperlyConfigured, KeyValueStoreError):
            store.get("k")
        gone.unlink()
        with pytest.raises(error, match=message) as caught:
            store.get("k")
    assert "singleton_store_url" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    app = Celery("shop", set_as_current=False)
    app.conf.singleton_store_url = "no url"
    with pytest.raises(ImproperlyConfigured, match=r"^singleton_store_url"):
        KeyValueStore.from_app(app).get("k")


def certificates() -> str:
    file = ssl.get_default_verify_paths().cafile
    if file is None:
        pytest.skip("Python knows no file of certificates here")
    return file
