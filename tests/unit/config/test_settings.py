import sys
import types
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.config.settings import Settings


def settings(**conf: Any) -> Settings:
    app = Celery("shop", set_as_current=False)
    app.conf.update(conf)
    return Settings.from_app(app)


def test_defaults() -> None:
    found = settings()
    assert found == Settings(beat_name="shop")
    assert found.store_url == "sqlite:///celery-singletons.db"
    assert (found.heartbeat_interval, found.heartbeat_threshold, found.lease_ttl) == (4, 2, 8)


@pytest.mark.parametrize(("given", "clamped"), [(0, 1), (1, 1), (5, 5), (9, 5), ("3", 3)])
def test_the_threshold_is_clamped(given: Any, clamped: int) -> None:
    assert settings(singleton_heartbeat_threshold=given).heartbeat_threshold == clamped


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_SINGLETON_TABLE", "from_env")
    monkeypatch.setenv("CELERY_SINGLETON_HEARTBEAT_INTERVAL", "0.5")
    monkeypatch.setenv("CELERY_SINGLETON_AUTO_MIGRATE", "off")
    found = settings(singleton_table="from_conf")
    assert (found.table, found.heartbeat_interval, found.auto_migrate) == ("from_env", 0.5, False)


def test_beats_are_named_after_their_app() -> None:
    app = Celery("shop:eu", set_as_current=False)
    assert Settings.from_app(app).beat_name == "shop.eu"
    app.conf.singleton_beat_name = "nightly"
    assert Settings.from_app(app).beat_name == "nightly"
    app.conf.singleton_beat_name = "shop:eu"
    with pytest.raises(ImproperlyConfigured, match=r"singleton_beat_name='shop:eu'.*no colon"):
        Settings.from_app(app)


def test_settings_are_found_in_a_namespace() -> None:
    class DjangoSettings:
        CELERY_SINGLETON_TABLE = "in_django"

    app = Celery("shop", set_as_current=False)
    app.config_from_object(DjangoSettings, namespace="CELERY")
    assert Settings.from_app(app).table == "in_django"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("store_url", "", "a text"),
        ("store_url", 7, "a text"),
        ("table", "", "a text"),
        ("heartbeat_interval", 0, "0.1 or more"),
        ("heartbeat_interval", "often", "a number of seconds"),
        ("heartbeat_interval", float("nan"), "a number of seconds"),
        ("heartbeat_interval", True, "a number of seconds"),
        ("heartbeat_threshold", -1, "a whole number"),
        ("heartbeat_threshold", 1.5, "a whole number"),
        ("history", 0, "1 or more"),
        ("auto_migrate", "perhaps", "True or False"),
    ],
)
def test_wrong_values_name_setting_value_and_what_is_allowed(
    name: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        settings(**{f"singleton_{name}": value})
    message = str(caught.value)
    assert f"singleton_{name}={value!r}" in message
    assert allowed in message
    assert "'shop'" in message


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("singleton_store_uri", "singleton_store_url"),
        ("singleton_lease_urls", "singleton_lease_url"),
        ("singleton_heartbeat_intervall", "singleton_heartbeat_interval"),
        ("SINGLETON_TABLE", "singleton_table"),
        ("singleton_colour", "the settings are singleton_store_url"),
    ],
)
def test_unknown_settings_are_refused_with_did_you_mean(name: str, near: str) -> None:
    with pytest.raises(
        ImproperlyConfigured, match=rf"'shop': {name} is not a setting;.*{near}"
    ) as why:
        settings(**{name: "postgresql://u:hunter2@h/db"})
    assert "hunter2" not in str(why.value)


def test_unknown_settings_in_the_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that Kubernetes sets for a service called ``celery-singleton...`` are ignored."""
    for name in (
        "CELERY_SINGLETON_EXPORTER_SERVICE_HOST",
        "CELERY_SINGLETON_EXPORTER_SERVICE_PORT_HTTP",
        "CELERY_SINGLETON_PORT",
        "CELERY_SINGLETON_PORT_9808_TCP",
        "CELERY_SINGLETON_PORT_9808_TCP_ADDR",
    ):
        monkeypatch.setenv(name, "tcp://10.0.0.1:9808")
    settings()
    monkeypatch.setenv("CELERY_SINGLETON_STORE_URI", "hunter2")
    with pytest.raises(
        ImproperlyConfigured, match=r"CELERY_SINGLETON_STORE_URI.*singleton_store_url"
    ):
        settings()


def test_names_that_are_no_celery_settings_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three kinds of names are ignored: Django's settings outside of Celery's namespace; functions
    and tasks of a configuration module; and settings of celery-singleton, if this package is
    installed, too.
    """

    class DjangoSettings:
        SINGLETON_COLOUR = "red"
        CELERY_SINGLETON_TABLE = "in_django"

    app = Celery("shop", set_as_current=False)
    app.config_from_object(DjangoSettings, namespace="CELERY")
    assert Settings.from_app(app).table == "in_django"
    app.conf.singleton_tabel = "t"
    with pytest.raises(ImproperlyConfigured, match="did you mean singleton_table"):
        Settings.from_app(app)

    assert settings(singleton_nightly=lambda: None, singleton_table="t").table == "t"

    with pytest.raises(ImproperlyConfigured, match="singleton_lock_expiry is not a setting"):
        settings(singleton_lock_expiry=5)
    monkeypatch.setitem(sys.modules, "celery_singleton", types.ModuleType("celery_singleton"))
    settings(singleton_lock_expiry=5)
