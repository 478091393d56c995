"""Leases in Redis: the properties of this store, and which of the two stores a singleton belongs
to.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.exceptions import ImproperlyConfigured, SoftTimeLimitExceeded

from celery_singleton_state import HeartbeatFailed, StateLoadFailed, singleton_task
from celery_singleton_state.beat import SingletonScheduler
from celery_singleton_state.lease.holder_files import HolderFiles, HolderRecord
from celery_singleton_state.migrations.upgrade import migrate
from celery_singleton_state.recovery import free_dead
from celery_singleton_state.runtime import close_runtime, runtime_of
from celery_singleton_state.startup import refuse_states_without_store
from celery_singleton_state.store.base import Ended, StoreNotReady, StoreUnavailable
from celery_singleton_state.store.redis.store import RedisStore
from celery_singleton_state.store.redis.url import client_for
from tests.helpers.sentinel import Replica, Sentinel
from tests.helpers.servers import Proxy, Valkey
from tests.helpers.waiting import wait_until
from tests.storm.fleet import port_of, through


@dataclass
class Counter:
    n: int = 0


@pytest.fixture
def make_app(tmp_path: Path, lease_url: str) -> Iterator[Callable[..., Celery]]:
    made: list[Celery] = []

    def make(**settings: Any) -> Celery:
        app = Celery("shop", broker="memory://", set_as_current=False)
        app.conf.update({"singleton_lease_url": lease_url, "singleton_heartbeat_interval": 2})
        app.conf.update(settings)
        made.append(app)
        return app

    yield make
    for app in made:
        close_runtime(app)


def fence_of(self: Any) -> int:
    """A task's body that returns the run's fence."""
    return int(self.fence)


def task_of(app: Celery, body: Callable[[Any], Any] = fence_of, **options: Any) -> Any:
    return singleton_task(app, **{"name": "task", "shared": False} | options)(body)


@pytest.fixture
def both(make_app: Callable[..., Celery], tmp_path: Path) -> Celery:
    """Return an app with a database for states and a Redis server for leases."""
    return make_app(singleton_store_url=f"sqlite:///{tmp_path}/store.db")


def test_a_run_is_two_calls(lease_url: str, make_app: Callable[..., Celery]) -> None:
    """The server counts the calls. No call sends the text of a script, which the server knows
    already.
    """
    task = task_of(make_app())
    task()
    with redis.Redis.from_url(lease_url, decode_responses=True) as client:
        client.config_resetstat()
        for _ in range(5):
            task()
        counted = client.info("commandstats")
    calls = {name: each["calls"] for name, each in counted.items()}
    assert calls["cmdstat_evalsha"] == 10
    assert "cmdstat_eval" not in calls
    assert "cmdstat_script|load" not in calls


def test_scripts_that_the_server_flushed_are_loaded_again(
    lease_url: str, make_app: Callable[..., Celery]
) -> None:
    def body(self: Any) -> int:
        with redis.Redis.from_url(lease_url) as client:
            client.script_flush()
        return int(self.fence)

    task = task_of(make_app(), body)
    assert task() < task()


def test_a_singleton_with_a_state_has_its_lease_in_sql(both: Celery, lease_url: str) -> None:
    stateful = task_of(both, name="stateful", state_schema=Counter)
    without = task_of(both, name="without")
    before = stateful(), without()
    with redis.Redis.from_url(lease_url, decode_responses=True) as client:
        assert client.keys("singleton-state:*") == ["singleton-state:without"]
        client.flushdb()
    # Redis has lost all its data. Both fences still grow: the one in SQL, and the one in Redis.
    assert stateful() > before[0]
    assert without() > before[1]


def test_singletons_of_both_stores_are_listed(both: Celery) -> None:
    for name, options in {"b": {"state_schema": Counter}, "a": {}, "c": {}}.items():
        task_of(both, name=name, **options)()
    runtime = runtime_of(both)
    listed = runtime.rows("singleton-state:")
    assert [(row.key.partition(":")[2], row.task) for row in listed] == [(n, n) for n in "abc"]
    assert {row.last_outcome for row in listed} == {"succeeded"}
    parts = runtime.by_store({row.key: row.task for row in listed})
    contents = [store.contents(list(keys), values=False) for store, keys in parts]
    assert sorted(map(len, contents)) == [1, 2]


def test_a_state_without_a_database_is_refused(make_app: Callable[..., Celery]) -> None:
    app = make_app()
    task_of(app)()
    stateful = task_of(app, name="stateful", state_schema=Counter)
    with pytest.raises(ImproperlyConfigured, match=r"task \S+ has a state_schema.*store_url"):
        refuse_states_without_store(runtime_of(app))
    with pytest.raises(ImproperlyConfigured, match="set singleton_store_url as well"):
        stateful()
    with pytest.raises(ImproperlyConfigured, match="set singleton_store_url as well"):
        SingletonScheduler(app).setup_schedule()
    assert not list(Path().glob("*.db*"))


def test_a_server_that_evicts_leases_is_refused(lease_url: str) -> None:
    store = RedisStore(lease_url, io_timeout=2.0)
    with redis.Redis.from_url(lease_url) as client:
        try:
            client.config_set("maxmemory-policy", "allkeys-lru")
            with pytest.raises(StoreNotReady, match="maxmemory-policy is allkeys-lru"):
                store.check()
            client.config_set("maxmemory-policy", "volatile-lru")
            store.check()
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    store.close()


@pytest.mark.parametrize(
    "url",
    ["http://host/0", "redis://host:port/0", "sentinel://host:26379", "sentinel://host:x/name"],
)
def test_a_malformed_url_is_refused(make_app: Callable[..., Celery], url: str) -> None:
    app = make_app(singleton_lease_url=url)
    with pytest.raises(ImproperlyConfigured, match="singleton_lease_url"):
        _ = runtime_of(app).store


def test_redis_is_refused_for_states(make_app: Callable[..., Celery], lease_url: str) -> None:
    app = make_app(singleton_store_url=lease_url)
    with pytest.raises(ImproperlyConfigured, match="singleton_lease_url takes it"):
        _ = runtime_of(app).store


def test_a_unix_socket_works(tmp_path: Path) -> None:
    server = Valkey()
    path = server.directory / "socket"
    server.stop()
    server._options = ("--unixsocket", str(path))
    server.start()
    store = RedisStore(f"redis+socket://{path}?db=3", io_timeout=2.0)
    assert store.acquire("k", "h", 60, None) is not None
    store.close()
    with redis.Redis(port=server.port, db=3) as client:
        assert client.exists("k")
    server.close()


def test_a_tls_url_makes_a_tls_connection() -> None:
    client = client_for("rediss://:secret@host:6380/2?ssl_cert_reqs=none")
    assert client.connection_pool.connection_class is redis.SSLConnection
    client.close()


def test_an_unavailable_server_raises_errors(make_app: Callable[..., Celery]) -> None:
    task = task_of(make_app(singleton_lease_url="redis://127.0.0.1:1/0"), max_retries=0)
    with pytest.raises(StateLoadFailed, match="ConnectionError"):
        task()


@pytest.fixture
def proxied(
    lease_url: str,
    make_app: Callable[..., Celery],
    make_proxy: Callable[[int], Proxy],
    tmp_path: Path,
) -> Iterator[tuple[Celery, Proxy]]:
    proxy = make_proxy(port_of(lease_url))
    url = f"sqlite:///{tmp_path}/store.db"
    yield make_app(singleton_lease_url=through(proxy, lease_url), singleton_store_url=url), proxy
    proxy.mode = "pass"


def test_a_silent_server_becomes_an_error(proxied: tuple[Celery, Proxy]) -> None:
    """The server receives every byte and answers none, for longer than a lease lives."""
    app, proxy = proxied
    task = task_of(app, max_retries=0)
    task()
    proxy.mode = "mute"
    with pytest.raises(StateLoadFailed, match="Timeout"):
        task()


def test_the_answer_to_acquire_is_lost(proxied: tuple[Celery, Proxy]) -> None:
    """The lease is acquired, but the holder does not know that. The holder repeats acquire, and
    gets the same fence.
    """
    app, proxy = proxied
    task = task_of(app)
    first = task()
    proxy.mode = "drop one answer"
    second = task()
    row = runtime_of(app).leases.peek("singleton-state:task")
    assert row is not None
    assert (first < second, row.fence, row.run_count) == (True, second, 2)


def test_the_answer_to_release_is_lost(proxied: tuple[Celery, Proxy]) -> None:
    """The run has released, but the answer is lost. The repeated release is refused, and the run
    finds its own end in the history.
    """
    app, proxy = proxied

    def body(self: Any) -> None:
        proxy.mode = "drop one answer"

    task_of(app, body)()
    row = runtime_of(app).leases.peek("singleton-state:task")
    assert row is not None
    assert (row.holder, row.run_count, row.last_outcome) == (None, 1, "succeeded")


def test_a_silent_redis_costs_no_lease_in_sql(proxied: tuple[Celery, Proxy]) -> None:
    """Leases in SQL are renewed even while the renewals of leases in Redis get no answer."""
    app, proxy = proxied

    def inner(self: Any) -> None:
        proxy.mode = "mute"
        held = self._run_for("test").held
        # Not ``lease_remaining``, which is 0 a moment before the heartbeat's thread finds the loss.
        wait_until(lambda: held.lost, "the lease in Redis is lost")

    def outer(self: Any) -> int:
        with pytest.raises(HeartbeatFailed):
            app.tasks["inner"]()
        self.state.n += 1
        return int(self.state.n)

    task_of(app, inner, name="inner", on_lease_lost="finish")
    assert task_of(app, outer, name="outer", state_schema=Counter)() == 1


def test_a_time_limit_in_mid_call_leaves_no_answer_behind(
    proxied: tuple[Celery, Proxy],
) -> None:
    app, proxy = proxied
    store = runtime_of(app).leases
    assert store is not None
    task_of(app)()

    def interrupt(*_: Any) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        proxy.mode = "mute"
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(SoftTimeLimitExceeded):
            store.acquire("singleton-state:task", "h", 60, None)
    finally:
        signal.signal(signal.SIGALRM, before)
    proxy.mode = "pass"
    row = store.peek("singleton-state:task")
    assert row is not None
    assert row.last_outcome == "succeeded"


@pytest.fixture
def kept(lease_url: str) -> Iterator[RedisStore]:
    """Open a store that has a connection already."""
    store = RedisStore(lease_url, io_timeout=5.0)
    store.requests.expect({"first": "t"})
    yield store
    store.close()


def test_a_connection_that_the_server_has_closed_is_not_used(
    kept: RedisStore, lease_url: str
) -> None:
    with redis.Redis.from_url(lease_url) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    assert kept.acquire("k", "h", 60, None) is not None


@pytest.mark.parametrize("moment", ["first", "again"])
def test_a_time_limit_while_connecting_leaves_no_half_made_connection(
    lease_url: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The time limit interrupts the client before it has selected its database. The next call must
    use that database, and not database 0.
    """
    store = RedisStore(lease_url, io_timeout=5.0)
    if moment == "again":
        store.requests.expect({"first": "t"})
        with redis.Redis.from_url(lease_url) as client:
            client.client_kill_filter(_type="normal", skipme=True)
    send = redis.Connection.send_command

    def interrupt(self: Any, *words: Any, **options: Any) -> None:
        if words[0] == "SELECT":
            monkeypatch.undo()
            raise SoftTimeLimitExceeded
        send(self, *words, **options)

    monkeypatch.setattr(redis.Connection, "send_command", interrupt)
    with pytest.raises(SoftTimeLimitExceeded):
        store.acquire("k", "h", 60, None)
    assert store.acquire("k", "h", 60, None) is not None
    store.close()
    with redis.Redis.from_url(lease_url) as client:
        assert client.exists("k")


