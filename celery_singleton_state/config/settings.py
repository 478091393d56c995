"""Read and check the ``singleton_…`` settings of an app."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Any

from celery import Celery
from sqlalchemy import URL

from celery_singleton_state.hooks.dispatcher import check_hook
from celery_singleton_state.keys import KEY_PREFIX
from celery_singleton_state.text.urls import hide_settings, shown

from .checks import Check, checked, checks_of, parsed, seconds, switch, text, whole
from .unknown import refuse_unknown

hide_settings()

#: The text of the error for a task, a beat or a command that needs a database, in an app that only
#: has a ``singleton_lease_url``.
NO_SQL = (
    "singleton_lease_url only keeps the leases of singletons without state; states, and the "
    "schedule of beat, need a database: set singleton_store_url as well"
)
#: The largest ``singleton_heartbeat_threshold``. A larger setting is not refused, but lowered to
#: this number.
MAX_THRESHOLD = 5
#: The shortest ``singleton_heartbeat_interval``, and the shortest ``lease_ttl`` of a task, in
#: seconds.
MIN_INTERVAL = 0.1


_SWITCHES = {"1": True, "true": True, "yes": True, "on": True}
_SWITCHES |= {"0": False, "false": False, "no": False, "off": False}


def _url(value: Any) -> str:
    url = value.render_as_string(hide_password=False) if isinstance(value, URL) else value
    if not isinstance(url, str) or not url:
        raise ValueError("a text that is not empty")
    return url


def _beat_name(value: Any) -> str:
    # Refuse a colon, because the name becomes a part of keys, and colons separate the parts of a
    # key. Allow characters that a database cannot store, because they are encoded in keys.
    if not isinstance(value, str) or not value or ":" in value:
        raise ValueError("a text that is not empty and has no colon")
    return value


def _seconds(least: float) -> Check[float]:
    return parsed(float, seconds(least))


def _whole(least: int) -> Check[int]:
    return parsed(int, whole(least))


def _threshold(value: Any) -> int:
    return min(_whole(0)(value) or 1, MAX_THRESHOLD)


def _switch(value: Any) -> bool:
    return switch(_SWITCHES.get(str(value).lower(), value))


def _hooks(value: Any) -> tuple[Any, ...]:
    """Check the ``singleton_hooks`` setting.

    The setting is a list of callables or of names of callables. In an environment variable it is a
    text: the names, separated by commas.
    """
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        raise ValueError("a list of callables, or of the names of callables")
    return tuple(check_hook(name.strip() if isinstance(name, str) else name) for name in names)


@dataclass(frozen=True)
class Settings:
    """The settings of one app. The field ``<name>`` is the setting ``app.conf.singleton_<name>``.

    The environment variable ``CELERY_SINGLETON_<NAME>`` takes precedence over ``app.conf``, as
    Celery's own ``CELERY_BROKER_URL`` does.
    """

    store_url: Annotated[str, _url] = field(default="sqlite:///celery-singletons.db", repr=False)
    lease_url: Annotated[str | None, _url] = field(default=None, repr=False)
    table: Annotated[str, text] = "kv_store"
    key_prefix: Annotated[str, text] = KEY_PREFIX
    heartbeat_interval: Annotated[float, _seconds(MIN_INTERVAL)] = 4.0
    heartbeat_threshold: Annotated[int, _threshold] = 2
    conflict_timeout: Annotated[float, _seconds(0)] = 10.0
    startup_grace: Annotated[float, _seconds(0)] = 60.0
    consumer_timeout: Annotated[float, _seconds(0)] = 1800.0
    history: Annotated[int, _whole(1)] = 16
    auto_migrate: Annotated[bool | None, _switch] = None
    beat_name: Annotated[str, _beat_name] = ""
    hooks: Annotated[tuple[Any, ...], _hooks] = ()

    #: Whether the app has a database. False only if ``lease_url`` is set and ``store_url`` is not.
    has_store: bool = field(default=True, repr=False)

    @property
    def lease_ttl(self) -> float:
        """The life of a lease, in seconds, if its task does not set ``lease_ttl``."""
        return self.heartbeat_interval * self.heartbeat_threshold

    @classmethod
    def from_app(cls, app: Celery) -> Settings:
        """Read and check the settings of an app.

        :raises ImproperlyConfigured: a value is not allowed, or a setting does not exist. The error
            names the setting, the value and what is allowed.
        """
        refuse_unknown(app, [f"singleton_{own}" for own in _CHECKS])
        found = {}
        for own, check in _CHECKS.items():
            name = f"singleton_{own}"
            value = os.environ.get(f"CELERY_{name.upper()}", app.conf.get(name))
            if value is not None:
                show = shown if check is _url else repr
                found[own] = checked(f"app {app.main!r}", f"setting {name}", value, check, show)
        found["has_store"] = "store_url" in found or "lease_url" not in found
        # The default of beat_name is the app's name, so that the beats of two apps can share a
        # table.
        found.setdefault("beat_name", (app.main or "celery").replace(":", "."))
        return cls(**found)


_CHECKS = checks_of(Settings)
