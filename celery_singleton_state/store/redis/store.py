"""Leases in Redis or Valkey, for singletons without a state: one script call a verb.

Redis can lose a lease after it acknowledged it: by a failover to a replica that had not received it
yet, or by a restart without its file. Then the lease is free while its holder runs, and two runs
are active until the first run's next renewal is refused. So a state, which must never be
overwritten, is not kept here. No fence is given twice, because a fence is never smaller than the
server's clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from celery_singleton_state.keys import KEY_PREFIX
from celery_singleton_state.state.codec import NO_STATE
from celery_singleton_state.store.base import (
    Acquired,
    Ended,
    Lease,
    Listed,
    NewValue,
    Queued,
    Released,
    Row,
    SeenTicks,
    StoreMisconfigured,
    StoreRefusesValue,
    StoreUnavailable,
    Write,
    seen,
)
from celery_singleton_state.store.connecting import was_connecting
from celery_singleton_state.store.odd_values import number, whole_number
from celery_singleton_state.text.storable import restored, storable
from celery_singleton_state.text.visible import logger_of

from . import scripts as scripts
from .calls import LEAST_LARGEST, ScriptCalls
from .errors import NO_CLUSTER, as_store_error, is_overflow
from .url import client_for

logger = logger_of(__name__)

T = TypeVar("T")

#: The sorted set of all keys.
INDEX = "celery-singleton-keys"
#: How many singletons one script reads at most. The server does nothing else meanwhile.
PAGE = 200
#: Policies by which a server whose memory is full removes keys without an expiry.
_EVICTING = "allkeys"


class RedisStore:
    """Leases on a server.

    :param url: of :func:`~celery_singleton_state.store.redis.url.client_for`.
    :param io_timeout: seconds that connecting or an answer may take. There are no tries beyond the
        first: whoever asks knows for how long it is worth to ask again.
    :raises ImproperlyConfigured: the URL cannot be used.
    """

    def __init__(self, url: str, io_timeout: float) -> None:
        connect = partial(
            client_for,
            url,
            decode_responses=True,
            # A key that somebody wrote in another encoding is one odd key.
            encoding_errors="surrogateescape",
            socket_timeout=io_timeout,
            socket_connect_timeout=io_timeout,
            retry=Retry(NoBackoff(), 0),
        )
        self._scripts = ScriptCalls(connect)
        self.requests = RedisRequests(self._call)

    def acquire(
        self,
        key: str,
        holder: str,
        ttl: float,
        task_id: str | None,
        rank: int = 0,
        sent: str | None = None,
        task: str | None = None,
    ) -> Acquired | None:
        named = [holder, ttl, storable(task_id) or "", rank, sent or "", storable(task) or ""]
        try:
            found = self._call(scripts.ACQUIRE, [key, INDEX], named)
        except StoreRefusesValue as error:
            if is_overflow(error.__cause__):
                raise StoreRefusesValue(
                    "the fence is at its largest, so that no run can be given a larger one "
                    f"({error}); to begin anew from the clock, if nothing outside compares its "
                    f"fences: HDEL '{key}' newest and HSET '{key}' fence 0"
                ) from error.__cause__
            raise
        if found is None:
            return None
        fence, history, acquired_at, write, ticks_done = found
        lease = Lease(key, holder, int(fence), ttl)
        since = float(acquired_at)
        return Acquired(lease, NO_STATE, None, history, since, int(write), ticks_done)

    def renew(self, leases: Sequence[Lease]) -> dict[str, str | None]:
        renewed: dict[str, str | None] = {}
        for some in _in_pages(leases):
            keys = [lease.key for lease in some]
            named = [part for lease in some for part in (lease.holder, lease.fence, lease.ttl)]
            found = self._call(scripts.RENEW, keys, named)
            answers = zip(keys, found, strict=True)
            renewed |= {
                key: handoff_to or None for key, handoff_to in answers if handoff_to is not None
            }
        return renewed

    def give_back(self, key: str, holder: str) -> Released | None:
        return _released(self._call(scripts.GIVE_BACK, [key], [holder]))

    def release(self, lease: Lease, ended: Ended, write: Write | None = None) -> Released | None:
        assert write is None, "a state is kept in SQL"
        named = [lease.holder, lease.fence, ended.outcome, ended.history, ended.hold]
        named.append(ended.ticks_done or "")
        return _released(self._call(scripts.RELEASE, [lease.key], named))

    def peek(self, key: str) -> Row | None:
        now, fields = self._call(scripts.PEEK, [key], [])
        return seen(_row(key, fields, now)) if fields else None

    def list(self, prefix: str, also: str = "") -> Sequence[Listed]:
        return [
            seen(Listed(**_listed(key, _by_name(fields), now)))
            for now, found in self._pages(scripts.LIST, prefix)
            for key, fields in found
        ]

    def contents(
        self, keys: Sequence[str], values: bool
    ) -> dict[str, tuple[str | None, str | None]]:
        value = NO_STATE if values else None
        return {
            key: (history, value)
            for some in _in_pages(keys)
            for key, history in zip(some, self._call(scripts.HISTORIES, some, []), strict=True)
        }

    def ticks(self, keys: Sequence[str]) -> dict[str, SeenTicks]:
        return {
            key: SeenTicks(bool(held), restored(task_id), ticks_done)
            for some in _in_pages(keys)
            for key, found in zip(some, self._call(scripts.TICKS, some, []), strict=True)
            if found is not None
            for held, task_id, ticks_done in [found]
        }

    def unused(self, prefix: str, older_than: float) -> Mapping[str, str | None]:
        pages = self._pages(scripts.UNUSED, prefix, older_than)
        return {key: restored(task) for _, found in pages for key, task in found}

    def prune(self, keys: Sequence[str], older_than: float) -> Sequence[str]:
        return [
            key
            for some in _in_pages(keys)
            for key in self._call(scripts.PRUNE, [*some, INDEX], [older_than])
        ]

    def check(self, prefixes: Sequence[str] = (KEY_PREFIX,)) -> None:
        """See that the server answers, runs scripts and keeps what it is told.

        It can have keys with any prefix.

        :raises StoreMisconfigured: it is a cluster, removes leases when its memory is full, or
            refuses the scripts to this user.
        :raises StoreUnavailable: it does not answer, or is a replica.
        """
        with _as_ours():
            try:
                _check_info(self._scripts.info())
            except ResponseError as error:
                if was_connecting(error):
                    raise
                logger.warning(
                    "singleton_lease_url: the server does not say whether it is a cluster, nor "
                    "how it evicts keys: %s",
                    error,
                )
        # Scripts may be refused to this user; and a replica refuses them.
        self._call(scripts.UNUSED, [INDEX], ["", "", 1, 0])

    def close(self) -> None:
        self._scripts.close()

    def _call(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        try:
            with _as_ours():
                return self._scripts.call(script, keys, arguments)
        except StoreUnavailable as error:
            size = max(
                (len(each.encode()) for each in arguments if isinstance(each, str)), default=0
            )
            if size > LEAST_LARGEST and size > self._largest():
                raise StoreRefusesValue(
                    f"the server takes no text of {size} bytes, see its proto-max-bulk-len: {error}"
                ) from error
            raise

    def _largest(self) -> int:
        """Bytes of the largest text. The server closes the connection over a larger one."""
        with _as_ours():
            return self._scripts.largest()

    def _pages(self, script: str, prefix: str, *more: Any) -> Iterator[tuple[str, Sequence[Any]]]:
        """The server's time and what a script finds, page by page, in the order of the keys.

        Each page is of its own moment.
        """
        after: str | None = ""
        while after is not None:
            now, after, found = self._call(script, [INDEX], [prefix, after, PAGE, *more])
            yield now, found


class RedisRequests:
    """What others than its holder can ask of a lease; each is one script call.

    :param call: of :class:`RedisStore`.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def request_handoff(
        self, row: Row, handoff_to: str, rank: int | None = None, sent: str | None = None
    ) -> bool:
        rank = row.next_rank if rank is None else rank
        return self._request(
            scripts.REQUEST_HANDOFF, row, storable(handoff_to), str(rank), sent or ""
        )

    def release_early(self, row: Row) -> bool:
        return self._request(scripts.RELEASE_EARLY, row)

    def request_run(self, row: Row, pending_run: str) -> bool:
        return self._request(scripts.REQUEST_RUN, row, row.wanted or "", pending_run)

    def wanted(self, key: str) -> str | None:
        found: str | None = self._call(scripts.WANTED, [key], [])
        return found

    def pending_run_sent(self, key: str, pending_run: str) -> None:
        self._call(scripts.PENDING_RUN_SENT, [key], [pending_run])

    def queued(self, key: str) -> Queued:
        number, queued, running = self._call(scripts.QUEUED, [key], [])
        is_running = not queued and running is not None
        return Queued(int(number), restored(queued or running), is_running)

    def claim(
        self,
        key: str,
        task_id: str,
        life: float,
        number: int,
        first: bool = False,
        task: str | None = None,
    ) -> bool:
        arguments = [storable(task_id), life, number, int(first), storable(task) or ""]
        return bool(self._call(scripts.CLAIM, [key, INDEX], arguments))

    def expect(self, tasks: Mapping[str, str]) -> None:
        for key, task in tasks.items():
            self._call(scripts.EXPECT, [key, INDEX], [storable(task)])

    def put(self, key: str, seen: Row | None, new: NewValue, task: str | None = None) -> bool:
        raise AssertionError("a state is kept in SQL")

    def dequeue(self, key: str, task_id: str, task: str | None = None) -> None:
        self._call(scripts.DEQUEUE, [key, INDEX], [storable(task_id), storable(task) or ""])

    def _request(self, script: str, row: Row, *more: str) -> bool:
        return bool(self._call(script, [row.key], [row.holder or "", row.fence, *more]))


