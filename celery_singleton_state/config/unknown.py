"""Names that look like settings of this package and are none, so that they would do nothing."""

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
#: Variables that Kubernetes gives to each pod for a service that is called celery-singleton….
_OF_KUBERNETES = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT(_\d+_[A-Z]+(_\w+)?)?$")
#: Settings of another package, which can run beside this one while tasks move from it.
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
    """Refuse names of settings that are mistyped, in the app's configuration and the environment.

    :param known: the settings that there are.
    :raises ImproperlyConfigured: there is such a name. Its value is not shown: it can be a URL.
    """
    for written, name in (*_configured(app), *_in_environment()):
        if name not in known:
            own = {each.removeprefix(_PREFIX): each for each in known}
            near = get_close_matches(name.lower().removeprefix(_PREFIX), own, n=3)
            meant = " or ".join(own[each] for each in near)
            hint = f"did you mean {meant}?" if near else f"there are {', '.join(known)}"
            raise ImproperlyConfigured(f"app {app.main!r}: {written} is no setting; {hint}")


def _configured(app: Celery) -> Iterator[tuple[str, str]]:
    """Names as they are written, and as the app's configuration without a namespace has them."""
    configured = app.conf.table(censored=False)
    namespace = (app.conf.prefix or "").lower()
    for key, value in configured.items():
        if namespace and key.lower().startswith(namespace):
            name = key.lower().removeprefix(namespace)
        elif namespace and not key.islower():
            continue  # Django's own, for example
        else:
            name = key
        # A module that is the configuration can import or define functions and tasks.
        if name.lower().startswith(_PREFIX) and not (
            callable(value) or isinstance(value, ModuleType) or _is_of_another(name)
        ):
            yield key, name


def _in_environment() -> Iterator[tuple[str, str]]:
    for key in os.environ:
        if key.startswith(_ENVIRONMENT) and not _OF_KUBERNETES.search(key):
            yield key, key.removeprefix("CELERY_").lower()


def _is_of_another(name: str) -> bool:
    return name in _OF_CELERY_SINGLETON and "celery_singleton" in sys.modules
