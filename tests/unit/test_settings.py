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


def test_a_namespace_as_django_uses_it() -> None:
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