def _in_pages(all_of_them: Sequence[T]) -> Iterator[Sequence[T]]:
    for first in range(0, len(all_of_them), PAGE):
        yield all_of_them[first : first + PAGE]


def _released(wanted: str | None) -> Released | None:
    return None if wanted is None else Released(wanted or None)


def _by_name(fields: Sequence[str]) -> dict[str, str]:
    """From names and values in turn."""
    return dict(zip(fields[::2], fields[1::2], strict=True))


def _row(key: str, fields: Sequence[str], now: str) -> Row:
    found = _by_name(fields)
    queued_until = number(found.get("queued_until"))
    queued_in = None if queued_until is None else queued_until - float(now)
    return Row(
        **_listed(key, found, now),
        value=NO_STATE,
        write=whole_number(found.get("write")),
        wanted=found.get("wanted"),
        ticks_done=found.get("ticks_done"),
        queue=whole_number(found.get("queue")),
        queued_task_id=found.get("queued_task_id") if (queued_in or 0.0) > 0 else None,
        queued_in=queued_in,
        handoff_to=found.get("handoff_to"),
        newest=whole_number(found.get("newest")),
        newest_sent=found.get("newest_sent"),
    )


def _listed(key: str, found: Mapping[str, str], now: str) -> dict[str, Any]:
    """The arguments of a :class:`Listed`."""
    free_at, read_at = number(found.get("expires_at") or found.get("hold_until")), float(now)
    return {
        "key": key,
        "task": found.get("task"),
        "schema_version": None,
        "updated_at": number(found.get("updated_at")),
        "fence": whole_number(found.get("fence")),
        "holder": found.get("holder"),
        "task_id": found.get("task_id"),
        "acquired_at": number(found.get("acquired_at")),
        "expires_in": None if free_at is None else free_at - read_at,
        "run_count": whole_number(found.get("run_count")),
        "last_outcome": found.get("last_outcome"),
        "last_finished_at": number(found.get("last_finished_at")),
        "history": found.get("history"),
        "read_at": read_at,
    }


def _check_info(info: Mapping[str, str]) -> None:
    """:raises StoreMisconfigured: the server is a cluster, or may remove leases."""
    if info.get("cluster_enabled") == "1" or info.get("redis_mode") == "cluster":
        raise StoreMisconfigured(f"singleton_lease_url is that of a Redis Cluster: {NO_CLUSTER}")
    policy = info.get("maxmemory_policy", "")
    if policy.startswith(_EVICTING):
        raise StoreMisconfigured(
            f"singleton_lease_url: the server's maxmemory-policy is {policy}, by which it "
            "removes leases when its memory is full; set noeviction, or a volatile-… one"
        )


@contextmanager
def _as_ours() -> Iterator[None]:
    """:raises StoreError: for any error of the client's or the server's."""
    try:
        yield
    except (RedisError, UnicodeError) as error:
        raise as_store_error(error) from error
