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

from celery_singleton_state.store.base import TAKEN_OVER

from .statements import (
    ENDED,
    FREE,
    GIVE_BACK,
    HELD,
    IN_ORDER,
    KEPT,
    NEW_VALUE,
    NOT_KEPT,
    SENT_BEFORE,
    UNUSED,
    Statements,
)
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

_NOT_KEPT = NOT_KEPT.format(now=_NOW)

_IS_FREE = f"(holder IS NULL OR expires_at <= {_NOW} OR expires_at IS NULL) AND {_NOT_KEPT}"

_MAY_TAKE = f"""coalesce({_IS_FREE} AND NOT holder <=> :holder
    AND IF(:rank = 0, NOT {SENT_BEFORE},
      greatest(coalesce(fence, 0), coalesce(newest, 0)) <= :rank), 0)"""

_TAKES = "@singleton_takes"

# Repeated by the same holder, it changes nothing but an expiry that would be nearer. The condition
# reads what is assigned here, so it is evaluated once. Fences and ranks grow on one line, so that a
# message which was ranked before a fence was given is older.
_ACQUIRE = f"""
{_LOCK}
INSERT INTO {{table}}
  ({{key}}, task, value, updated_at, fence, {{write}}, queue, newest_sent, holder, task_id,
  acquired_at, expires_at)
VALUES
  (:key, :task, 'null', {_NOW}, {{milliseconds}}, 0, 1, :sent, :holder, :task_id, {_NOW}, {_LATER})
ON DUPLICATE KEY UPDATE
  fence = IF({_TAKES} := {_MAY_TAKE},
    greatest(coalesce(fence, 0) + 1, coalesce(newest, 0) + 1, {{milliseconds}}), fence),
  {{write}} = IF({_TAKES},
    IF(holder IS NOT NULL, {TAKEN_OVER}, 0), {{write}}),
  queue = IF({_TAKES}, coalesce(queue, 0) + 1, queue),
  acquired_at = IF({_TAKES}, {_NOW}, acquired_at),
  handoff_to = IF({_TAKES}, NULL, handoff_to),
  newest_sent = IF({_TAKES}, :sent, newest_sent),
  queued_until = IF({_TAKES} AND queued_task_id = :task_id, NULL, queued_until),
  task = IF({_TAKES}, coalesce(:task, task), task),
  task_id = IF({_TAKES}, :task_id, task_id),
  hold_until = IF({_TAKES}, NULL, hold_until),
  holder = IF({_TAKES}, :holder, holder),
  expires_at = IF(holder = :holder,
    greatest(coalesce(expires_at, {_LATER}), {_LATER}), expires_at);
SELECT fence, value, schema_version, history, {{acquired_at}}, {{write}}, ticks_done
FROM {{table}} WHERE {{key}} = :key AND holder = :holder
"""

_SAVE = (
    f"UPDATE {{table}} SET {NEW_VALUE} expires_at = {{later}} {HELD} {IN_ORDER}",
    "SELECT handoff_to FROM {table} WHERE {key} = :key AND ROW_COUNT() = 1",
)

_RELEASE = f"""
UPDATE {{table}} SET {{new_value}} {KEPT} {FREE} {ENDED} {HELD} {{order}};
SELECT wanted FROM {{table}} WHERE {{key}} = :key AND ROW_COUNT() = 1
"""

_GIVE_BACK = f"""
{GIVE_BACK};
SELECT wanted FROM {{table}} WHERE {{key}} = :key AND ROW_COUNT() = 1
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

# Repeated, it is the same claim.
_MAY_CLAIM = f"""(coalesce(queue, 0) = :number OR (
  queue = :number + 1 AND queued_task_id = :task_id AND queued_until > {_NOW} AND :first = 0))"""

# A row that is not there is not locked, so the condition is evaluated as the row is written.
_CLAIM = f"""
{_LOCK}
SET @singleton_claim = 1;
INSERT INTO {{table}}
  ({{key}}, task, value, updated_at, fence, queue, queued_task_id, queued_until)
VALUES (:key, :task, 'null', {_NOW}, 0, 1, :task_id, {_LATER})
ON DUPLICATE KEY UPDATE
  queued_until = IF(@singleton_claim := coalesce({_MAY_CLAIM}, 0), {_LATER}, queued_until),
  queued_task_id = IF(@singleton_claim, :task_id, queued_task_id),
  queue = IF(@singleton_claim, :number + 1, queue);
SELECT queue FROM {{table}} WHERE {{key}} = :key AND @singleton_claim
"""

# Counted whoever is queued, and where no row is yet: a claim that is under way is refused then.
_DEQUEUE = """
INSERT INTO {table} ({key}, task, value, updated_at, fence, queue)
VALUES (:key, :task, 'null', {now}, 0, 1)
ON DUPLICATE KEY UPDATE
  queue = coalesce(queue, 0) + 1, queued_until = IF(queued_task_id = :task_id, NULL, queued_until)
