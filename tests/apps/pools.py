"""A user's own subclasses of Celery's pools, which ``CELERY_CUSTOM_WORKER_POOL`` can name."""

from __future__ import annotations

from celery.concurrency import gevent, prefork, solo


class Prefork(prefork.TaskPool):  # type: ignore[misc]  # untyped
    pass


class Solo(solo.TaskPool):  # type: ignore[misc]  # untyped
    pass


class Gevent(gevent.TaskPool):  # type: ignore[misc]  # untyped
    pass
