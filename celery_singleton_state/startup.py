"""What workers and beats see to when they start: that there is a store, and whom it guards."""

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

LOCAL_HOSTS = ("", "localhost", "127.0.0.1", "::1")
#: Transports whose broker is a file or this process.
LOCAL_TRANSPORTS = ("memory", "filesystem", "sqlalchemy", "sqla")


def refuse_states_without_store(own: Runtime) -> None:
    """:raises ImproperlyConfigured: a task has a state, and there is no database for it."""
    if own.settings.has_store:
        return
    for name, task in own.app.tasks.items():
        options = options_of(task)
        if options is not None and options.state_schema is not None:
            raise ImproperlyConfigured(f"task {name} has a state_schema: {NO_SQL}")


def warn_of_single_host(app: Celery, url: str) -> None:
    """Say that SQLite guards one host; loudly where the broker may serve several."""
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
