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
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from celery.utils.nodenames import gethostname

from .config.settings import Settings
from .hooks import Door
from .keys import MAX_KEY_LENGTH, row_key, task_of
from .lease.heartbeat import Heartbeat
from .lease.holdings import Holdings, directory_of
from .lease.lease import TRUSTED_PART, clock
from .lease.pace import Pace
from .lease.renewal_slots import LeftToParent, parents_mark
from .lease.unreturned import Unreturned
from .migrations.open_store import open_store
from .store.base import Leases, Store
from .store.routed import NO_SQL, RoutedStore
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
        self.door = Door(app, self.settings.hooks)
        self._nonce = secrets.token_hex(4)
        self._count = itertools.count(1)
        #: Holders of this process whose deliveries are under way.
        self.under_way: set[str] = set()
        self._opening = threading.Lock()
        self._sql: SqlStore | None = None
        self._store: Store | None = None
        self._heartbeats: dict[int, Heartbeat] = {}
        self._holdings: Holdings | None = None
        #: Of the messages that wait for a lease.
        self.pace = Pace()
        #: Leases that this process may hold without a run.
        self.unreturned = Unreturned(
            lambda key, holder: self.store.give_back(key, holder),
            lambda slot: self.holdings.strike_out(slot),
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
        """Where leases and states are, opened at first use.

        :raises ImproperlyConfigured: it cannot be used as it is configured.
        :raises StoreError: it could not be reached.
        """
        own = self.settings
        sql = self.sql if own.has_store else None
        with self._opening:
            store = self._store = self._store or self._beside_redis(sql) or sql
        assert store is not None
        return store

    @property
    def stores(self) -> Sequence[Leases]:
        """All stores of the app: the database, and Redis where leases are kept there."""
        store = self.store
        return store.stores if isinstance(store, RoutedStore) else [store]

    def stores_for(self, key: str) -> Sequence[Leases]:
        """The same, the store that a key belongs to first."""
        store = self.store
        return store.stores_for(key) if isinstance(store, RoutedStore) else [store]

    def _beside_redis(self, sql: SqlStore | None) -> Store | None:
        if self.settings.lease_url is None:
            return None
        # Its client library need not be there otherwise.
        from .store.redis.store import RedisStore

        leases = RedisStore(self.settings.lease_url, self.io_timeout)
        return RoutedStore(sql, leases, self._has_no_state)

    def _has_no_state(self, key: str) -> bool:
        name = key.removeprefix(self.settings.key_prefix)
        tasks = self.app.tasks
        options = getattr(tasks.get(task_of(name, tasks)), "_options", None)
        return name != key and options is not None and options.state_schema is None

    def key_of(self, name: str) -> str:
        """The key of the row that a singleton's name stands under."""
        key = self.settings.key_prefix + name
        return key if len(key) <= MAX_KEY_LENGTH else row_key(self.settings.key_prefix, name)

    def heartbeat_of(self, key: str) -> Heartbeat:
        """The heartbeat of all leases that this process holds in the store that has this key.

        Each store has one of its own, so that a silent one costs the other's leases nothing.
        """
        store: Leases = self.store
        if isinstance(store, RoutedStore):
            store = store.of(key)
        heartbeat = self._heartbeats.get(id(store))
        if heartbeat is None:
            mark = parents_mark()
            parent = LeftToParent(self.holdings, mark) if mark is not None else None
            with self._opening:
                heartbeat = self._heartbeats.setdefault(id(store), Heartbeat(store, parent))
        return heartbeat

    @_once
    def holdings(self) -> Holdings:
        """What the processes of this host hold in the store."""
        directory = directory_of(self._identity())
        with self._opening:
            name = f"{os.getpid()}-{self._nonce}"
            holdings = self._holdings = self._holdings or Holdings(directory, name)
        return holdings

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
        self.unreturned.close()
        if self._holdings is not None:
            self._holdings.close()
        for heartbeat in self._heartbeats.values():
            heartbeat.close()
        self.door.close()
        for store in (self._store, self._sql):
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