def test_a_forked_process_has_a_connection_of_its_own(kept: RedisStore) -> None:
    """Parent and child acquire leases at the same time. Neither may get the other's answer."""
    child = multiprocessing.get_context("fork").Process(
        target=acquire_and_release, args=(kept, "child")
    )
    child.start()
    acquire_and_release(kept, "parent")
    child.join(30)
    assert child.exitcode == 0
    acquire_and_release(kept, "afterwards")


def test_threads_share_a_store(kept: RedisStore) -> None:
    """One thread uses the ready connection, and the others use the pool. None may get another's
    answer.
    """
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: acquire_and_release(kept, name), "abcd"))


def acquire_and_release(store: RedisStore, name: str) -> None:
    """Acquire and release some leases twice each, and check that each answer is for this caller."""
    for number in range(100):
        key, fence = f"{name}-{number}", 0
        for holder in ("first", "second"):
            acquired = store.acquire(key, f"{name}-{holder}", 60, None)
            assert acquired is not None
            assert acquired.lease.key == key
            assert acquired.lease.fence > fence
            fence = acquired.lease.fence
            assert store.release(acquired.lease, Ended("succeeded", f"[{number}]", 0.0))
        row = store.peek(key)
        assert row is not None
        assert (row.key, row.fence, row.history) == (key, fence, f"[{number}]")


