"""The runtime: what an app has once in each process, such as its settings, stores and heartbeats.

Connections and threads do not survive a fork. A forked child never uses its parent's connections
and threads, and makes its own at first use.
"""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from celery.utils.nodenames import gethostname

from .config.options import Options, options_of
from .config.settings import NO_SQL, Settings
from .hooks import Dispatcher
from .keys import MAX_KEY_LENGTH, row_key
from .lease.heartbeat import Heartbeat
from .lease.holder_files import HolderFiles, directory_of
from .lease.lease import TRUSTED_PART, clock
from .lease.pace import Pace
from .lease.renewal_slots import LeftToParent, parents_mark
from .lease.unreleased import UnreleasedLeases
from .migrations.open_store import open_store
from .store.base import Leases, Listed, Store
from .store.sql.engine import identity
from .store.sql.store import SqlStore
from .store.sql.url import parse_url
from .text.storable import storable

T = TypeVar("T")

#: The number of connections in the pool of a process that runs one body at a time: one connection
#: for the body's ``transaction()``, and one for other requests meanwhile. The heartbeat has a
#: further connection of its own.
SMALL_POOL = 2


#: Converts a node's name to ASCII. Cached: each run needs it, and a process has few node names.
_as_ascii = lru_cache(16)(storable)


class _once(Generic[T]):  # noqa: N801 - it decorates, as property does
    """A property that is computed at first use and is a plain attribute from then on.

    ``functools.cached_property`` cannot be used: before Python 3.12 it has a lock, which a forked
    child could inherit in its locked state.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __get__(self, instance: Any, owner: type) -> T:
        made = instance.__dict__[self._make.__name__] = self._make(instance)
        return made


class Runtime:
    """What one app has in this process for its singletons: settings, stores, heartbeats, hooks."""

    def __init__(self, app: Celery) -> None:
        self._app = weakref.ref(app)
        self.settings = Settings.from_app(app)
        options = (getattr(task, "_options", None) for task in app.tasks.values())
        #: The life of a lease, in seconds, for tasks without the option ``lease_ttl``.
        self.lease_ttl = self.settings.lease_ttl
        self._lives = [self.lease_ttl]
        self._lives += [own.lease_ttl for own in options if own and own.lease_ttl]
        #: When this runtime was made: a time of :data:`~celery_singleton_state.lease.lease.clock`.
        self.made_at = clock()
        self.dispatcher = Dispatcher(app, self.settings.hooks)
        self._nonce = secrets.token_hex(4)
        self._count = itertools.count(1)
        #: The holder names of this process's deliveries that are in progress.
        self.under_way: set[str] = set()
        self._opening = threading.Lock()
        self._sql: SqlStore | None = None
        self._leases: Leases | None = None
        self._heartbeats: dict[int, Heartbeat] = {}
        #: Maps true (for tasks with a state) and false (for tasks without one) to the store and the
        #: heartbeat of these tasks.
        self._homes: dict[bool, tuple[Store, Heartbeat]] = {}
        self._holder_files: HolderFiles | None = None
        #: Computes the pause after which a message that waits for a lease is sent again.
        self.pace = Pace()
        #: The leases that this process may hold without a run. The store is asked to release each
        #: of them until the store has answered.
        self.unreleased = UnreleasedLeases(
            lambda slot: self.holder_files.clear(slot),
            self.settings.heartbeat_interval,
        )

    @property
    def app(self) -> Celery:
        """The app of this runtime. The reference is weak: the app outlives its runtime."""
        app = self._app()
        assert app is not None
        return app

    @property
    def io_timeout(self) -> float:
        """Seconds without an answer after which the store counts as unavailable.

        This timeout is a quarter of the time for which a run trusts a lease that is not renewed; of
        all tasks, the shortest lease counts. A lease is renewed half-way through that time. So
        before the lease is lost, two requests can time out: the first one, and its repetition over
        a new connection.
        """
        return TRUSTED_PART * min(self._lives) / 4

    @property
    def sql(self) -> SqlStore:
        """The SQL store, opened at first use.

        :raises ImproperlyConfigured: the app has no SQL store, or its URL cannot be used.
        :raises StoreError: the database is unavailable.
        """
        if self._sql is None:
            own = self.settings
            if not own.has_store:
                raise ImproperlyConfigured(NO_SQL)
            with self._opening:
                if self._sql is None:
                    self._sql = open_store(
                        own.store_url, own.table, self.io_timeout, pool_size, own.auto_migrate
                    )
        return self._sql

    def allow(self, connections: int) -> None:
        """Raise the size of the SQL store's connection pool, if the store is open."""
        with self._opening:
            if self._sql is not None:
                self._sql.allow(connections)

    @_once
    def store(self) -> Store:
        """The app's main store, opened at first use.

        The main store is the SQL store, which has all states. In an app without a SQL store, the
        main store is the Redis store, which then has all leases.

        :raises ImproperlyConfigured: the store's URL cannot be used.
        :raises StoreError: the store is unavailable.
        """
        if self.settings.has_store or self.leases is None:
            return self.sql
        return cast(Store, self.leases)

    @_once
    def leases(self) -> Leases | None:
        """The Redis store for leases of singletons without a state; ``None`` if the app has none.

        The store is opened at first use.
        """
        url = self.settings.lease_url
        if url is None:
            return None
        # Imported here, because Redis's client library is an optional dependency.
        from .store.redis.store import RedisStore

        with self._opening:
            self._leases = self._leases or RedisStore(url, self.io_timeout)
        return self._leases

    def store_of(self, options: Options | None) -> Store:
        """Return the store of a task's singletons, which depends on whether they have a state.

        :param options: the task's options; ``None`` for a task that this app does not know: the
            main store is returned.
        :raises ImproperlyConfigured: the store's URL cannot be used.
        :raises StoreError: the store is unavailable.
        """
        if options is None or self.leases is None:
            return self.store
        # The cast is safe: a task without a state calls no method of Store that Leases lacks.
        return self.sql if options.state_schema is not None else cast(Store, self.leases)

    def store_of_task(self, name: str | None) -> Store:
        """Return the store of a task's singletons, given the task's name.

        :param name: the task's name. If it is ``None``, or if this app does not know the task, the
            main store is returned.
        """
        if not self.settings.has_store:
            return self.store
        return self.store_of(options_of(self.app.tasks.get(name or "")))

    def home_of(self, options: Options) -> tuple[Store, Heartbeat]:
        """Return the store of a task's singletons and the heartbeat that renews their leases.

        :raises ImproperlyConfigured: the store's URL cannot be used.
        :raises StoreError: the store is unavailable.
        """
        has_state = options.state_schema is not None
        home = self._homes.get(has_state)
        if home is None:
            store = self.store_of(options)
            home = self._homes[has_state] = store, self.heartbeat_of(store)
        return home

    @property
    def stores(self) -> Sequence[Leases]:
        """All stores that the app has: the SQL store, the Redis store, or both."""
        sql = self.sql if self.settings.has_store else None
        return [store for store in (sql, self.leases) if store is not None]

    def by_store(
        self, tasks: Mapping[str, str | None]
    ) -> Sequence[tuple[Store, Mapping[str, str | None]]]:
        """Group singletons by their store.

        :param tasks: maps the key of each singleton to the name of its task.
        :returns: pairs of a store and the part of ``tasks`` whose singletons the store has.
        """
        found: dict[int, tuple[Store, dict[str, str | None]]] = {}
        for key, task in tasks.items():
            store = self.store_of_task(task)
            found.setdefault(id(store), (store, {}))[1][key] = task
        return list(found.values())

    def rows(self, prefix: str, also: str = "") -> Sequence[Listed]:
        """Return the rows whose keys begin with a prefix, of all stores, sorted by key.

        :param also: the key of one more row that is returned if it exists. Default: none.
        :raises StoreError: a store is unavailable.
        """
        found = [row for store in self.stores for row in store.list(prefix, also)]
        return sorted(found, key=lambda row: row.key)

    def check(self) -> None:
        """Check that all stores can be used.

        :raises StoreError: a store is unavailable or not set up; the message says what to do.
        """
        for store in self.stores:
            store.check((self.settings.key_prefix,))

    def key_of(self, name: str) -> str:
        """Return the key of a singleton's row, given the singleton's name."""
        key = self.settings.key_prefix + name
        return key if len(key) <= MAX_KEY_LENGTH else row_key(self.settings.key_prefix, name)

    def heartbeat_of(self, store: Leases) -> Heartbeat:
        """Return the heartbeat that renews all leases of this process in a store.

        Each store has its own heartbeat, so that a store that does not answer delays no renewals
        in the other store.
        """
        heartbeat = self._heartbeats.get(id(store))
        if heartbeat is None:
            mark = parents_mark()
            parent = (
                LeftToParent(self.holder_files, mark, store is self.leases)
                if mark is not None
                else None
            )
            with self._opening:
                heartbeat = self._heartbeats.setdefault(id(store), Heartbeat(store, parent))
        return heartbeat

    @_once
    def holder_files(self) -> HolderFiles:
        """The holder files of the processes of this host that use the same stores."""
        directory = directory_of(self._identity())
        with self._opening:
            name = f"{os.getpid()}-{self._nonce}"
            holder_files = self._holder_files = self._holder_files or HolderFiles(directory, name)
        return holder_files

    def _identity(self) -> str | None:
        """Return a text that is the same in all processes that use the same stores.

        Such processes share a directory of holder files, which is named after the text.

        :returns: ``None`` if the store lives in this process only.
        """
        own = self.settings
        sql = identity(parse_url(own.store_url), own.table) if own.has_store else None
        return sql if own.lease_url is None else f"{own.lease_url} {sql}"

    def new_holder(self, nodename: str | None = None) -> str:
        """Return a new name for the holder of a lease; no name is used twice.

        The name is ASCII, so that a database of any encoding can hold it.

        :param nodename: the worker's node name. Default: the host's name.
        """
        node = _as_ascii(nodename or gethostname())
        return f"{node}:{os.getpid()}:{self._nonce}.{next(self._count):x}"

    def holds_without_run(self, holder: str | None) -> bool:
        """Whether a holder's name belongs to a delivery of this process that has ended."""
        own = f":{os.getpid()}:{self._nonce}."
        return holder is not None and own in holder and holder not in self.under_way

    def close(self) -> None:
        """Stop the threads, pass all waiting events to the hooks, and close the stores."""
        self.unreleased.close()
        if self._holder_files is not None:
            self._holder_files.close()
        for heartbeat in self._heartbeats.values():
            heartbeat.close()
        self.dispatcher.close()
        for store in (self._leases, self._sql):
            if store is not None:
                store.close()


