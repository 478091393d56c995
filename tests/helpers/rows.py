"""A singleton's row, and short functions for what tests do with its lease."""

from __future__ import annotations

from celery_singleton_state.store.base import Acquired, Ended, Leases, NewValue, Released, Row
from tests.helpers.waiting import wait_until

LONG = 60.0
BRIEF = 0.2
#: The tolerance in seconds when times are compared, because they are floating-point numbers.
ROUNDING = 0.01
#: The tolerance in seconds when a statement reads the database's clock twice. A busy machine may
#: stop the database in between.
STALL = 3.0
NEW, NEWER = NewValue('{"n":1}', 1), NewValue('{"n":2}', 1)
DONE = Ended("succeeded", "[]")
WITH_HOLD_PERIOD = Ended("succeeded", "[]", hold=LONG)
FREED = Released(wanted=None)
#: Maps each server to a query that returns how many statements wait for a lock.
WAITING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'",
}


def acquire(store: Leases, holder: str = "a", ttl: float = LONG, key: str = "k") -> Acquired:
    acquired = store.acquire(key, holder, ttl, f"task-{holder}")
    assert acquired is not None
    return acquired


def peek(store: Leases, key: str = "k") -> Row:
    row = store.peek(key)
    assert row is not None
    return row


def let_expire(store: Leases, key: str = "k") -> None:
    """Wait until the lease has expired by the store's own clock."""

    def has_expired() -> bool:
        row = peek(store, key)
        return row.expires_in is not None and not row.held

    wait_until(has_expired, "the lease expires")
