"""Steps of a worker's start: check that singletons can run, and set up their renewals."""

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
    """The error with which a worker refuses to start.

    The class is also an error of click's, because ``celery worker`` prints click's errors as one
    line instead of a traceback.
    """

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)

    def format_message(self) -> str:
        return f"{ImproperlyConfigured.__name__}: {self.message}"


class SingletonStep(bootsteps.StartStopStep):
    """Checks settings, store and table before the worker makes the processes of its pool.

    A wrong configuration or table stops the worker, with a message that says what to do. A store
    that is unavailable does not stop the worker, because runs are retried until the store answers.
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
        # Close the connections that the checks have used, because the pool's processes must not
        # inherit them. A pool of threads opens new connections.
        free_dead(runtime.runtime_of(app))
        runtime.close_runtime(app)
        if is_prefork(parent):
            mark_as_parent()

    def check(self, worker: Any) -> None:
        """Check that the worker's singletons can run.

        :raises ImproperlyConfigured: the singletons cannot run; the message says what to do.
        """
        warn_of_eventlet(worker)
        own = runtime.runtime_of(worker.app)
        refuse_states_without_store(own)
        try:
            own.check()
        except StoreNotReady as error:
            raise ImproperlyConfigured(str(error)) from error
        except StoreError as error:
            logger.error("singletons: the store is unavailable, runs will be retried: %s", error)
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
        """Record in the store that singletons with an ``expected_interval`` are expected to run.

        Health checks count the time until the first run from the time of this record.
        """
        names = expected_singletons(own.app)
        tasks = {row_key(own.settings.key_prefix, name): name for name in names}
        try:
            for store, keys in own.by_store(tasks):
                store.requests.expect({key: tasks[key] for key in keys})
        except StoreError as error:
            logger.warning(
                "singletons: the store could not record which singletons are expected to run, so "
                "health checks may report a missing first run later: %s",
                error,
            )


class ConnectionsStep(bootsteps.StartStopStep):
    """Sets the size of the connection pool in a worker that runs bodies in its own process.

    The pool has a connection for each body that can run at once, and one more. The pool grows when
    ``--autoscale`` or the remote control command ``pool_grow`` raises the worker's concurrency.
    """

    requires = ("celery.worker.components:Pool",)

    def include_if(self, parent: Any) -> bool:
        return not is_prefork(parent)

    def start(self, parent: Any) -> None:
        runtime.allow_connections(bodies_at_once(parent) + 1)
        compat.before_growth(parent.pool, lambda bodies: runtime.allow_connections(bodies + 1))


class ChildrenStep(bootsteps.StartStopStep):
    """Renews the leases of a prefork pool's processes, and handles the death of a process.

    The leases of a dead process are released, and the pool replaces the process at once.
    """

    requires = ("celery.worker.components:Pool",)

    def include_if(self, parent: Any) -> bool:
        return is_prefork(parent)

    def start(self, parent: Any) -> None:
        self._app: Celery = parent.app
        self._deaths, self._report = os.pipe()
        # Without an event loop nothing reads from the pipe. A full pipe must not block its writer.
        # A report that finds the pipe full can be dropped: one unread report is enough to make the
        # event loop check for dead processes.
        os.set_blocking(self._report, False)
        # Close the watch at the exit of the process: the pool has ended by then, however the worker
        # ends.
        atexit.register(watch_pool(compat.process_pool(parent), self._on_death).close)
        ParentRenewal(parent.app, lambda: compat.processes_of(parent)).start()

    def register_with_event_loop(self, parent: Any, hub: Any) -> None:
        """Have the event loop replace dead processes. Celery calls this when the loop starts."""
        pool = compat.process_pool(parent)
        compat.call_when_readable(hub, self._deaths, self._maintain, pool)

    def _on_death(self, pid: int) -> None:
        # Wake the event loop, which has the pool check for dead processes now. By itself the pool
        # only checks once in five seconds.
        with contextlib.suppress(BlockingIOError):
            os.write(self._report, b".")
        free_dead(runtime.runtime_of(self._app), f"{pid}-*")

    def _maintain(self, pool: Any) -> None:
        os.read(self._deaths, 4096)
        compat.replace_dead(pool)


def is_prefork(worker: Any) -> bool:
    """Whether the worker's pool is Celery's prefork pool or a subclass of it."""
    # Imported here, because a worker should import the module of its own pool only.
    from celery.concurrency.prefork import TaskPool

    return _is_pool(worker, TaskPool)


def bodies_at_once(worker: Any) -> int:
    """Return how many bodies the worker's own process can run at once, by the worker's options.

    A solo pool runs one body at a time. Its ``worker.concurrency`` is not used: the default is the
    number of cores, even for a solo pool.
    """
    from celery.concurrency.solo import TaskPool

    if _is_pool(worker, TaskPool):
        return 1
    return max(int(worker.concurrency), worker.max_concurrency or 0)


def _is_pool(worker: Any, kind: type) -> bool:
    pool = get_implementation(worker.pool_cls)
    return isinstance(pool, type) and issubclass(pool, kind)


def warn_of_eventlet(worker: Any) -> None:
    """Log a warning if the worker has an eventlet pool, which cannot interrupt a lost run."""
    pool = worker.pool_cls
    modules = [base.__module__ for base in getattr(pool, "__mro__", ())] or [str(pool)]
    if any("eventlet" in module for module in modules):
        logger.warning(
            "singletons: in an eventlet pool a run that loses its lease, or is asked to hand it "
            "over, is not interrupted: its body goes on beside the next run, and only its writes "
            "of the state are refused; use --pool=gevent, threads or prefork"
        )


def watch_over(app: Celery) -> None:
    """Add this package's steps to the app's workers."""
    app.steps["worker"].update((SingletonStep, ConnectionsStep, ChildrenStep, ConsumerTimeoutStep))
