"""Checks that workers and beats make at their start: whether the store can guard the singletons."""

from __future__ import annotations

import logging

from celery import Celery
from celery.exceptions import ImproperlyConfigured

from .compat import transport_of
from .config.options import options_of
from .config.settings import NO_SQL
from .runtime import Runtime
from .store.sql.url import parse_url
from .text.urls import shown_url
from .text.visible import logger_of

logger = logger_of(__name__)

#: Host names in a broker's URL that stand for this host. Such a broker usually serves no other
#: host.
LOCAL_HOSTS = ("", "localhost", "127.0.0.1", "::1")
#: Names of kombu's transports that need no broker server. Their messages are usually in this
#: process or in files of this host, so all workers are on this host.
LOCAL_TRANSPORTS = ("memory", "filesystem", "sqlalchemy", "sqla")


def refuse_states_without_store(own: Runtime) -> None:
    """Refuse an app whose tasks have states, but which has no database to keep the states in.

    :raises ImproperlyConfigured: a task has a ``state_schema``, and the app has no SQL store.
    """
    if own.settings.has_store:
        return
    for name, task in own.app.tasks.items():
        options = options_of(task)
        if options is not None and options.state_schema is not None:
            raise ImproperlyConfigured(f"task {name} has a state_schema: {NO_SQL}")


def warn_of_single_host(app: Celery, url: str) -> None:
    """Log that SQLite guards the workers of one host only.

    The log level is WARNING if the broker may serve several hosts, and otherwise INFO.

    :param url: the URL of the app's store. Nothing is logged for other databases.
    """
    if parse_url(url).get_backend_name() != "sqlite":
        return
    broker = app.connection_for_read()
    local = transport_of(broker) in LOCAL_TRANSPORTS or (broker.hostname or "") in LOCAL_HOSTS
    logger.log(
        logging.INFO if local else logging.WARNING,
        "singletons are guarded by %s: only among workers that open this same file; "
        "set singleton_store_url for workers on several hosts",
        shown_url(parse_url(url)),
    )