"""

_EXPECT = """
INSERT INTO {table} ({key}, task, value, updated_at, fence)
SELECT expected_key, expected_task, 'null', {now}, 0 FROM {tasks}
ON DUPLICATE KEY UPDATE fence = fence
"""

_MAY_PUT = f"""holder IS NULL AND {_NOT_KEPT}
  AND coalesce(fence, 0) = :fence AND coalesce({{write}}, 0) = :write"""

# A row that is not there is not locked, so the condition is evaluated as the row is written.
_PUT = f"""
{_LOCK}
SET @singleton_put = 1;
INSERT INTO {{table}} ({{key}}, task, value, schema_version, updated_at, fence, {{write}})
VALUES (:key, :task, :value, :schema_version, {_NOW}, 0, 1)
ON DUPLICATE KEY UPDATE
  value = IF(@singleton_put := coalesce({_MAY_PUT}, 0), :value, value),
  schema_version = IF(@singleton_put, :schema_version, schema_version),
  updated_at = IF(@singleton_put, {_NOW}, updated_at),
  fence = IF(@singleton_put, coalesce(fence, 0), fence),
  {{write}} = IF(@singleton_put, coalesce({{write}}, 0) + 1, {{write}});
SELECT {{key}} FROM {{table}} WHERE {{key}} = :key AND @singleton_put
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
UPDATE {{table}} SET expires_at = {{later}}, {{write}} = :number {HELD} {IN_ORDER};
INSERT INTO {{table}} ({{key}}, value, updated_at)
SELECT entry_key, entry_value, {{now}} FROM {MYSQL_ENTRIES}
WHERE EXISTS (SELECT 1 FROM {{table}} {HELD} AND {{write}} = :number)
ON DUPLICATE KEY UPDATE value = VALUES(value), updated_at = VALUES(updated_at);
SELECT {{epoch_now}} FROM {{table}} {HELD} AND {{write}} = :number
"""

_FORGET = (
    f"UPDATE {{table}} SET {{write}} = :number {HELD} {IN_ORDER}",
    "SELECT {key} FROM {table} WHERE {key} = :key AND ROW_COUNT() = 1",
    """
DELETE gone FROM {keys}
STRAIGHT_JOIN {table} AS gone FORCE INDEX (PRIMARY) ON gone.{key} = listed.value
""",
)

# Changes nothing, and is an error that names the privilege which the role lacks.
_MAY_CHANGE = """
INSERT INTO {table} ({key}, value, updated_at) SELECT {key}, value, updated_at FROM {table}
WHERE 1 = 0;
UPDATE {table} SET value = value WHERE 1 = 0;
DELETE FROM {table} WHERE 1 = 0
"""

_ENCODINGS = """
SELECT concat(group_concat(column_name, ' (', character_set_name, ')' SEPARATOR ', '), ' of table ',
  :table)
FROM information_schema.columns
WHERE table_schema = coalesce(nullif(:schema, ''), database()) AND table_name = :table
  AND column_name IN ({own}) AND character_set_name <> 'utf8mb4'
HAVING count(*) > 0
"""


def _last_rows(cursor: Any) -> Sequence[tuple[Any, ...]]:
    """The rows of the last statement that has any to tell."""
    found: Sequence[tuple[Any, ...]] = ()
    while True:
        if cursor.description:
            found = cursor.fetchall()
        if not cursor.nextset():
            return found


class MySqlStatements(Statements):
    """Of MariaDB from 10.6 on, and of MySQL 8, on which nothing was run."""

    words = MYSQL

    rows = staticmethod(_last_rows)

    def __init__(self, table: Table, dialect: Dialect) -> None:
        super().__init__(table, dialect)
        self.acquire = self._transaction(_ACQUIRE)
        self.renew = self._transaction(_RENEW, renewable=_RENEWABLE, waits="")
        self.renew_unlocked = self._transaction(_RENEW, renewable=_RENEWABLE, waits="SKIP LOCKED")
        self.save = self._transaction(";".join(_SAVE))
        self.save_within = tuple(map(self.sql, _SAVE))
        self.release = {
            stores: self._transaction(
                _RELEASE,
                new_value=NEW_VALUE if stores else "",
                order=IN_ORDER if stores else "",
            )
            for stores in (False, True)
        }
        self.set_aside = self.sql(_SET_ASIDE)
        self.give_back = self._transaction(_GIVE_BACK)
        self.claim = self._transaction(_CLAIM)
        self.dequeue = self.sql(_DEQUEUE)
        self.expect = self.sql(_EXPECT)
        self.put = self._transaction(_PUT)
        self.prune = self._transaction(_PRUNE)
        self.record = self._transaction(_RECORD)
        self.forget_within = tuple(map(self.sql, _FORGET))
        own = ", ".join(f"'{column.name}'" for column in table.columns)
        self.encodings = self.sql(_ENCODINGS, own=own)
        self.encoding_advice = "ALTER TABLE … MODIFY … CHARACTER SET utf8mb4 mends that"
        self.check = f"{self.check};{self.sql(_MAY_CHANGE)}"

    def _transaction(self, statements: str, **more: str) -> str:
        return self.sql(_TRANSACTION.replace("{statements}", statements.strip()), **more)