def test_a_store_finds_the_new_master_by_sentinel() -> None:
    """The master is killed; the replica becomes the master. The leases that the replica has copied
    are renewed.
    """
    master = Valkey()
    replica = Replica(master.port)
    sentinel = Sentinel(master)
    store = RedisStore(sentinel.url, io_timeout=2.0)
    try:
        acquired = store.acquire("k", "h", 60, None)
        assert acquired is not None
        with redis.Redis(port=replica.port) as client:
            wait_until(lambda: client.exists("k"), "the replica has the lease")
        master.stop(signal.SIGKILL)
        wait_until(lambda: sentinel.master_port() == replica.port, "the replica is the master")

        def renewed() -> bool:
            try:
                return store.renew([acquired.lease]) == {"k": None}
            except StoreUnavailable:
                return False

        wait_until(renewed, "the lease is renewed")
        assert store.acquire("k", "another", 60, None) is None
    finally:
        store.close()
        for server in (sentinel, replica, master):
            server.close()


def test_prune_removes_unused_keys_only(lease_url: str) -> None:
    """Keys that were unused for longer than the given age are removed. A key with a lease (even an
    expired one), a pending run or a queued message is kept.
    """
    store = RedisStore(lease_url, io_timeout=2.0)
    for key in ("t:old", "t:held", "t:pending", "t:queued", "t:new", "u:old"):
        taken = store.acquire(key, "h", 60, None)
        assert taken is not None
        if key == "t:pending":
            row = store.peek(key)
            assert row is not None
            assert store.requests.request_run(row, "w")
        if key != "t:held":
            store.release(taken.lease, Ended("succeeded", "[]"))
    assert store.requests.claim("t:queued", "id", 60, store.requests.queued("t:queued").number)
    with redis.Redis.from_url(lease_url) as client:
        for key in ("t:old", "t:held", "t:pending", "t:queued", "u:old"):
            for column in ("updated_at", "last_finished_at", "expires_at"):
                if client.hexists(key, column):
                    client.hset(key, column, "946684800")
    assert list(store.unused("t:", 3600)) == ["t:old"]
    assert store.prune(["t:old", "t:held", "t:pending", "t:queued", "t:new"], 3600) == ["t:old"]
    assert [row.key for row in store.list("")] == [
        *("t:held", "t:new", "t:pending", "t:queued", "u:old"),
    ]
    assert store.prune([], 3600) == []
    store.close()


def test_migrate_without_a_database_is_refused(make_app: Callable[..., Celery]) -> None:
    with pytest.raises(ImproperlyConfigured, match="set singleton_store_url as well"):
        migrate(runtime_of(make_app()).settings)


def test_the_lease_of_a_dead_process_and_unknown_task_is_freed(
    make_app: Callable[..., Celery],
) -> None:
    """The dead process's file names a task that this app has renamed or removed, so the app cannot
    tell by the task in which store the lease is.
    """
    app = make_app()
    task_of(app)()
    runtime = runtime_of(app)
    key, holder = "singleton-state:renamed", "h@h:1:abcdef.1"
    (store,) = runtime.stores
    assert store.acquire(key, holder, 600, None)
    dead = HolderFiles(runtime.holder_files.directory, "1-abcdef")
    dead.note(HolderRecord(key, holder, 0))
    # Release the lock of the dead process's file, as its death does.
    dead.leave_to_parent()
    assert free_dead(runtime) == 1
    row = store.peek(key)
    assert row is not None
    assert (row.holder, row.last_outcome) == (None, "lost")
