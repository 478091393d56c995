"""MariaDB and MySQL: each verb is a short transaction, sent as one text, in one round trip.

They have no ``UPDATE … RETURNING``, and MySQL has none at all; so what is written is read back
before the transaction's end, while its row is locked. Four rules of theirs shape the texts:

- Assignments are carried out from left to right, and each sees those before it. So what a condition
  reads is assigned last.
- A row that a statement only looks at on its way is locked by it as well, and small tables are
  looked at whole. So in a join the table comes last, and by its key.
- A condition that stands in several assignments is judged anew in each. So the time is taken once,
  after the row is locked, into a variable.
- With ``REPEATABLE READ``, the default, who asks for a row that is not there locks the gap where it
  would be, and two who do so wait for each other. So it is ``READ COMMITTED`` here.

``ROW_COUNT()`` tells whether the statement before it found a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Dialect, Table

from .statements import ENDED, FREE, HELD, HELD_ON, NEW_VALUE, UNUSED, Statements
from .words import MYSQL, MYSQL_ENTRIES

_TRANSACTION = """
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
{statements};
COMMIT
"""

_LOCK = """
SELECT 1 FROM {table} WHERE {key} = :key FOR UPDATE;
SET @singleton_now = CAST({now} AS DATETIME(6));
"""

_NOW = "CAST(@singleton_now AS DATETIME(6))"

_LATER = f"{_NOW} + INTERVAL :ttl SECOND"

_IS_FREE = f"(holder IS NULL OR holder = :holder OR expires_at <= {_NOW} OR expires_at IS NULL)"

_ACQUIRE = f"""
{_LOCK}
INSERT INTO {{table}}
  ({{key}}, value, updated_at, fence, holder, task_id, acquired_at, expires_at)
VALUES (:key, 'null', {_NOW}, 1, :holder, :task_id, {_NOW}, {_LATER})
ON DUPLICATE KEY UPDATE
  fence = IF({_IS_FREE}, IF(holder = :holder, fence, coalesce(fence, 0) + 1), fence),
  task_id = IF({_IS_FREE}, :task_id, task_id),
  acquired_at = IF({_IS_FREE}, {_NOW}, acquired_at),
  handoff_to = IF({_IS_FREE}, NULL, handoff_to),
  queued_until = IF({_IS_FREE} AND queued_task_id = :task_id, NULL, queued_until),
  holder = IF({_IS_FREE}, :holder, holder),
  expires_at = IF(holder = :holder, {_LATER}, expires_at);
SELECT fence, value, schema_version, history, {{acquired_at}}
FROM {{table}} WHERE {{key}} = :key AND holder = :holder
"""

_SAVE = (
    f"""
UPDATE {{table}} SET value = :value, schema_version = :schema_version, updated_at = {{now}},
  expires_at = {{later}}
{HELD}
""",
    "SELECT {updated_at}, handoff_to FROM {table} WHERE {key} = :key AND ROW_COUNT() = 1",
)

_RELEASE = f"""
UPDATE {{table}} SET {{new_value}} {{lease}} {ENDED} {HELD};
SELECT wanted FROM {{table}} WHERE {{key}} = :key AND ROW_COUNT() = 1
"""

# By another holder's name, so that what its run sent before, and repeats, is refused.
_KEPT = f"""
  expires_at = CASE WHEN {{hold_until}} > {{now}} THEN {{hold_until}} END,
  holder = CASE WHEN expires_at IS NOT NULL THEN concat(holder, '{HELD_ON}') END,
  task_id = NULL, acquired_at = NULL,
"""

_RENEWABLE = """
{held} STRAIGHT_JOIN {table} AS seen FORCE INDEX (PRIMARY)
  ON seen.{key} = held_key AND seen.fence = held_fence AND seen.holder = held_holder
"""

# Those that are locked by now are renewed; one that was let go meanwhile may be as well, and is not
# in the answer.
_RENEW = """
SELECT seen.{key}, seen.handoff_to FROM {renewable} FOR UPDATE {waits};
UPDATE (SELECT held_key, held_ttl FROM {renewable} FOR UPDATE {waits}) AS locked
STRAIGHT_JOIN {table} AS mine FORCE INDEX (PRIMARY) ON mine.{key} = held_key
SET mine.expires_at = {held_later}
"""

_SET_ASIDE = """
INSERT INTO {table} ({key}, value, updated_at) VALUES (:key, :value, {now})
ON DUPLICATE KEY UPDATE updated_at = updated_at
"""

_IS_NOT_QUEUED = f"""(
  (queued_until IS NULL OR queued_until <= {_NOW})
  AND (task_id IS NULL OR expires_at IS NULL OR expires_at <= {_NOW})
)"""

_ENQUEUE = f"""
{_LOCK}
INSERT INTO {{table}} ({{key}}, value, updated_at, fence, queued_task_id, queued_until)
VALUES (:key, 'null', {_NOW}, 0, :task_id, {_LATER})
ON DUPLICATE KEY UPDATE
  queued_task_id = IF({_IS_NOT_QUEUED}, :task_id, queued_task_id),
  queued_until = IF({_IS_NOT_QUEUED}, {_LATER}, queued_until);
