"""Two stores as one: leases of singletons without a state in Redis, all else in SQL.

Which of them a key belongs to follows from the key alone, so nobody who asks has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from celery.exceptions import ImproperlyConfigured

from .base import (
    Acquired,
    Ended,
    Entries,
    FencedTransaction,
    Lease,
    Leases,
    Listed,
    NewValue,
    Queued,
    Released,
    Row,
    Saved,
    SeenTicks,
    Store,
    Wishes,
    Write,
)

NO_SQL = (
    "singleton_lease_url keeps the leases of singletons without a state; a state, and the schedule "
    "of beat, need a database: set singleton_store_url as well"
)


class RoutedStore:
    """:param sql: ``None`` where there are only singletons without a state.

    :param has_no_state: whether a key is that of a singleton without a state.
    """

    def __init__(
        self, sql: Store | None, leases: Leases, has_no_state: Callable[[str], bool]
    ) -> None:
        self._sql_or_none = sql
        self._leases = leases
        self._has_no_state = has_no_state
        self.wishes: Wishes = RoutedWishes(lambda key: self.of(key).wishes)

    def of(self, key: str) -> Leases:
        """The store that a key belongs to."""
        return self._leases if self._has_no_state(key) else self._sql

    @property
    def _sql(self) -> Store:
        if self._sql_or_none is None:
            raise ImproperlyConfigured(NO_SQL)
        return self._sql_or_none

    def stores_for(self, key: str) -> Sequence[Leases]:
        """All stores, the one that a key belongs to first. Another one may have the row of a task
        that this app does not know, or that had no state before.
        """
        return sorted(self.stores, key=lambda store: store is not self._own(key))

    def _own(self, key: str) -> Leases | None:
        return self._leases if self._has_no_state(key) else self._sql_or_none

    @property
    def stores(self) -> list[Leases]:
        """All stores that there are."""
        return [store for store in (self._sql_or_none, self._leases) if store is not None]

    def acquire(
        self,
        key: str,
        holder: str,
        ttl: float,
        task_id: str | None,
        rank: int = 0,
        sent: str | None = None,
    ) -> Acquired | None:
        return self.of(key).acquire(key, holder, ttl, task_id, rank, sent)

    def renew(self, leases: Sequence[Lease]) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for store in self.stores:
            own = [lease for lease in leases if self.of(lease.key) is store]
            found |= store.renew(own) if own else {}
        return found

    def release(self, lease: Lease, ended: Ended, write: Write | None = None) -> Released | None:
        return self.of(lease.key).release(lease, ended, write)

    def give_back(self, key: str, holder: str) -> Released | None:
        return self.of(key).give_back(key, holder)

    def peek(self, key: str) -> Row | None:
        return self.of(key).peek(key)

    def list(self, prefix: str, also: str = "") -> Sequence[Listed]:
        found = [row for store in self.stores for row in store.list(prefix, also)]
        return sorted(found, key=lambda row: row.key)

    def contents(
        self, keys: Sequence[str], values: bool
    ) -> dict[str, tuple[str | None, str | None]]:
        found: dict[str, tuple[str | None, str | None]] = {}
        for store in self.stores:
            own = [key for key in keys if self._own(key) is store]
            found |= store.contents(own, values) if own else {}
        return found

    def ticks(self, keys: Sequence[str]) -> dict[str, SeenTicks]:
        found: dict[str, SeenTicks] = {}
        for store in self.stores:
            own = [key for key in keys if self.of(key) is store]
            found |= store.ticks(own) if own else {}
        return found

    def unused(self, prefix: str, older_than: float) -> Sequence[str]:
        found = [key for store in self.stores for key in store.unused(prefix, older_than)]
        # What is left of a task in the store that it was in before is not the other's to remove.
        return sorted(set(found))

    def prune(self, keys: Sequence[str], older_than: float) -> Sequence[str]:
        return [
            key
            for store in self.stores
            if (own := [key for key in keys if self.of(key) is store])
            for key in store.prune(own, older_than)
        ]

    def check(self) -> None:
        for store in self.stores:
            store.check()

    def close(self) -> None:
        for store in self.stores:
            store.close()

    # -- what only a state and a schedule need

    def save(self, lease: Lease, write: Write) -> Saved | None:
        return self._sql.save(lease, write)

    def written(self, lease: Lease, number: int) -> bool | None:
        return self._sql.written(lease, number)

    def set_aside(self, key: str, value: str) -> None:
        self._sql.set_aside(key, value)

    def transaction(self) -> AbstractContextManager[FencedTransaction]:
        return self._sql.transaction()

    @property
    def entries(self) -> Entries:
        return self._sql.entries


class RoutedWishes:
    """:param of: the wishes of the store that a key belongs to."""

    def __init__(self, of: Callable[[str], Wishes]) -> None:
        self._of = of

    def ask_to_hand_over(
        self, row: Row, who: str, rank: int | None = None, sent: str | None = None
    ) -> bool:
        return self._of(row.key).ask_to_hand_over(row, who, rank, sent)

    def let_go(self, row: Row) -> bool:
        return self._of(row.key).let_go(row)

    def want(self, row: Row, wish: str) -> bool:
        return self._of(row.key).want(row, wish)

    def wanted(self, key: str) -> str | None:
        return self._of(key).wanted(key)

    def granted(self, key: str, wish: str) -> None:
        self._of(key).granted(key, wish)

    def queued(self, key: str) -> Queued:
        return self._of(key).queued(key)

    def claim(self, key: str, task_id: str, life: float, number: int, first: bool = False) -> bool:
        return self._of(key).claim(key, task_id, life, number, first)

    def expect(self, keys: Sequence[str]) -> None:
        by_store: dict[int, tuple[Wishes, list[str]]] = {}
        for key in keys:
            wishes = self._of(key)
            by_store.setdefault(id(wishes), (wishes, []))[1].append(key)
        for wishes, own in by_store.values():
            wishes.expect(own)

    def put(self, key: str, row: Row | None, new: NewValue) -> bool:
        return self._of(key).put(key, row, new)

    def dequeue(self, key: str, task_id: str) -> None:
        self._of(key).dequeue(key, task_id)
