"""Leases in Redis or Valkey, for singletons without a state: one script call a verb.

What Redis took it can lose: a failover to a replica that had not heard of it yet, or a restart
without its file. Then a lease is free while its holder runs, and two runs are active, until the
first one's next renewal is refused. So a state, which must never be overwritten, is not kept here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from celery_singleton_state.state import NO_STATE

from . import redis_scripts as scripts
from .base import (
    Acquired,
    Ended,
    Lease,
    Listed,
    NewValue,
    Released,
    Row,
    StoreNotReady,
    StoreUnavailable,
    one_line,
    seen,
)
from .redis_calls import ScriptCalls
from .redis_url import client_for

logger = logging.getLogger(__name__)

#: Of the sorted set of all keys.
INDEX = "celery-singleton-keys"
#: Policies by which a server whose memory is full removes keys without an expiry.
_EVICTING = "allkeys"


class RedisStore:
    """Leases on a server.

    :param url: of :func:`~celery_singleton_state.store.redis_url.client_for`.
    :param io_timeout: seconds that connecting or an answer may take. There are no tries beyond the
        first: whoever asks knows for how long it is worth to ask again.
    :raises ImproperlyConfigured: the URL cannot be used.
    """

    def __init__(self, url: str, io_timeout: float) -> None:
        self._client: Any = client_for(
            url,
            decode_responses=True,
            socket_timeout=io_timeout,
            socket_connect_timeout=io_timeout,
            retry=Retry(NoBackoff(), 0),
        )
        self._scripts = ScriptCalls(self._client)
        self.wishes = RedisWishes(self._call)

    def acquire(self, key: str, holder: str, ttl: float, task_id: str | None) -> Acquired | None:
        found = self._call(scripts.ACQUIRE, [key, INDEX], [holder, ttl, task_id or ""])
        if found is None:
            return None
        fence, history, now = found
        return Acquired(Lease(key, holder, int(fence), ttl), NO_STATE, None, history, float(now))

    def renew(self, leases: Sequence[Lease]) -> dict[str, str | None]:
        keys = [lease.key for lease in leases]
        named = [part for lease in leases for part in (lease.holder, lease.fence, lease.ttl)]
        found = self._call(scripts.RENEW, keys, named)
        return {key: who or None for key, who in zip(keys, found, strict=True) if who is not None}

    def release(self, lease: Lease, ended: Ended, new: NewValue | None = None) -> Released | None:
        assert new is None, "a state is kept in SQL"
        named = [lease.holder, lease.fence, ended.outcome, ended.history, ended.hold]
        wanted = self._call(scripts.RELEASE, [lease.key], named)
        return None if wanted is None else Released(wanted or None)

    def peek(self, key: str) -> Row | None:
        now, fields = self._call(scripts.PEEK, [key], [])
        return seen(Row(**_listed(key, fields, now), value=NO_STATE)) if fields else None

    def list(self, prefix: str, also: str = "") -> Sequence[Listed]:
        now, found = self._call(scripts.LIST, [INDEX], [prefix])
        return [seen(Listed(**_listed(key, fields, now))) for key, fields in found]

    def contents(
        self, keys: Sequence[str], values: bool
    ) -> dict[str, tuple[str | None, str | None]]:
        with _as_ours(), self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.hget(key, "history")
            histories = pipeline.execute()
        value = NO_STATE if values else None
        return {key: (history, value) for key, history in zip(keys, histories, strict=True)}

    def unused(self, prefix: str, older_than: float) -> Sequence[str]:
        found: Sequence[str] = self._call(scripts.UNUSED, [INDEX], [older_than, prefix])
        return found

    def prune(self, keys: Sequence[str], older_than: float) -> Sequence[str]:
        found: Sequence[str] = self._call(scripts.PRUNE, [*keys, INDEX], [older_than])
        return found

    def check(self) -> None:
        """See that the server answers and keeps what it is told.

        :raises StoreNotReady: it would remove leases when its memory is full.
        :raises StoreUnavailable: it is out of reach.
        """
        with _as_ours():
            try:
                policy = self._client.info("memory").get("maxmemory_policy", "")
            except ResponseError as error:
                logger.warning(
                    "singleton_lease_url: it does not tell how it evicts keys: %s", error
                )
                return
        if policy.startswith(_EVICTING):
            raise StoreNotReady(
                f"singleton_lease_url: the server's maxmemory-policy is {policy}, by which it "
                "removes leases when its memory is full; set noeviction, or a volatile-… one"
            )

    def close(self) -> None:
        # Those in use as well, whichever release of the client library it is.
        self._client.connection_pool.disconnect()

    def _call(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        with _as_ours():
            return self._scripts.call(script, keys, arguments)


class RedisWishes:
    """What others than its holder can ask of a lease; each is one script call.

    :param call: of :class:`RedisStore`.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def ask_to_hand_over(self, row: Row, who: str) -> bool:
        return self._tell(row, "handoff_to", who)

    def let_go(self, row: Row) -> bool:
        return bool(self._call(scripts.LET_GO, [row.key], [row.holder or "", row.fence]))

    def want(self, row: Row, wish: str) -> bool:
        return self._tell(row, "wanted", wish)

    def wanted(self, key: str) -> str | None:
        found: str | None = self._call(scripts.WANTED, [key], [])
        return found

    def granted(self, key: str, wish: str) -> None:
        self._call(scripts.GRANTED, [key], [wish])

    def enqueue(self, key: str, task_id: str, life: float) -> str:
        return str(self._call(scripts.ENQUEUE, [key, INDEX], [task_id, life]))

    def expect(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._call(scripts.EXPECT, [key, INDEX], [])

    def put(self, key: str, new: NewValue) -> bool:
        raise AssertionError("a state is kept in SQL")

    def dequeue(self, key: str, task_id: str) -> None:
        self._call(scripts.DEQUEUE, [key], [task_id])

    def _tell(self, row: Row, field: str, what: str) -> bool:
        named = [row.holder or "", row.fence, field, what]
        return bool(self._call(scripts.TELL, [row.key], named))


def _listed(key: str, fields: Sequence[str], now: str) -> dict[str, Any]:
    """The arguments of a :class:`Listed`, from names and values in turn."""
    found = dict(zip(fields[::2], fields[1::2], strict=True))

    def number(name: str) -> float | None:
        return float(found[name]) if name in found else None

    expires_at, read_at = number("expires_at"), float(now)
    return {
        "key": key,
        "schema_version": None,
        "updated_at": number("updated_at"),
        "fence": int(found.get("fence", 0)),
        "holder": found.get("holder"),
        "task_id": found.get("task_id"),
        "acquired_at": number("acquired_at"),
        "expires_in": None if expires_at is None else expires_at - read_at,
        "run_count": int(found.get("run_count", 0)),
        "last_outcome": found.get("last_outcome"),
        "last_finished_at": number("last_finished_at"),
        "history": found.get("history"),
        "read_at": read_at,
    }


@contextmanager
def _as_ours() -> Iterator[None]:
    """:raises StoreUnavailable: for any error of the client's or the server's."""
    try:
        yield
    except RedisError as error:
        raise StoreUnavailable(one_line(error)) from error
