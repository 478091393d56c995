"""Connections that cannot be made: an error that an operator must fix is no outage."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from celery_singleton_state import check_health
from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.runtime import close_runtime
from celery_singleton_state.store.base import StoreError, StoreMisconfigured, StoreUnavailable
from celery_singleton_state.store.redis.store import RedisStore
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.servers import Valkey, free_port

SECRET = "hunter2"


@pytest.fixture
def error_of() -> Iterator[Callable[[str], StoreError]]:
    """Return a function that checks the store behind a URL and returns the expected error."""
    opened: list[SqlStore | RedisStore] = []

    def check(url: str) -> StoreError:
        is_sql = url.startswith(("postgresql", "mysql"))
        opened.append(open_store(url, "kv_store", 2.0) if is_sql else RedisStore(url, 2.0))
        with pytest.raises(StoreError) as caught:
            opened[-1].check()
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value)
        return caught.value

    yield check
    for store in opened:
        store.close()


ON_POSTGRESQL = {
    "sslmode=require": "offers no TLS.*sslmode",
    "sslmode=verify-full": "offers no TLS.*sslmode",
    "options=-c%20nosuch%3D1": "options in singleton_store_url",
    "options=-c%20work_mem%3Dmuch": "options in singleton_store_url",
    "channel_binding=require": "channel_binding=require in singleton_store_url",
    "require_auth=scram-sha-256": "require_auth in singleton_store_url",
    "gssencmode=require": "gssencmode=require in singleton_store_url",
}


@pytest.mark.parametrize("option", ON_POSTGRESQL)
def test_an_option_that_postgresql_refuses_is_no_outage(
    server_url: str, option: str, error_of: Callable[[str], StoreError]
) -> None:
    error = error_of(f"{server_url}?{option}")
    assert isinstance(error, StoreMisconfigured)
    with pytest.raises(StoreMisconfigured, match=ON_POSTGRESQL[option]):
        raise error


ON_MARIADB = {
    "ssl_verify_cert=true": "offers no TLS",
    "collation=nosuch": "collation in singleton_store_url",
    "sql_mode=NOSUCH": "sql_mode in singleton_store_url",
}


@pytest.mark.parametrize("option", ON_MARIADB)
def test_an_option_that_mariadb_refuses_is_no_outage(
    mariadb_url: str, option: str, error_of: Callable[[str], StoreError]
) -> None:
    error = error_of(f"{mariadb_url}{'&' if '?' in mariadb_url else '?'}{option}")
    with pytest.raises(StoreMisconfigured, match=ON_MARIADB[option]):
        raise error


def test_a_port_in_the_options_is_understood(mariadb_url: str) -> None:
    """PyMySQL does not accept the port as text, so the package converts it."""
    place, _, database = mariadb_url.rpartition("/")
    port = place.rpartition(":")[2]
    store = open_store(f"mysql://root@127.0.0.1:1/{database}?port={port}", "kv_store", 2.0, 2, True)
    store.check()
    store.close()


@pytest.mark.parametrize(
    "url",
    ["postgresql://u:hunter2@127.0.0.1:{port}/db", "mysql://u:hunter2@127.0.0.1:{port}/db"],
)
def test_a_missing_server_is_an_outage(url: str, error_of: Callable[[str], StoreError]) -> None:
    assert isinstance(error_of(url.format(port=free_port())), StoreUnavailable)


def test_a_certificate_that_was_removed_is_a_one_line_error(
    tmp_path: Path, error_of: Callable[[str], StoreError]
) -> None:
    """PyMySQL reads the certificate's file again for each connection, and raises Python's own
    error.
    """
    authorities = ssl.get_default_verify_paths().cafile
    if authorities is None:
        pytest.skip("Python knows no file of certificates here")
    file = tmp_path / "ca.pem"
    shutil.copy(authorities, file)
    store = open_store(f"mysql://u:hunter2@127.0.0.1:1/db?ssl_ca={file}", "kv_store", 2.0)
    file.unlink()
    for attempt in (store.check, lambda: store.list("")):
        with pytest.raises(StoreMisconfigured, match=r"no connection can be made.*No such"):
            attempt()
    store.close()


def test_an_invalid_host_name_is_not_taken_for_a_refused_value(
    monkeypatch: pytest.MonkeyPatch, error_of: Callable[[str], StoreError]
) -> None:
    """The host's name is invalid in a way that only the name's look-up reveals."""

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise UnicodeError("label empty or too long")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for url in ("redis://h/0", "mysql://u@h/db"):
        error = error_of(url)
        assert isinstance(error, StoreMisconfigured)
        assert "name of the host" in str(error)


def test_sentinels_that_know_no_master_are_named_without_their_password(
    error_of: Callable[[str], StoreError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py's error text contains the representation of each client, which up to redis-py 6.4
    contains the password.
    """
    ports = free_port(), free_port()
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    url = f"sentinel://u:hunter2@{hosts}/leases/0?sentinel_username=s&sentinel_password=hunter2"
    error: BaseException | None = error_of(url)
    assert isinstance(error, StoreUnavailable)
    for text in (*hosts.split(","), "'leases'", "Connection refused"):
        assert text in str(error)
    while error is not None:
        assert SECRET not in str(error)
        assert "<redis" not in str(error)
        error = error.__cause__ or error.__context__

    monkeypatch.setattr(redis.Redis, "sentinel_masters", lambda _client: {})
    error = error_of(url)
    assert isinstance(error, StoreMisconfigured)
    assert "sentinel://host:26379/<name>" in str(error)


def test_a_missing_database_is_a_one_line_error(
    valkey: Valkey, error_of: Callable[[str], StoreError], caplog: pytest.LogCaptureFixture
) -> None:
    error = error_of(f"redis://127.0.0.1:{valkey.port}/99999")
    assert isinstance(error, StoreMisconfigured)
    assert "no database of this number" in str(error)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "conf",
    [
        {"singleton_store_url": "mysql://u:hunter2@h"},
        {"singleton_store_url": "memory://", "singleton_lease_url": "redis://h?protocol=4"},
    ],
)
def test_health_reports_a_url_that_cannot_be_used(conf: dict[str, str]) -> None:
    app = Celery("shop", set_as_current=False)
    app.conf.update(conf)
    report = check_health(app)
    close_runtime(app)
    assert not report.healthy
    assert report.error is not None
    assert report.error.startswith(("singleton_store_url", "singleton_lease_url"))
