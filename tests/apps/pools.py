"""Pools of users' own, as ``CELERY_CUSTOM_WORKER_POOL`` names them."""

from __future__ import annotations

from celery.concurrency import gevent, prefork, solo


class Prefork(prefork.TaskPool):  # type: ignore[misc]  # untyped
    pass


class Solo(solo.TaskPool):  # type: ignore[misc]  # untyped
    pass


class Gevent(gevent.TaskPool):  # type: ignore[misc]  # untyped
    pass
