"""URLs of the store and of the leases: which are accepted. No message may show a password."""

from __future__ import annotations

import sys
from typing import Any

import psycopg
import pytest
import redis
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from sqlalchemy import make_url

from celery_singleton_state.config.settings import Settings
from celery_singleton_state.store.redis.url import client_for
from celery_singleton_state.store.sql.engine import make_engine
from celery_singleton_state.store.sql.url import parse_url
from celery_singleton_state.text.urls import shown_url

#: Each password in these tests contains this text.
SECRET = "hunter2"

ACCEPTED = {
    "postgres://u:hunter2@h/db": "postgresql+psycopg://u:***@h/db",
    "POSTGRESQL://u:hunter2@h/db": "postgresql+psycopg://u:***@h/db",
    "postgresql+psycopg2://u:hun%40ter2@h/db?sslmode=require": "postgresql+psycopg://u:***@h/db?…",
    "postgresql+psycopg_async://h/db": "postgresql+psycopg://h/db",
    "postgresql+asyncpg://h/db?ssl=require": "postgresql+psycopg://h/db?…",
    "postgresql+pg8000://h/db": "postgresql+psycopg://h/db",
    "db+postgresql://u:hunter2@h/db": "postgresql+psycopg://u:***@h/db",
    "postgresql://u:p/hunter2#?:@h/db": "postgresql+psycopg://u:***@h/db",
    "postgresql://u@h/db?password=hunter2": "postgresql+psycopg://u@h/db?…",
    "postgresql://u@/db?host=a:1&host=b:2": "postgresql+psycopg://u@/db?…",
    "mysql+mysqldb://u:hunter2@h/db?charset=utf8mb4": "mysql+pymysql://u:***@h/db?…",
    "mysql+asyncmy://h/db": "mysql+pymysql://h/db",
    "mariadb+mariadbconnector://u:hunter2@h/db": "mysql+pymysql://u:***@h/db",
    "sqlite+aiosqlite:///x.db": "sqlite:///x.db",
    "sqla+sqlite:///x.db?timeout=3": "sqlite:///x.db?…",
}


@pytest.mark.parametrize("url", ACCEPTED)
def test_urls_of_other_drivers_are_accepted(url: str) -> None:
    engine = make_engine(parse_url(url), 2.0)
    assert shown_url(engine.url) == ACCEPTED[url]
    engine.dispose()


def test_asyncpgs_option_for_tls_is_translated() -> None:
    engine = make_engine(parse_url("postgresql+asyncpg://h/db?ssl=verify-ca"), 2.0)
    assert engine.url.query == {"sslmode": "verify-ca"}