#: The largest number of connections that this process may have to each store. A worker raises the
#: number to fit the size of its pool.
pool_size = SMALL_POOL

_runtimes: weakref.WeakKeyDictionary[Celery, Runtime] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_inherited: list[Runtime] = []


def runtime_of(app: Celery) -> Runtime:
    """Return the app's runtime in this process; make the runtime at first use.

    :raises ImproperlyConfigured: a setting of the app is not allowed.
    """
    try:
        return _runtimes[app]
    except KeyError:
        with _lock:
            if app not in _runtimes:
                _runtimes[app] = Runtime(app)
            return _runtimes[app]


def allow_connections(number: int) -> None:
    """Raise the number of connections that this process may have to each store.

    The number is for open stores, and for stores that are opened later. A number that is not larger
    than the present one changes nothing.
    """
    global pool_size
    with _lock:
        pool_size = max(pool_size, number)
        runtimes = list(_runtimes.values())
    for runtime in runtimes:
        runtime.allow(number)


def close_runtime(app: Celery) -> None:
    """Close the app's runtime in this process. The next use of the app makes a new one."""
    with _lock:
        runtime = _runtimes.pop(app, None)
    if runtime is not None:
        runtime.close()


def _forget_parents() -> None:
    """Make a forked child ignore its parent's runtimes, so that the child makes its own.

    The parent's runtimes stay in the child's memory, but are never used or closed, because closing
    them could disturb the parent's connections.
    """
    global _lock, pool_size
    _lock = threading.Lock()
    pool_size = SMALL_POOL
    _inherited.extend(_runtimes.values())
    _runtimes.clear()


os.register_at_fork(after_in_child=_forget_parents)
