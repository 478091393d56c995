"""Keep leases in Redis or Valkey, for singletons without state. Most methods are one script call.

Redis can lose a lease after it has acknowledged it: by a failover to a replica that had not
received the lease yet, or by a restart from an old data file. Then the lease is free while its
holder still runs, so that a second run can begin. The two runs are active together until the first
run's next renewal is refused, and could overwrite each other's state. So states are never kept in
Redis. Even after such a loss no fence is given out twice, because a new fence is never smaller than
the server's clock in milliseconds.
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

#: The key of the sorted set that holds the keys of all singletons.
INDEX = "celery-singleton-keys"
#: The largest number of singletons that one script reads. The number is limited because the server
#: serves no other client while a script runs.
PAGE = 200
#: The beginning of the names of some maxmemory-policies. With such a policy a server whose memory
#: is full removes keys without an expiry, and so singletons. Such a server is refused.
_EVICTING = "allkeys"


class RedisStore:
    """A store that keeps leases on one Redis or Valkey server.

    :param url: the server's URL, see :func:`~celery_singleton_state.store.redis.url.client_for`.
    :param io_timeout: seconds that connecting or an answer may take. After a time-out the store
        does not repeat the request, because only the caller knows for how long a repetition is
        useful.
    :raises ImproperlyConfigured: the URL cannot be used.
    """

    def __init__(self, url: str, io_timeout: float) -> None:
        connect = partial(
            client_for,
            url,
            decode_responses=True,
            # Read texts that are not UTF-8, too: another program can have written such a key, and
            # it must not make a list of singletons fail.
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
                    "the fence is at its largest, so that no run can get a larger one "
                    f"({error}). If no other system compares this singleton's fences, let them "
                    f"begin anew from the clock: HDEL '{key}' newest and HSET '{key}' fence 0"
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
        """Check that the server answers, runs scripts, and does not remove leases.

        :param prefixes: without effect: Redis accepts keys with any prefix.
        :raises StoreMisconfigured: the server is a cluster, removes leases when its memory is full,
            or does not let this user run the scripts.
        :raises StoreUnavailable: the server does not answer, or is a replica.
        """
        with _store_errors():
            try:
                _check_info(self._scripts.info())
            except ResponseError as error:
                if was_connecting(error):
                    raise
                logger.warning(
                    "singleton_lease_url: the server refuses INFO, so it is not known whether it "
                    "is a cluster, or evicts leases when its memory is full: %s",
                    error,
                )
        # Try a script, because the server may refuse scripts to this user, or be a replica.
        self._call(scripts.UNUSED, [INDEX], ["", "", 1, 0])

    def close(self) -> None:
        self._scripts.close()

    def _call(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        try:
            with _store_errors():
                return self._scripts.call(script, keys, arguments)
        except StoreUnavailable as error:
            size = max(
                (len(each.encode()) for each in arguments if isinstance(each, str)), default=0
            )
            if size > LEAST_LARGEST and size > self._largest():
                raise StoreRefusesValue(
                    f"a text of {size} bytes is larger than the server's proto-max-bulk-len: "
                    f"{error}"
                ) from error
            raise

    def _largest(self) -> int:
        """Return the size of the largest text that the server accepts, in bytes.

        If a text is larger, the server may close the connection without naming this reason.
        """
        with _store_errors():
            return self._scripts.largest()

    def _pages(self, script: str, prefix: str, *more: Any) -> Iterator[tuple[str, Sequence[Any]]]:
        """Call a script for one page of keys after the other, in the order of the keys.

        Yields, for each page, the server's time and the page's items. Other clients can change keys
        between two pages.

        :param more: further arguments of the script.
        """
        after: str | None = ""
        while after is not None:
            now, after, found = self._call(script, [INDEX], [prefix, after, PAGE, *more])
            yield now, found


class RedisRequests:
    """The requests about a lease that do not come from its holder. Most requests are one script
    call.

    :param call: the method of :class:`RedisStore` that calls a script.
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
    """Make a dict from a list in which names and values alternate, as Redis returns a hash."""
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
    """Return the arguments for a :class:`Listed`, from the fields of a singleton's hash.

    :param now: the server's time when the hash was read, in seconds since 1970.
    """
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
    """Refuse a server that is a cluster, or that may remove leases when its memory is full.

    :param info: the server's answer to INFO.
    :raises StoreMisconfigured: the server is refused.
    """
    if info.get("cluster_enabled") == "1" or info.get("redis_mode") == "cluster":
        raise StoreMisconfigured(f"singleton_lease_url points to a Redis Cluster: {NO_CLUSTER}")
    policy = info.get("maxmemory_policy", "")
    if policy.startswith(_EVICTING):
        raise StoreMisconfigured(
            f"singleton_lease_url: the server's maxmemory-policy is {policy}, by which it "
            "removes leases when its memory is full; set noeviction, or a volatile-… policy"
        )


@contextmanager
def _store_errors() -> Iterator[None]:
    """Turn an error that the client library raises in the block into a store error.

    :raises StoreError: an error of the client or of the server.
    """
    try:
        yield
    except (RedisError, UnicodeError) as error:
        raise as_store_error(error) from error