REFUSED = {
    "no url": "singleton_store_url='no url' is not a URL",
    "u:hunter2@h/db": "%40",
    "host=h password=hunter2": "postgresql://user:password@host",
    "postgresql:/u:hunter2@h/db": "%40",
    "postgresql://u:p@hunter2@h/db": "singleton_store_url='postgresql://…'.*%40",
    "postgresql://u:p@hun:hunter2@h/db": "%40",
    "postgresql://u:p@x/hunter2@h/db": "%40",
    "postgresql://u:p@x?hunter2@h/db": "%40",
    "postgresql://u/x:hunter2@h/db": "%40",
    "postgresql://u:hunter2@h:port/db": "is not a URL",
    "postgresql://u:hunter2@h:99999/db": "port",
    "postgresql+foo://u:hunter2@h/db": r"write postgresql\+psycopg://",
    "postgresql+asyncpg://u:hunter2@h/db?ssl=true": "'ssl'; write sslmode=require",
    "postgresql://u:hunter2@h/db?sslmod=require": "'sslmod'; did you mean sslmode",
    "postgresql://u:hunter2@h/db?password=hunter2&charset=utf8": "psycopg does not know.*'charset'",
    "postgresql://u:hunter2@h/db?sslmode=maybe": "'sslmode' is not allowed: sslmode takes disable",
    "postgresql://u:hunter2@h/db?target_session_attrs=best": "target_session_attrs",
    "postgresql://u:hunter2@h/db?target_session_attrs=standby": "primary, as the store is written",
    "postgresql://u:hunter2@h/db?connect_timeout=abc": "connect_timeout takes a whole number",
    "postgresql://u:hunter2@h/db?port=99999": "port takes a whole number, from 1 to 65535",
    "postgresql://u:hunter2@h/db?port=abc": "port takes a whole number",
    "postgresql://u:hunter2@h:0/db": "port takes a whole number",
    "postgresql://u:hunter2@/db?host=a:1&host=b:99999": "port takes a whole number",
    "postgresql://u:hunter2@h/db?hostaddr=bad": "hostaddr takes an address",
    "postgresql://u:hunter2@h/db?service=nosuch": "service takes the name of a service",
    "postgresql://u:hunter2@h/db?require_auth=hunter2": "require_auth takes methods",
    "postgresql://u:hunter2@h/db?sslmode=require&sslmode=allow": "'sslmode' is given twice",
    "postgresql://u:hunter2@a..b/db": "name of a host",
    "postgresql://u:hunter2@/db?host=h%00x": "'host' has a NUL",
    "postgresql://u:hunter2%00@h/db": "the password has a NUL",
    "postgresql://u%00:hunter2@h/db": "the user has a NUL",
    "mysql://u:hunter2@h/d%00b": "the database has a NUL",
    "mysql://u:hunter2@h/db?init_command=%00": "'init_command' has a NUL",
    "sqlite:///x%00.db": "the database has a NUL",
    "postgresql+asyncpg://u:hunter2@h/db?command_timeout=5": "'command_timeout'; leave it out",
    "postgresql+pg8000://u:hunter2@h/db?ssl_context=x": "'ssl_context'; write sslmode=require",
    "postgresql://u:hunter2@h/db?keepalives=often": "keepalives takes a whole number",
    "postgresql://u:hunter2@h/db?sslmode=verify-full&sslrootcert=/no/ca": "no file '/no/ca'",
    "postgresql://u:hunter2@h/db?prepare_threshold=x": "prepare_threshold",
    "mysql+pyodbc://u:hunter2@h/db": r"write mysql\+pymysql://",
    "mysql://u:hunter2@h/db?sslmode=require": "'sslmode'; write ssl_ca=",
    "mysql://u:hunter2@h/db?ssl_ca=/no/ca": "no file '/no/ca'",
    "mysql://u:hunter2@h/db?connect_timeout=soon": "connect_timeout takes a whole number",
    "mysql://u:hunter2@h/db?local_infile=maybe": "local_infile takes true or false",
    "mysql://u:hunter2@h/db?ssl_ca=/etc/passwd": "ssl_ca takes a file with certificates",
    "mysql://u:hunter2@h/db?read_default_file=/etc/passwd": "read_default_file takes a file",
    "mysql://u:hunter2@h/db?ssl_cipher=abc": "ssl_cipher takes ciphers",
    "mysql://u:hunter2@h/db?host=x&host=y": "'host' is given twice",
    "mysql://u:hunter2@h/db?port=99999": "port takes a whole number, from 1 to 65535",
    "mysql://u:hunter2@h:3306": "names no database",
    "mysql://u:hunter2@a..b/db": "name of a host",
    "sqlite+pysqlcipher://:hunter2@/x.db": "not pysqlcipher",
    "sqlite://x.db": "write sqlite:///file.db",
    "sqlite://u:hunter2@h/x.db": "write sqlite:///file.db",
    "sqlite:///x.db?mode=ro": "sqlite3 does not know the option 'mode'",
    "sqlite:///x.db?timeout=long": "timeout takes a number of seconds",
    "sqlite:///x.db?isolation_level=hunter2": "isolation_level takes DEFERRED",
    "oracle://u:hunter2@h/db?password=hunter2": "it takes a URL of postgresql, sqlite",
    "redis://:hunter2@h/0": "singleton_lease_url takes it",
}


@pytest.mark.parametrize("url", REFUSED)
@pytest.mark.filterwarnings("ignore:Query string argument")
def test_a_wrong_store_url_is_one_line_without_its_password(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=REFUSED[url]) as caught:
        make_engine(parse_url(url), 2.0)
    is_one_line_without_secret(caught.value)


