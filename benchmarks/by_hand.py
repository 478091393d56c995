"""Two ways to keep a counter from run to run without this package.

Both have one counter per slot, and protect it with a lock in Redis.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import psycopg
import redis
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

metadata = sa.MetaData()
states = sa.Table(
    "states_by_hand",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
)


def make_engine(url: str) -> sa.Engine:
    """Return an engine with SQLAlchemy's defaults."""
    return sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:", 1))


def prepare(url: str) -> None:
    """Make the table of the states."""
    engine = make_engine(url)
    metadata.create_all(engine)
    engine.dispose()


class LockAndTable:
    """redis-py's lock, SQLAlchemy Core and a table, combined as in a typical project.

    The lock expires and is not renewed. Nothing stops a late run from writing.
    """

    def __init__(self, database: str, broker: str) -> None:
        self._engine = make_engine(database)
        self._redis = redis.Redis.from_url(broker)
        dialect = sqlite if self._engine.dialect.name == "sqlite" else postgresql
        self._insert: Any = dialect.insert

    def run(self, slot: int, body: Callable[[], None]) -> None:
        """Run a body under the lock, and count the run. Skip it if the slot is locked."""
        key = f"counter-{slot}"
        lock = self._redis.lock(f"lock-{key}", timeout=8)
        if not lock.acquire(blocking=False):
            return
        try:
            state = self._load(key)
            body()
            state["count"] += 1
            self._save(key, state)
        finally:
            lock.release()

    def _load(self, key: str) -> dict[str, int]:
        with self._engine.connect() as connection:
            value = connection.scalar(sa.select(states.c.value).where(states.c.key == key))
        return json.loads(value) if value else {"count": 0}

    def _save(self, key: str, state: dict[str, int]) -> None:
        row = {"value": json.dumps(state), "updated_at": datetime.now(UTC)}
        upsert = self._insert(states).values(key=key, **row)
        with self._engine.begin() as connection:
            connection.execute(upsert.on_conflict_do_update(index_elements=["key"], set_=row))


class BareStatements:
    """The least that a lock and a state can cost: two SQL statements and two scripts.

    The statements are prepared and run in autocommit mode, on one connection that is kept. Only the
    drivers are used, and no failure is handled.
    """

    TAKE = "return redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', 8000)"
    GIVE = (
        "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end "
        "return 0"
    )
    LOAD = "SELECT value FROM states_by_hand WHERE key = %s"
    SAVE = (
        "INSERT INTO states_by_hand (key, value, updated_at) VALUES (%s, %s, clock_timestamp()) "
        "ON CONFLICT (key) DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at"
    )

    def __init__(self, database: str, broker: str) -> None:
        connection = psycopg.connect(database, autocommit=True, prepare_threshold=0)
        self._cursor = connection.cursor()
        client = redis.Redis.from_url(broker)
        self._take = client.register_script(self.TAKE)
        self._give = client.register_script(self.GIVE)

    def run(self, slot: int, body: Callable[[], None]) -> None:
        """Run a body under the lock, and count the run. Skip it if the slot is locked."""
        key, holder = f"counter-{slot}", secrets.token_hex(8)
        if not self._take([f"lock-{key}"], [holder]):
            return
        row = self._cursor.execute(self.LOAD, [key]).fetchone()
        state = json.loads(row[0]) if row else {"count": 0}
        body()
        state["count"] += 1
        self._cursor.execute(self.SAVE, [key, json.dumps(state)])
        self._give([f"lock-{key}"], [holder])
