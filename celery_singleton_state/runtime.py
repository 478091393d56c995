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

#: Connections in the pool of a process that runs one body at a time: the body's transaction and
#: what it does beside that. The heartbeat has the one that is kept besides the pool's.
SMALL_POOL = 2


#: There are few nodes in a process, and many runs.
_as_ascii = lru_cache(16)(storable)


class _once(Generic[T]):  # noqa: N801 - it decorates, as property does
    """A property that is made at first use, and an attribute from then on.

    ``functools.cached_property`` has, before Python 3.12, a lock that a forked child inherits.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __get__(self, instance: Any, owner: type) -> T:
        made = instance.__dict__[self._make.__name__] = self._make(instance)
        return made


class Runtime:
    """One app's singletons in this process."""

    def __init__(self, app: Celery) -> None:
        self._app = weakref.ref(app)
        self.settings = Settings.from_app(app)
        options = (getattr(task, "_options", None) for task in app.tasks.values())
        #: Seconds that a lease lives whose task says nothing else.
        self.lease_ttl = self.settings.lease_ttl
        self._lives = [self.lease_ttl]
        self._lives += [own.lease_ttl for own in options if own and own.lease_ttl]
        #: On :data:`~celery_singleton_state.lease.lease.clock`.
        self.made_at = clock()
        self.dispatcher = Dispatcher(app, self.settings.hooks)
        self._nonce = secrets.token_hex(4)
        self._count = itertools.count(1)
        #: Holders of this process whose deliveries are under way.
        self.under_way: set[str] = set()
        self._opening = threading.Lock()
        self._sql: SqlStore | None = None
        self._leases: Leases | None = None
        self._heartbeats: dict[int, Heartbeat] = {}
        #: By whether a task has a state.
        self._homes: dict[bool, tuple[Store, Heartbeat]] = {}
        self._holder_files: HolderFiles | None = None
        #: Of the messages that wait for a lease.
        self.pace = Pace()
        #: Leases that this process may hold without a run.
        self.unreleased = UnreleasedLeases(
            lambda slot: self.holder_files.clear(slot),
            self.settings.heartbeat_interval,
        )

    @property
    def app(self) -> Celery:
        """The app, which outlives this."""
        app = self._app()
        assert app is not None
        return app

    @property
    def io_timeout(self) -> float:
        """Seconds of silence after which the store counts as out of reach.

        A quarter of the time for which the shortest-lived lease is trusted: a call that meets
        silence, and its one repetition over a new connection, then end before a lease that was to
        be renewed half-way is lost.
        """
        return TRUSTED_PART * min(self._lives) / 4

    @property
    def sql(self) -> SqlStore:
        """The database, opened at first use.

        :raises ImproperlyConfigured: there is none, or it cannot be used as it is configured.
        :raises StoreError: it could not be reached.
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
        """Let an open database have so many connections."""
        with self._opening:
            if self._sql is not None:
                self._sql.allow(connections)

    @_once
    def store(self) -> Store:
        """Where states are, and the leases that are not kept apart from states; opened at first
        use. Without a database, where all leases are.

        :raises ImproperlyConfigured: it cannot be used as it is configured.
        :raises StoreError: it could not be reached.
        """
        if self.settings.has_store or self.leases is None:
            return self.sql
        return cast(Store, self.leases)

    @_once
    def leases(self) -> Leases | None:
        """Where the leases of singletons without a state are, if they are kept apart."""
        url = self.settings.lease_url
        if url is None:
            return None
        # Its client library need not be there otherwise.
        from .store.redis.store import RedisStore

        with self._opening:
            self._leases = self._leases or RedisStore(url, self.io_timeout)
        return self._leases

    def store_of(self, options: Options | None) -> Store:
        """The store of a task's singletons: it follows from whether they have a state.

        :param options: ``None``: of a task that this app does not know.
        :raises ImproperlyConfigured: it cannot be used as it is configured.
        :raises StoreError: it could not be reached.
        """
        if options is None or self.leases is None:
            return self.store
        # Nobody asks it for what needs a state.
        return self.sql if options.state_schema is not None else cast(Store, self.leases)

    def store_of_task(self, name: str | None) -> Store:
        """The store of a task's rows, as far as there are any, by the task's name."""
        if not self.settings.has_store:
            return self.store
        return self.store_of(options_of(self.app.tasks.get(name or "")))

    def home_of(self, options: Options) -> tuple[Store, Heartbeat]:
        """The store of a task's singletons, and the heartbeat of their leases.

        :raises ImproperlyConfigured: it cannot be used as it is configured.
        :raises StoreError: it could not be reached.
        """
        has_state = options.state_schema is not None
        home = self._homes.get(has_state)
        if home is None:
            store = self.store_of(options)
            home = self._homes[has_state] = store, self.heartbeat_of(store)
        return home

    @property
    def stores(self) -> Sequence[Leases]:
        """All stores of the app: the database, and Redis where leases are kept there."""
        sql = self.sql if self.settings.has_store else None
        return [store for store in (sql, self.leases) if store is not None]

    def by_store(
        self, tasks: Mapping[str, str | None]
    ) -> Sequence[tuple[Store, Mapping[str, str | None]]]:
        """Singletons by the store that they are in.

        :param tasks: the task's name by the singleton's key, as each part has it in turn.
        """
        found: dict[int, tuple[Store, dict[str, str | None]]] = {}
        for key, task in tasks.items():
            store = self.store_of_task(task)
            found.setdefault(id(store), (store, {}))[1][key] = task
        return list(found.values())

    def rows(self, prefix: str, also: str = "") -> Sequence[Listed]:
        """The rows of all singletons whose keys begin with a prefix, and one more, by key.

        :raises StoreError: a store is unavailable.
        """
        found = [row for store in self.stores for row in store.list(prefix, also)]
        return sorted(found, key=lambda row: row.key)

    def check(self) -> None:
        """See that all stores can be used; :exc:`StoreError` says what is missing."""
        for store in self.stores:
            store.check((self.settings.key_prefix,))

    def key_of(self, name: str) -> str:
        """The key of the row that a singleton's name stands under."""
        key = self.settings.key_prefix + name
        return key if len(key) <= MAX_KEY_LENGTH else row_key(self.settings.key_prefix, name)

    def heartbeat_of(self, store: Leases) -> Heartbeat:
        """The heartbeat of all leases that this process holds in a store.

        Each store has one of its own, so that a silent one costs the other's leases nothing.
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
        """What the processes of this host hold in the store."""
        directory = directory_of(self._identity())
        with self._opening:
            name = f"{os.getpid()}-{self._nonce}"
            holder_files = self._holder_files = self._holder_files or HolderFiles(directory, name)
        return holder_files

    def _identity(self) -> str | None:
        """The same text for all processes that use the same stores."""
        own = self.settings
        sql = identity(parse_url(own.store_url), own.table) if own.has_store else None
        return sql if own.lease_url is None else f"{own.lease_url} {sql}"

    def new_holder(self, nodename: str | None = None) -> str:
        """A holder's name, never given twice. Outside a worker the host's name is the node's.

        It is ASCII, whatever the node is called, so that every database can hold it.
        """
        node = _as_ascii(nodename or gethostname())
        return f"{node}:{os.getpid()}:{self._nonce}.{next(self._count):x}"

    def holds_without_run(self, holder: str | None) -> bool:
        """Whether a lease's holder is a delivery of this process that has ended."""
        own = f":{os.getpid()}:{self._nonce}."
        return holder is not None and own in holder and holder not in self.under_way

    def close(self) -> None:
        """Stop the heartbeat, hand on what waits for hooks, and close the connections."""
        self.unreleased.close()
        if self._holder_files is not None:
            self._holder_files.close()
        for heartbeat in self._heartbeats.values():
            heartbeat.close()
        self.dispatcher.close()
        for store in (self._leases, self._sql):
            if store is not None:
                store.close()


#: Connections at most for each store of this process; a worker raises it by its pool.
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


def allow_connections(number: int) -> None:
    """Let each store of this process have so many connections from now on, if it may not yet."""
    global pool_size
    with _lock:
        pool_size = max(pool_size, number)
        runtimes = list(_runtimes.values())
    for runtime in runtimes:
        runtime.allow(number)


def close_runtime(app: Celery) -> None:
    """Close what the app has in this process; the next use makes it anew."""
    with _lock:
        runtime = _runtimes.pop(app, None)
    if runtime is not None:
        runtime.close()


def _forget_parents() -> None:
    """In a forked child: leave what the parent has alone.

    It is kept, and never used or closed; the child's copies of connections to databases are gone.
    """
    global _lock, pool_size
    _lock = threading.Lock()
    pool_size = SMALL_POOL
    _inherited.extend(_runtimes.values())
    _runtimes.clear()


os.register_at_fork(after_in_child=_forget_parents)
