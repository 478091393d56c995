"""The ``singleton_…`` settings of an app: read, checked, and what follows from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL

from celery_singleton_state.hooks.door import check_hook
from celery_singleton_state.text.urls import hide_settings, shown

hide_settings()

NO_SQL = (
    "singleton_lease_url keeps the leases of singletons without a state; a state, and the schedule "
    "of beat, need a database: set singleton_store_url as well"
)
MAX_THRESHOLD = 5
MIN_INTERVAL = 0.1


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text that is not empty")
    return value


def _url(value: Any) -> str:
    return _text(value.render_as_string(hide_password=False) if isinstance(value, URL) else value)


def _beat_name(value: Any) -> str:
    if not isinstance(value, str) or not value or ":" in value:
        raise ValueError("a text that is not empty and has no colon")
    return value


def _number(least: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if isinstance(value, bool) or not least <= number < float("inf"):
            raise ValueError(f"a number of seconds, {least:g} or more")
        return number

    return check


def _whole(least: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        text = str(value)
        if isinstance(value, bool) or not text.isdecimal() or int(text) < least:
            raise ValueError(f"a whole number, {least} or more")
        return int(text)

    return check


def _threshold(value: Any) -> int:
    return min(_whole(0)(value) or 1, MAX_THRESHOLD)


def _switch(value: Any) -> bool | None:
    names = {"1": True, "true": True, "yes": True, "on": True}
    names |= {"0": False, "false": False, "no": False, "off": False}
    if value is None or isinstance(value, bool):
        return value
    try:
        return names[str(value).lower()]
    except KeyError:
        raise ValueError("True or False") from None


def _hooks(value: Any) -> tuple[Any, ...]:
    """From the environment: names with commas between them."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        raise ValueError("a list of callables, or of the names of some")
    return tuple(check_hook(name.strip() if isinstance(name, str) else name) for name in names)


@dataclass(frozen=True)
class Settings:
    """The settings of one app, as ``app.conf.singleton_<name>``.

    Each can also stand in the environment as ``CELERY_SINGLETON_<NAME>``, which wins, as
    ``CELERY_BROKER_URL`` does.
    """

    store_url: str = field(default="sqlite:///celery-singletons.db", repr=False)
    lease_url: str | None = field(default=None, repr=False)
    table: str = "kv_store"
    key_prefix: str = "singleton-state:"
    heartbeat_interval: float = 4.0
    heartbeat_threshold: int = 2
    conflict_timeout: float = 10.0
    startup_grace: float = 60.0
    consumer_timeout: float = 1800.0
    history: int = 16
    auto_migrate: bool | None = None
    beat_name: str = ""
    hooks: tuple[Any, ...] = ()

    #: Whether there is a database: not where only ``lease_url`` is set.
    has_store: bool = field(default=True, repr=False)

    @property
    def lease_ttl(self) -> float:
        """Seconds that a lease lives without a renewal."""
        return self.heartbeat_interval * self.heartbeat_threshold

    @classmethod
    def from_app(cls, app: Celery) -> Settings:
        """Read and check the settings of an app.

        :raises ImproperlyConfigured: names the setting, its value and what is allowed.
        """
        found = {}
        for own, check in _CHECKS.items():
            name = f"singleton_{own}"
            value = os.environ.get(f"CELERY_{name.upper()}", app.conf.get(name))
            if value is not None:
                found[own] = _checked(app, name, value, check)
        found["has_store"] = "store_url" in found or "lease_url" not in found
        # The app's own name keeps apart those that share a table.
        found.setdefault("beat_name", (app.main or "celery").replace(":", "."))
        return cls(**found)


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "store_url": _url,
    "lease_url": _url,
    "table": _text,
    "key_prefix": _text,
    "heartbeat_interval": _number(MIN_INTERVAL),
    "heartbeat_threshold": _threshold,
    "conflict_timeout": _number(0),
    "startup_grace": _number(0),
    "consumer_timeout": _number(0),
    "history": _whole(1),
    "auto_migrate": _switch,
    "beat_name": _beat_name,
    "hooks": _hooks,
}


def _checked(app: Celery, name: str, value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except ValueError as error:
        text = shown(value) if check is _url else repr(value)
        raise ImproperlyConfigured(
            f"app {app.main!r}: setting {name}={text} is not allowed; it takes {error}"
        ) from None
