"""What an app has once in each process: its settings, its store, its heartbeat.

Connections and threads do not survive a fork, so a child forgets its parent's and makes its own
at first use.
"""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import weakref

from celery import Celery
from celery.utils.nodenames import gethostname

from .heartbeat import Heartbeat
from .holdings import Holdings, directory_of
from .hooks import Door
from .lease import clock
from .settings import Settings
from .store import SqlStore, open_store
from .store.engine import identity, parse_url

#: Connections of a process that runs one body at a time: its own and the heartbeat's.
SMALL_POOL = 2


class Runtime:
    """One app's singletons in this process."""

    def __init__(self, app: Celery) -> None:
        self._app = weakref.ref(app)
        self.settings = Settings.from_app(app)
        options = (getattr(task, "_options", None) for task in app.tasks.values())
        self._lives = [self.settings.lease_ttl]
        self._lives += [own.lease_ttl for own in options if own and own.lease_ttl]
        #: On :func:`~celery_singleton_state.lease.clock`.
        self.made_at = clock()
        self.door = Door(app, self.settings.hooks)
        self._nonce = secrets.token_hex(4)
        self._count = itertools.count(1)
        self._opening = threading.Lock()
        self._store: SqlStore | None = None
        self._heartbeat: Heartbeat | None = None
        self._holdings: Holdings | None = None

    @property
    def app(self) -> Celery:
        """The app, which outlives this."""
        app = self._app()
        assert app is not None
        return app

    @property
    def io_timeout(self) -> float:
        """Seconds of silence after which the store counts as out of reach.

        A quarter of the shortest lease's life: a call that meets silence, and its one
        repetition over a new connection, then end before a lease that was to be renewed at
        half its life runs out.
        """
        return min(self._lives) / 4

    @property
    def store(self) -> SqlStore:
        """The store, opened at first use.

        :raises ImproperlyConfigured: it cannot be used as it is configured.
        :raises StoreError: it could not be reached.
        """
        if self._store is None:
            with self._opening:
                if self._store is None:
                    own = self.settings
                    self._store = open_store(
                        own.store_url, own.table, self.io_timeout, pool_size, own.auto_migrate
                    )
        return self._store

    @property
    def heartbeat(self) -> Heartbeat:
        """The heartbeat of all leases in the store that this process holds."""
        if self._heartbeat is None:
            store = self.store
            with self._opening:
                self._heartbeat = self._heartbeat or Heartbeat(store)
        return self._heartbeat

    @property
    def holdings(self) -> Holdings:
        """What the processes of this host hold in the store."""
        if self._holdings is None:
            url = parse_url(self.settings.store_url)
            directory = directory_of(identity(url, self.settings.table))
            with self._opening:
                name = f"{os.getpid()}-{self._nonce}"
                self._holdings = self._holdings or Holdings(directory, name)
        return self._holdings

    def new_holder(self, nodename: str | None = None) -> str:
        """A holder's name, never given twice. Outside a worker the host's name is the node's."""
        return f"{nodename or gethostname()}:{os.getpid()}:{self._nonce}.{next(self._count):x}"

    def close(self) -> None:
        """Stop the heartbeat, hand on what waits for hooks, and close the connections."""
        if self._holdings is not None:
            self._holdings.close()
        if self._heartbeat is not None:
            self._heartbeat.close()
        self.door.close()
        if self._store is not None:
            self._store.close()


#: Connections at most for each store of this process; a worker sets it by its pool.
pool_size = SMALL_POOL

_runtimes: weakref.WeakKeyDictionary[Celery, Runtime] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_inherited: list[Runtime] = []


def runtime_of(app: Celery) -> Runtime:
    """The app's runtime in this process, made at first use.

    :raises ImproperlyConfigured: a setting is not allowed.
    """
    try:
        return _runtimes[app]
    except KeyError:
        with _lock:
            if app not in _runtimes:
                _runtimes[app] = Runtime(app)
            return _runtimes[app]


def close_runtime(app: Celery) -> None:
    """Close what the app has in this process; the next use makes it anew."""
    with _lock:
        runtime = _runtimes.pop(app, None)
    if runtime is not None:
        runtime.close()


def _forget_parents() -> None:
    """In a forked child: leave the parent's connections alone.

    They are kept, and never used or closed: closing would end the parent's sessions.
    """
    global _lock, pool_size
    _lock = threading.Lock()
    pool_size = SMALL_POOL
    _inherited.extend(_runtimes.values())
    _runtimes.clear()


os.register_at_fork(after_in_child=_forget_parents)
