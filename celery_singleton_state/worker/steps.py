"""What a worker does for its singletons when it starts: see that they can run, or say why not."""

from __future__ import annotations

import atexit
import contextlib
import os
from typing import Any

import click
from celery import Celery, bootsteps, signals
from celery.concurrency import get_implementation
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state import compat, runtime
from celery_singleton_state.config.options import expected_singletons
from celery_singleton_state.hooks import events
from celery_singleton_state.keys import row_key
from celery_singleton_state.lease.renewal_slots import mark_as_parent
from celery_singleton_state.message.content import note_content
from celery_singleton_state.message.dropped import watch_for_dropped
from celery_singleton_state.message.place import note_arrival
from celery_singleton_state.recovery import free_dead
from celery_singleton_state.startup import refuse_states_without_store, warn_of_single_host
from celery_singleton_state.store.base import StoreError, StoreNotReady
from celery_singleton_state.store.sql.engine import is_in_memory
from celery_singleton_state.store.sql.url import parse_url
from celery_singleton_state.text.visible import logger_of

from .child_watch import watch_pool
from .consumer_timeout import ConsumerTimeoutStep
from .parent_renewal import ParentRenewal

logger = logger_of(__name__)


class Refused(ImproperlyConfigured, click.ClickException):
    """A worker cannot start. `celery worker` prints an error of click as one line."""

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)

    def format_message(self) -> str:
        return f"{ImproperlyConfigured.__name__}: {self.message}"


class SingletonStep(bootsteps.StartStopStep):
    """Checks settings, store and table in the worker, before the pool's processes are made.

    What is wrong with the configuration or the table ends the worker with a message that says
    what to do. A store that is out of reach does not: its runs are retried.
    """

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        app: Celery = parent.app
        try:
            self.check(parent)
        except ImproperlyConfigured as error:
            raise Refused(str(error)) from error
        watch_for_dropped()
        signals.task_received.connect(note_arrival)
        signals.task_received.connect(note_content)
        events.follow(parent.hostname)
        # A pool of processes must not inherit connections; one of threads opens them anew.
        free_dead(runtime.runtime_of(app))
        runtime.close_runtime(app)
        if is_prefork(parent):
            mark_as_parent()

    def check(self, worker: Any) -> None:
        """:raises ImproperlyConfigured: the worker's singletons could not run."""
        warn_of_eventlet(worker)
        own = runtime.runtime_of(worker.app)
        refuse_states_without_store(own)
        try:
            own.check()
        except StoreNotReady as error:
            raise ImproperlyConfigured(str(error)) from error
        except StoreError as error:
            logger.error("singletons: the store cannot be reached, runs will be retried: %s", error)
        else:
            self.expect(own)
        url = own.settings.store_url
        if not own.settings.has_store:
            return
        if is_in_memory(parse_url(url)) and is_prefork(worker):
            raise ImproperlyConfigured(
                "singleton_store_url='memory://' guards the threads of one process only; "
                "use --pool=solo or --pool=threads, or a store that processes share"
            )
        warn_of_single_host(worker.app, url)

    @staticmethod
    def expect(own: runtime.Runtime) -> None:
        """Note since when those singletons are waited for that should run now and then."""
        names = expected_singletons(own.app)
        tasks = {row_key(own.settings.key_prefix, name): name for name in names}
        try:
            for store, keys in own.by_store(tasks):
                store.requests.expect({key: tasks[key] for key in keys})
        except StoreError as error:
            logger.warning("singletons: health begins with the first runs: %s", error)


class ConnectionsStep(bootsteps.StartStopStep):
    """Lets a worker's own process have a connection for each body that it can run at once.

    That number can grow: by ``--autoscale``, and by the remote control's ``pool_grow``.
    """

    requires = ("celery.worker.components:Pool",)

    def include_if(self, parent: Any) -> bool:
        return not is_prefork(parent)

    def start(self, parent: Any) -> None:
        runtime.allow_connections(bodies_at_once(parent) + 1)
        compat.before_growth(parent.pool, lambda bodies: runtime.allow_connections(bodies + 1))


class ChildrenStep(bootsteps.StartStopStep):
    """Renews what the pool's processes hold; frees what a dead one held, and has the pool replace
    it at once.
    """

    requires = ("celery.worker.components:Pool",)

    def include_if(self, parent: Any) -> bool:
        return is_prefork(parent)

    def start(self, parent: Any) -> None:
        self._app: Celery = parent.app
        self._deaths, self._report = os.pipe()
        # Without an event loop nobody reads it, and one report is as good as many.
        os.set_blocking(self._report, False)
        # After the pool's end, however the worker ends.
        atexit.register(watch_pool(compat.process_pool(parent), self._on_death).close)
        ParentRenewal(parent.app, lambda: compat.processes_of(parent)).start()

    def register_with_event_loop(self, parent: Any, hub: Any) -> None:
        """Called by Celery whenever its event loop starts."""
        pool = compat.process_pool(parent)
        compat.call_when_readable(hub, self._deaths, self._maintain, pool)

    def _on_death(self, pid: int) -> None:
        # The pool's own look at it can come a moment too early, and its next five seconds later.
        with contextlib.suppress(BlockingIOError):
            os.write(self._report, b".")
        free_dead(runtime.runtime_of(self._app), f"{pid}-*")

    def _maintain(self, pool: Any) -> None:
        os.read(self._deaths, 4096)
        compat.replace_dead(pool)


def is_prefork(worker: Any) -> bool:
    """Whether the worker's pool is one of processes: Celery's own, or a subclass of it."""
    # Each pool's module is imported where it is asked for, as Celery does.
    from celery.concurrency.prefork import TaskPool

    return _is_pool(worker, TaskPool)


def bodies_at_once(worker: Any) -> int:
    """How many bodies run in the worker's own process at most, when its pool is made; Celery's
    number is that of its cores where nothing else is said, in a solo pool, too.
    """
    from celery.concurrency.solo import TaskPool

    if _is_pool(worker, TaskPool):
        return 1
    return max(int(worker.concurrency), worker.max_concurrency or 0)


def _is_pool(worker: Any, kind: type) -> bool:
    pool = get_implementation(worker.pool_cls)
    return isinstance(pool, type) and issubclass(pool, kind)


def warn_of_eventlet(worker: Any) -> None:
    """Warn that a pool of eventlet cannot interrupt a run that lost its lease."""
    pool = worker.pool_cls
    modules = [base.__module__ for base in getattr(pool, "__mro__", ())] or [str(pool)]
    if any("eventlet" in module for module in modules):
        logger.warning(
            "singletons: in a pool of eventlet a run that loses its lease, or is asked to hand it "
            "over, is not interrupted: its body goes on beside the next run, and only what it "
            "saves is refused; use --pool=gevent, threads or prefork"
        )


def watch_over(app: Celery) -> None:
    """Let the app's workers check their singletons when they start, and watch over them."""
    app.steps["worker"].update((SingletonStep, ConnectionsStep, ChildrenStep, ConsumerTimeoutStep))
