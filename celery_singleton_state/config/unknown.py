"""Refuse settings that do not exist, because a mistyped setting would silently have no effect."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from types import ModuleType

from celery import Celery
from celery.exceptions import ImproperlyConfigured

_PREFIX = "singleton_"
_ENVIRONMENT = "CELERY_SINGLETON_"
#: Matches the names of environment variables that Kubernetes sets in each pod if the name of a
#: service begins with celery-singleton. These variables are not settings.
_OF_KUBERNETES = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT(_\d+_[A-Z]+(_\w+)?)?$")
#: Settings of another package, celery-singleton. They are not refused while that package is
#: imported, because a project that moves to this package may use both packages for a time.
_OF_CELERY_SINGLETON = frozenset(
    {
        "singleton_backend_class",
        "singleton_backend_kwargs",
        "singleton_backend_url",
        "singleton_json_serializer",
        "singleton_lock_expiry",
        "singleton_raise_on_duplicate",
    }
)


def refuse_unknown(app: Celery, known: Collection[str]) -> None:
    """Refuse unknown ``singleton_`` settings in the app's configuration and the environment.

    :param known: the names of all settings.
    :raises ImproperlyConfigured: a setting is unknown. The error does not show its value, because
        the value can be a URL with a password.
    """
    for written, name in (*_configured(app), *_in_environment()):
        if name not in known:
            own = {each.removeprefix(_PREFIX): each for each in known}
            near = get_close_matches(name.lower().removeprefix(_PREFIX), own, n=3)
            meant = " or ".join(own[each] for each in near)
            hint = f"did you mean {meant}?" if near else f"the settings are {', '.join(known)}"
            raise ImproperlyConfigured(f"app {app.main!r}: {written} is not a setting; {hint}")


def _configured(app: Celery) -> Iterator[tuple[str, str]]:
    """Yield two names of each ``singleton_`` setting in an app's configuration.

    The first name is the name as the user has written it. The second name lacks the namespace, the
    prefix that was given to Celery's ``config_from_object``, such as ``CELERY_``.
    """
    configured = app.conf.table(censored=False)
    namespace = (app.conf.prefix or "").lower()
    for key, value in configured.items():
        if namespace and key.lower().startswith(namespace):
            name = key.lower().removeprefix(namespace)
        elif namespace and not key.islower():
            continue  # a setting of another package, such as Django
        else:
            name = key
        # Leave out functions, tasks and modules. A module that is used as the configuration can
        # contain them, and they are not settings.
        if name.lower().startswith(_PREFIX) and not (
            callable(value) or isinstance(value, ModuleType) or _is_of_celery_singleton(name)
        ):
            yield key, name


def _in_environment() -> Iterator[tuple[str, str]]:
    for key in os.environ:
        if key.startswith(_ENVIRONMENT) and not _OF_KUBERNETES.search(key):
            yield key, key.removeprefix("CELERY_").lower()


def _is_of_celery_singleton(name: str) -> bool:
    return name in _OF_CELERY_SINGLETON and "celery_singleton" in sys.modules
