"""Call every function of a store once, to test what a role, server or process may do with it."""

from __future__ import annotations

from celery_singleton_state import KeyValueStore
from celery_singleton_state.store.base import Acquired, Ended, NewValue, SeenTicks
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.writes import enqueue, write

DONE = Ended("succeeded", "[]")
NEW = NewValue('{"n":1}', 1)


def use_all(store: SqlStore) -> None:
    """Call the store's own functions, its requests to other holders' rows, and its functions for
    entries.
    """
    store.check()
    lease = acquire(store, "a").lease
    other = acquire(store, "a", key="k2").lease
    assert store.renew([lease]) == {"k": None}
    assert store.renew([lease, other]) == {"k": None, "k2": None}
    assert store.save(lease, write(NEW))
    with store.transaction() as transaction:
        assert transaction.save(lease, write(NEW, 2))
    assert store.written(lease, 2)
    row = store.peek("k")
    assert row is not None
    assert (row.value, row.fence, row.write) == (NEW.value, lease.fence, 2)
    assert [row.key for row in store.list("k")] == ["k", "k2"]
    assert store.contents(["k"], values=True) == {"k": (None, NEW.value)}
    assert store.ticks(["k", "none"]) == {"k": SeenTicks(True, "task-a", None)}

    requests = store.requests
    assert requests.request_handoff(row, "b", row.next_rank, "sent")
    assert requests.request_run(row, "{}")
    assert requests.wanted("k") == "{}"
    requests.pending_run_sent("k", "{}")
    assert store.release(lease, DONE, write(NEW, 3))
    assert enqueue(requests, "k", "task", 60) == "task"
    requests.dequeue("k", "task")
    assert requests.put("k", store.peek("k"), NEW)
    requests.expect({"k": "t", "k3": "t"})
    assert store.release(other, Ended("succeeded", "[]", hold=60))
    in_hold_period = store.peek("k2")
    assert in_hold_period is not None
    assert requests.release_early(in_hold_period)
    store.set_aside("k4", "broken")
    assert acquire(store, "b").lease.fence > lease.fence
    assert store.give_back("k", "b")

    leader = acquire(store, "beat", key="beat").lease
    assert store.entries.record(leader, {"beat:a": "1", "beat:b": "2"}, 1, 0) is not None
    assert store.entries.forget(leader, ["beat:a"], 2, 1)
    assert store.entries.load("beat:") == {"beat:b": "2"}


def acquire(store: SqlStore, holder: str, key: str = "k") -> Acquired:
    acquired = store.acquire(key, holder, 60, f"task-{holder}")
    assert acquired is not None
    return acquired


def use_all_values(kv: KeyValueStore) -> None:
    """Call every function of a key-value store."""
    kv = kv.prefix("values:")
    kv.set("k", 1)
    kv.set_bytes("b", b"2")
    assert kv.modify("k", lambda n: n + 1) == 2
    assert (kv.get("k"), kv.get_bytes("b"), kv.has("k"), kv.size()) == (2, b"2", True, 2)
    assert kv.remove("b")
    kv.clear()
    assert kv.is_empty()