SELECT CASE WHEN queued_until > {_NOW} THEN queued_task_id
  WHEN expires_at > {_NOW} THEN task_id END
FROM {{table}} WHERE {{key}} = :key
"""

_EXPECT = """
INSERT INTO {table} ({key}, value, updated_at, fence)
SELECT value, 'null', {now}, 0 FROM {keys}
ON DUPLICATE KEY UPDATE fence = fence
"""

# One that is held on after its run, and no longer, is free.
_HAS_NO_RUN = f"(holder IS NULL OR (acquired_at IS NULL AND expires_at <= {_NOW}))"

_PUT = f"""
{_LOCK}
INSERT INTO {{table}} ({{key}}, value, schema_version, updated_at, fence)
VALUES (:key, :value, :schema_version, {_NOW}, 0)
ON DUPLICATE KEY UPDATE
  value = IF({_HAS_NO_RUN}, :value, value),
  schema_version = IF({_HAS_NO_RUN}, :schema_version, schema_version),
  updated_at = IF({_HAS_NO_RUN}, {_NOW}, updated_at),
  fence = IF({_HAS_NO_RUN}, coalesce(fence, 0), fence);
SELECT {{key}} FROM {{table}} WHERE {{key}} = :key AND {_HAS_NO_RUN}
"""

_CHOSEN = f"""
SELECT seen.{{key}} FROM {{keys}}
STRAIGHT_JOIN {{table}} AS seen FORCE INDEX (PRIMARY) ON seen.{{key}} = listed.value
WHERE {UNUSED}
FOR UPDATE SKIP LOCKED
"""

_PRUNE = f"""
{_CHOSEN};
DELETE gone FROM ({_CHOSEN}) AS chosen
STRAIGHT_JOIN {{table}} AS gone FORCE INDEX (PRIMARY) ON gone.{{key}} = chosen.{{key}}
"""

_RECORD = f"""
UPDATE {{table}} SET expires_at = {{later}} {HELD};
INSERT INTO {{table}} ({{key}}, value, updated_at)
SELECT entry_key, entry_value, {{now}} FROM {MYSQL_ENTRIES}
WHERE EXISTS (SELECT 1 FROM {{table}} {HELD})
ON DUPLICATE KEY UPDATE value = VALUES(value), updated_at = VALUES(updated_at);
SELECT {{epoch_now}} FROM {{table}} {HELD}
"""

_FORGET = f"""
SELECT 1 FROM {{table}} {HELD} FOR UPDATE;
DELETE gone FROM {{keys}}
STRAIGHT_JOIN {{table}} AS leader FORCE INDEX (PRIMARY)
  ON leader.{{key}} = :key AND leader.fence = :fence AND leader.holder = :holder
STRAIGHT_JOIN {{table}} AS gone FORCE INDEX (PRIMARY) ON gone.{{key}} = listed.value
"""

# Changes nothing, and is an error that names the privilege which the role lacks.
_MAY_CHANGE = """
INSERT INTO {table} ({key}, value, updated_at) SELECT {key}, value, updated_at FROM {table}
WHERE 1 = 0;
UPDATE {table} SET value = value WHERE 1 = 0;
DELETE FROM {table} WHERE 1 = 0
"""


class MySqlStatements(Statements):
    """Of MariaDB from 10.6 on, and of MySQL 8, on which nothing was run."""

    words = MYSQL

    def __init__(self, table: Table, dialect: Dialect) -> None:
        super().__init__(table, dialect)
        self.acquire = self._transaction(_ACQUIRE)
        self.renew = self._transaction(_RENEW, renewable=_RENEWABLE, waits="")
        self.renew_unlocked = self._transaction(_RENEW, renewable=_RENEWABLE, waits="SKIP LOCKED")
        self.save = self._transaction(";".join(_SAVE))
        self.save_within = tuple(map(self.sql, _SAVE))
        self.release = {
            (stores, holds): self._transaction(
                _RELEASE, new_value=NEW_VALUE if stores else "", lease=_KEPT if holds else FREE
            )
            for stores in (False, True)
            for holds in (False, True)
        }
        self.set_aside = self.sql(_SET_ASIDE)
        self.enqueue = self._transaction(_ENQUEUE)
        self.expect = self.sql(_EXPECT)
        self.put = self._transaction(_PUT)
        self.prune = self._transaction(_PRUNE)
        self.record = self._transaction(_RECORD)
        self.forget = self._transaction(_FORGET)
        self.check = f"{self.check};{self.sql(_MAY_CHANGE)}"

    def rows(self, cursor: Any) -> Sequence[tuple[Any, ...]]:
        """Those of the last statement that has any to tell."""
        found: Sequence[tuple[Any, ...]] = ()
        while True:
            if cursor.description:
                found = cursor.fetchall()
            if not cursor.nextset():
                return found

    def _transaction(self, statements: str, **more: str) -> str:
        return self.sql(_TRANSACTION.replace("{statements}", statements.strip()), **more)