def is_one_line_without_secret(error: BaseException) -> None:
    assert "\n" not in str(error)
    shown: BaseException | None = error
    while shown is not None:
        assert SECRET not in str(shown) + repr(shown)
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
def test_a_missing_driver_is_named_in_one_line(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, module = {
        "psycopg": ("postgresql", "on_postgresql"),
        "pymysql": ("mysql", "on_mysql"),
    }[driver]
    monkeypatch.delitem(sys.modules, f"celery_singleton_state.store.{module}", False)
    monkeypatch.delattr(f"celery_singleton_state.store.{module}", raising=False)
    monkeypatch.setitem(sys.modules, driver, None)
    wanted = rf"needs a driver.*pip install celery-singleton-state\[{extra}\]"
    with pytest.raises(ImproperlyConfigured, match=wanted) as caught:
        make_engine(parse_url(f"{extra}://u:hunter2@h/db"), 2.0)
    is_one_line_without_secret(caught.value)


def pool_of(url: str) -> Any:
    client = client_for(url, socket_timeout=2.0, socket_connect_timeout=2.0)
    pool: Any = client.connection_pool
    # If redis-py does not know an option, it raises only when it makes a connection.
    pool.connection_class(**pool.connection_kwargs)
    return pool


LEASES: dict[str, dict[str, Any]] = {
    "redis://": {"host": "localhost", "port": 6379, "db": 0},
    "redis://:hun%40ter2@h:1/2": {"host": "h", "port": 1, "db": 2, "password": "hun@ter2"},
    "redis://u:p@x@h": {"host": "h", "username": "u", "password": "p@x"},
    "redis://h//3": {"db": 3},
    "redis://h?virtual_host=1": {"db": 1},
    "redis://h/?virtual_host=/1": {"db": 1},
    "redis://h?db=4": {"db": 4},
    "valkey://h/1": {"host": "h", "db": 1},
    "redis+socket:///run/r.sock?virtual_host=2": {"path": "/run/r.sock", "db": 2},
    "socket:///run/r.sock": {"path": "/run/r.sock", "db": 0},
    "unix://u:hunter2@/run/r@1.sock?db=1": {"path": "/run/r@1.sock", "password": "hunter2"},
    "rediss://h?ssl_cert_reqs=CERT_NONE": {"ssl_cert_reqs": "none"},
    "rediss://h?ssl_cert_reqs=CERT_OPTIONAL": {"ssl_cert_reqs": "optional"},
    "rediss://h?ssl_cert_reqs=required&ssl_check_hostname=false": {
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": False,
    },
    "redis://h?health_check_interval=5&retry_on_timeout=yes&socket_timeout=1": {
        "health_check_interval": 5,
        "retry_on_timeout": True,
        "socket_timeout": 1.0,
    },
    # With a longer timeout leases would expire while the client waits.
    "redis://h?socket_timeout=120": {"socket_timeout": 2.0},
    "redis://h?max_connections=3&visibility_timeout=7200": {"db": 0},
    "sentinel://:hunter2@h:1;sentinel://h2:2/0?master_name=leases": {"db": 0, "password": SECRET},
    "sentinel://h:1;h2:2/leases/3": {"db": 3},
    "SENTINEL://h:1/leases/3": {"db": 3},
    "sentinel://u:hunter%3B2%2C@h:1/leases": {"username": "u", "password": "hunter;2,"},
    "rediss://h?ssl_cert_reqs=cert_none": {"ssl_cert_reqs": "none", "ssl_check_hostname": False},
    "rediss://h?ssl_cert_reqs=Cert_Required": {"ssl_cert_reqs": "required"},
    "rediss://h?ssl_cert_reqs=SSL.CERT_NONE": {"ssl_cert_reqs": "none"},
    "rediss://h?ssl_cert_reqs=VerifyMode.CERT_OPTIONAL": {"ssl_cert_reqs": "optional"},
    "rediss://h?ssl_min_version=TLSv1.2": {"ssl_min_version": 771},
    "rediss://h?ssl_min_version=772": {"ssl_min_version": 772},
    "sentinel://h,[::1]:5/leases?sentinel_password=x&socket_timeout=1": {"socket_timeout": 1.0},
}


@pytest.mark.parametrize("url", LEASES)
def test_celerys_redis_urls_are_accepted(url: str) -> None:
    found = pool_of(url).connection_kwargs
    assert {name: found.get(name) for name in LEASES[url]} == LEASES[url]


def test_all_sentinels_of_a_celery_url_are_asked() -> None:
    pool = pool_of("sentinel://h:1;sentinel://:hunter2@h2;sentinel://[::1]:3/0?master_name=leases")
    assert pool.service_name == "leases"
    asked = [each.connection_pool.connection_kwargs for each in pool.sentinel_manager.sentinels]
    assert [(each["host"], each["port"]) for each in asked] == [
        ("h", 1),
        ("h2", 26379),
        ("::1", 3),
    ]


class Credentials(redis.CredentialProvider):
    def get_credentials(self) -> tuple[str]:
        return (SECRET,)


def test_a_credential_provider_in_the_url_is_created() -> None:
    pool = pool_of(f"redis://h?credential_provider={__name__}.Credentials")
    assert isinstance(pool.connection_kwargs["credential_provider"], Credentials)


REFUSED_LEASES = {
    "h:6379": "it takes redis://",
    "memcached://u:hunter2@h": "'memcached://…' is not supported; it takes redis://",
    "redis://:pa/hunter2@h/0": "%2F",
    "redis://:pa#hunter2@h/0": "%23",
    "redis://:pa?hunter2@h/0": "%3F",
    "redis://:pa@x/hunter2@h/0": "%40",
    "redis://:hunter2@h:port/0": "not a URL",
    "redis://:hunter2@h:99999/0": "not a URL",
    "redis://[::1/0": "not a URL",
    "redis://:hunter2@h/zero": "the database is a number",
    "redis://:hunter2@h/1/2": "the database is a number",
    "redis://h/1?virtual_host=2": "several databases",
    "redis://h?ssl_cert_reqs=CERT_NONE": "write rediss://",
    "rediss://h?ssl_cert_reqs=never": "'ssl_cert_reqs' is not allowed",
    "rediss://h?ssl_ca_certs=/no/ca": "no file '/no/ca'",
    "redis://h?socket_timeout=soon": "'socket_timeout' is not allowed",
    **{
        f"redis://h?socket_timeout={wrong}": "socket_timeout takes a number of seconds"
        for wrong in ("-1", "0", "nan", "inf")
    },
    "redis://h?socket_connect_timeout=0": "socket_connect_timeout takes a number of seconds",
    "redis://h?socket_read_size=-1": "socket_read_size takes a whole number",
    "redis://h?protocol=4": "protocol takes a whole number, from 2 to 3",
    "redis://h?client_name=a%20b": "client_name takes a text without blanks",
    "redis://h?retry_on_timeout=maybe": "retry_on_timeout takes true or false",
    "redis://h?credential_provider=os.getcwd": "credential_provider takes the name of a class",
    "redis://:hunter2@h?credential_provider=tests.unit.store.test_urls.Credentials": "no password",
    "redis://h?client_name=a&client_name=b": "'client_name' is given twice",
    "redis://h/99999999999999999999999": "the database is a number",
    "redis://:hunter2@a..b/0": "name of a host",
    "redis://:hunter2@h%00x/0": "the host has a NUL",
    "redis://:hunter2%00@h/0": "the password has a NUL",
    "redis://h?client_name=%00": "'client_name' has a NUL",
    "unix:///run/a%00b": "the path has a NUL",
    "unix://nowhere.sock": "write unix:///path",
    "redis+socket://tmp/x.sock": "write unix:///path",
    **{
        f"rediss://h?ssl_cert_reqs={wrong}": "none, optional or required"
        for wrong in ("0", "false", "CERT_")
    },
    "rediss://h?ssl_min_version=1": "ssl_min_version takes TLSv1_2",
    "rediss://h?ssl_certfile=/etc/passwd": "ssl_certfile takes a file with a certificate",
    "rediss://h?ssl_keyfile=/etc/passwd": "the key of ssl_certfile, which is missing",
    "rediss://h?ssl_ca_certs=/etc/passwd": "ssl_ca_certs takes a file with certificates",
    "rediss://h?ssl_ca_path=/etc/passwd": "ssl_ca_path takes a folder",
    "rediss://h?ssl_ca_data=hunter2": "ssl_ca_data takes certificates",
    "rediss://h?ssl_ciphers=abc": "ssl_ciphers takes ciphers",
    "redis://h?socket_timeou=1": "did you mean socket_timeout",
    "redis://h?foo=hunter2&password=hunter2": "does not know the option 'foo'",
    "redis://h?decode_responses=false": "decode_responses",
    "redis://h?credential_provider=no.such:thing": "credential_provider",
    "sentinel://:hunter2@h:26379;sentinel://h2:26379": "name of the master is missing",
    "sentinel://h:26379/0": "name of the master is missing",
    "sentinel://:hunter2@h:port/leases": "not a URL",
    "sentinel://h/leases/zero": "the database is a number",
    "sentinel://h/one;sentinel://h/two": "different masters",
    "sentinel://h/leases?foo=1": "'foo'",
    "sentinel://:hunter2;x@h:1/leases": "; and , as %3B and %2C",
    "sentinel://hunter2;x@h:1/leases": "; and , as %3B and %2C",
    "sentinel://u:hunter2,x@h:1/leases": "; and , as %3B and %2C",
    "sentinel://,/m/0": "not a URL that can be read",
    "sentinel:///m/0": "not a URL that can be read",
    "sentinel://h:99999/m/0": "not a URL that can be read",
    "sentinel://::1/m/0": r"\[::1\]",
    "sentinel://a..b/m/0": "name of a host",
    "sentinel://h/m?ssl_cert_reqs=none": "add ssl=true",
    "sentinel://h/m?ssl=maybe": "ssl takes true or false",
}


@pytest.mark.parametrize("url", REFUSED_LEASES)
def test_a_wrong_lease_url_is_one_line_without_its_password(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=REFUSED_LEASES[url]) as caught:
        pool_of(url)
    assert str(caught.value).startswith("singleton_lease_url")
    is_one_line_without_secret(caught.value)


def settings(**conf: Any) -> Settings:
    app = Celery("shop", set_as_current=False)
    app.conf.update(conf)
    return Settings.from_app(app)


def test_a_sqlalchemy_url_object_is_accepted() -> None:
    url = make_url("postgresql://u:hunter2@h/db")
    found = settings(singleton_store_url=url, singleton_lease_url="redis://:hunter2@h")
    assert found.store_url == "postgresql://u:hunter2@h/db"
    assert SECRET not in repr(found)


@pytest.mark.parametrize("value", [b"postgresql://u:hunter2@h/db", {"url": SECRET}, [SECRET + "@"]])
def test_a_url_setting_of_another_type_is_not_shown(value: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match="singleton_store_url='…'") as caught:
        settings(singleton_store_url=value)
    is_one_line_without_secret(caught.value)


def test_celery_hides_the_urls() -> None:
    """``celery report`` prints ``app.conf.humanize()``, and ``celery inspect conf`` sends
    ``app.conf.table()``. Both hide the URLs, with and without a namespace such as Django's.
    """

    class DjangoSettings:
        CELERY_SINGLETON_STORE_URL = "postgresql://u:hunter2@h/db?password=hunter2"
        CELERY_SINGLETON_LEASE_URL = "sentinel://h:1;sentinel://:hunter2@h2:2"
        CELERY_SINGLETON_TABLE = "seen"

    by_namespace = Celery("shop", set_as_current=False)
    by_namespace.config_from_object(DjangoSettings, namespace="CELERY")
    plain = Celery("shop", set_as_current=False)
    plain.conf.singleton_store_url = make_url("postgresql://u:hunter2@h/db")
    plain.conf.update(singleton_lease_url="redis://:hunter2@h", singleton_table="seen")
    for app in (by_namespace, plain):
        text = app.conf.humanize() + repr(app.conf.table())
        assert SECRET not in text
        assert text.count("********") == 4
        assert "seen" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("singleton_store_url", {"url": "postgresql://u:hunter2@h/db"}),
        ("singleton_store_url", {"host": {"deep": "hunter2"}}),
        ("singleton_store_uri", "postgresql://u:hunter2@h/db"),
        ("singleton_lease_dsn", ["redis://:hunter2@h"]),
        ("SINGLETON_STORE", "postgresql://u:hunter2@h/db"),
    ],
)
def test_celery_hides_wrong_settings_that_may_have_a_password(name: str, value: Any) -> None:
    """``celery report`` needs no worker, so it shows settings that a worker would refuse at its
    start.
    """
    app = Celery("shop", set_as_current=False)
    app.conf.update({name: value, "singleton_lease_ttl": 7})
    text = app.conf.humanize() + repr(app.conf.table())
    assert SECRET not in text
    assert name in text
    assert "7" in text


def test_psycopg_refuses_an_unknown_option() -> None:
    """The package refuses unknown options before it connects. This test shows that psycopg would,
    too.
    """
    with pytest.raises(psycopg.ProgrammingError, match="invalid connection option"):
        psycopg.connect("", charset="utf8")


@pytest.mark.parametrize("version", ["3.1.20", "3.2.13"])
def test_a_psycopg_that_never_times_out_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 3.3, psycopg waits for ever for a server that does not answer."""
    monkeypatch.setattr(psycopg, "__version__", version)
    with pytest.raises(ImproperlyConfigured, match=rf"psycopg {version} .*3\.3 or later"):
        make_engine(parse_url("postgresql://h/db"), 2.0)
