"""PostgreSQL and SQLite: each verb is one statement, and nothing around it.

``INSERT … ON CONFLICT DO UPDATE … WHERE`` waits for a row that another transaction has
locked and then reads it anew, so that the lease and the state it returns belong together.
"""

from __future__ import annotations

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
from .words import POSTGRESQL, SQLITE

# Repeated by the same holder, it changes nothing but an expiry that would be nearer. Fences and
# ranks grow on one line, so that a message which was ranked before a fence was given is older.
_ACQUIRE = f"""
INSERT INTO {{table}} AS mine
  (key, value, updated_at, fence, write, queue, newest_sent, holder, task_id, acquired_at,
  expires_at)
VALUES (:key, 'null', {{now}}, {{milliseconds}}, 0, 1, :sent, :holder, :task_id, {{now}}, {{later}})
ON CONFLICT (key) DO UPDATE SET
  fence = CASE WHEN mine.holder = :holder THEN mine.fence
    ELSE {{larger}}({{next_fence}}, {{next_rank}}, {{milliseconds}}) END,
  write = CASE WHEN mine.holder = :holder THEN mine.write
    WHEN mine.holder IS NOT NULL THEN {TAKEN_OVER} ELSE 0 END,
  queue = CASE WHEN mine.holder = :holder THEN mine.queue ELSE coalesce(mine.queue, 0) + 1 END,
  acquired_at = CASE WHEN mine.holder = :holder THEN mine.acquired_at ELSE {{now}} END,
  expires_at = CASE WHEN mine.holder = :holder
    THEN {{larger}}(coalesce(mine.expires_at, {{later}}), {{later}}) ELSE {{later}} END,
  handoff_to = CASE WHEN mine.holder = :holder THEN mine.handoff_to END,
  newest_sent = CASE WHEN mine.holder = :holder THEN mine.newest_sent ELSE :sent END,
  queued_until = CASE WHEN mine.holder = :holder THEN mine.queued_until
    WHEN mine.queued_task_id = :task_id THEN NULL ELSE mine.queued_until END,
  holder = :holder, task_id = :task_id, hold_until = NULL
WHERE mine.holder = :holder OR (
  (mine.holder IS NULL OR mine.expires_at <= {{now}} OR mine.expires_at IS NULL)
  AND {NOT_KEPT.replace("hold_until", "mine.hold_until")}
  AND CASE WHEN :rank = 0 THEN NOT {SENT_BEFORE.replace("newest_sent", "mine.newest_sent")}
    ELSE {{larger}}(coalesce(mine.fence, 0), coalesce(mine.newest, 0)) <= :rank END)
RETURNING fence, value, schema_version, history, {{acquired_at}}, write, ticks_done
"""

_SAVE = f"""
UPDATE {{table}} SET {NEW_VALUE} expires_at = {{later}}
{HELD} {IN_ORDER}
RETURNING handoff_to
"""

_RELEASE = (
    f"UPDATE {{table}} SET {{new_value}} {KEPT} {FREE} {ENDED} {HELD} {{order}} RETURNING wanted"
)

_GIVE_BACK = f"{GIVE_BACK} RETURNING wanted"

_RENEW = """
UPDATE {table} SET expires_at = {held_later}
FROM {held_rows}
WHERE key = held_key AND fence = held_fence AND holder = held_holder
RETURNING key, handoff_to
"""

# Those of the leases whose rows nobody has locked. A join, and not key IN (SELECT ...), which
# PostgreSQL carries out as a loop over all leases for each lease.
_UNLOCKED = """(
  SELECT held.* FROM {held} JOIN {table} AS seen
  ON seen.key = held_key AND seen.fence = held_fence AND seen.holder = held_holder
  FOR UPDATE OF seen SKIP LOCKED
) AS unlocked"""

_SET_ASIDE = """
INSERT INTO {table} (key, value, updated_at) VALUES (:key, :value, {now})
ON CONFLICT (key) DO NOTHING
"""

_CLAIM = """
INSERT INTO {table} AS mine (key, value, updated_at, fence, queue, queued_task_id, queued_until)
VALUES (:key, 'null', {now}, 0, 1, :task_id, {later})
ON CONFLICT (key) DO UPDATE SET
  queued_task_id = :task_id, queued_until = {later}, queue = :number + 1
WHERE coalesce(mine.queue, 0) = :number OR (
  mine.queue = :number + 1 AND mine.queued_task_id = :task_id AND mine.queued_until > {now}
  AND :first = 0)
RETURNING queue
"""

# Counted whoever is queued, and where no row is yet: a claim that is under way is refused then.
_DEQUEUE = """
INSERT INTO {table} AS mine (key, value, updated_at, fence, queue)
VALUES (:key, 'null', {now}, 0, 1)
ON CONFLICT (key) DO UPDATE SET queue = coalesce(mine.queue, 0) + 1, queued_until =
  CASE WHEN mine.queued_task_id = :task_id THEN NULL ELSE mine.queued_until END
"""

_EXPECT = """
INSERT INTO {table} (key, value, updated_at, fence)
SELECT value, 'null', {now}, 0 FROM {keys} WHERE true
ON CONFLICT (key) DO NOTHING
"""

_PUT = f"""
INSERT INTO {{table}} AS mine (key, value, schema_version, updated_at, fence, write)
VALUES (:key, :value, :schema_version, {{now}}, 0, 1)
ON CONFLICT (key) DO UPDATE SET value = :value, schema_version = :schema_version,
  updated_at = {{now}}, fence = coalesce(mine.fence, 0), write = coalesce(mine.write, 0) + 1
WHERE mine.holder IS NULL AND {NOT_KEPT.replace("hold_until", "mine.hold_until")}
  AND coalesce(mine.fence, 0) = :fence AND coalesce(mine.write, 0) = :write
RETURNING key
"""

# A row is locked and then looked at anew, so that a run which began meanwhile keeps it; one that
# somebody has locked is passed over. WITH, as a subselect that locks may be carried out many times.
_PRUNE = f"""
WITH chosen AS (
  SELECT key FROM {{table}} WHERE key IN (SELECT value FROM {{keys}}) AND {UNUSED} {{locking}}
)
DELETE FROM {{table}} WHERE key IN (SELECT key FROM chosen)
RETURNING key
"""

# The leader's row first: who waits for it sees what became of it meanwhile, which a condition on
# it in the same statement's snapshot would not.
_RECORD = f"""
WITH leader AS (
  UPDATE {{table}} SET expires_at = {{later}}, write = :number
  {HELD} {IN_ORDER}
  RETURNING {{epoch_now}} AS now
), recorded AS (
  INSERT INTO {{table}} (key, value, updated_at)
  SELECT entry.key, entry.value, {{now}}
  FROM leader, json_to_recordset(CAST(:entries AS json)) AS entry(key text, value text)
  ON CONFLICT (key) DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at
)
SELECT now FROM leader
"""

# SQLite has no such WITH, and one writer at a time: its statement sees nothing change. The leader's
# row comes with the entries, to be renewed by the same INSERT.
_RECORD_ONE_WRITER = f"""
INSERT INTO {{table}} AS mine (key, value, updated_at, expires_at, write)
SELECT entry.key, entry.value, {{now}}, entry.expires_at, entry.number FROM (
  SELECT :key AS key, 'null' AS value, {{later}} AS expires_at, :number AS number
  UNION ALL
  SELECT json_extract(value, '$.key'), json_extract(value, '$.value'), NULL, NULL
  FROM json_each(:entries)
) AS entry
WHERE EXISTS (SELECT 1 FROM {{table}} {HELD} {IN_ORDER})
ON CONFLICT (key) DO UPDATE SET expires_at = excluded.expires_at, write = excluded.write,
  value = CASE WHEN mine.key = :key THEN mine.value ELSE excluded.value END,
  updated_at = CASE WHEN mine.key = :key THEN mine.updated_at ELSE excluded.updated_at END
RETURNING {{epoch_now}}
"""

_FORGET = (
    f"UPDATE {{table}} SET write = :number {HELD} {IN_ORDER} RETURNING key",
    "DELETE FROM {table} WHERE key IN (SELECT value FROM {keys})",
)


# Rights on single columns count, as they may be on all that are needed.
_LACKING = """
SELECT quote_ident(current_user), string_agg(privilege, ', ')
FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
WHERE NOT CASE privilege WHEN 'DELETE' THEN has_table_privilege(:table, privilege)
  ELSE has_any_column_privilege(:table, privilege) END
HAVING count(*) > 0
"""

# For each kind of statement (r, a, w, d) one policy is enough that lets the role see all rows; one
# that is restrictive can hide rows in spite of that.
_HIDING = """
WITH own AS (
  SELECT polcmd, polpermissive, coalesce(pg_get_expr(polqual, polrelid), 'true') = 'true'
    AND coalesce(pg_get_expr(polwithcheck, polrelid), 'true') = 'true' AS hides_nothing
  FROM pg_policy WHERE polrelid = to_regclass(:table) AND EXISTS (
    SELECT FROM unnest(polroles) AS admitted(role)
    WHERE CASE role WHEN 0 THEN true ELSE pg_has_role(current_user, role, 'USAGE') END)
)
SELECT quote_ident(current_user) WHERE row_security_active(:table) AND (
  EXISTS (SELECT FROM own WHERE NOT polpermissive AND NOT hides_nothing)
  OR EXISTS (
    SELECT FROM unnest(ARRAY['r', 'a', 'w', 'd']) AS wanted(command) WHERE NOT EXISTS (
      SELECT FROM own WHERE polpermissive AND hides_nothing AND polcmd IN ('*', command))))
"""

# One of SQL_ASCII takes every byte as it is.
_ENCODINGS = """
SELECT 'the database, whose encoding is ' || current_setting('server_encoding') || ','
WHERE current_setting('server_encoding') NOT IN ('UTF8', 'SQL_ASCII')
"""


class ReturningStatements(Statements):
    """What PostgreSQL and SQLite have in common."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        super().__init__(table, dialect)
        self.acquire = self.sql(
            _ACQUIRE,
            next_fence=self.words.plus_one.format(number="coalesce(mine.fence, 0)"),
            next_rank=self.words.plus_one.format(number="coalesce(mine.newest, 0)"),
        )
        self.renew = self.renew_unlocked = self.sql(_RENEW, held_rows="{held}")
        self.save = self.sql(_SAVE)
        self.save_within = (self.save,)
        self.give_back = self.sql(_GIVE_BACK)
        self.release = {
            stores: self.sql(
                _RELEASE,
                new_value=NEW_VALUE if stores else "",
                order=IN_ORDER if stores else "",
            )
            for stores in (False, True)
        }
        self.set_aside = self.sql(_SET_ASIDE)
        self.claim = self.sql(_CLAIM)
        self.dequeue = self.sql(_DEQUEUE)
        self.expect = self.sql(_EXPECT)
        self.put = self.sql(_PUT)
        self.forget_within = tuple(map(self.sql, _FORGET))


class PostgresqlStatements(ReturningStatements):
    """Many writers, and rows that are locked."""

    words = POSTGRESQL
    largest = 2**30 - 1

    def __init__(self, table: Table, dialect: Dialect) -> None:
        super().__init__(table, dialect)
        self.renew_unlocked = self.sql(_RENEW, held_rows=_UNLOCKED)
        self.prune = self.sql(_PRUNE, locking="FOR UPDATE SKIP LOCKED")
        self.record = self.sql(_RECORD)
        self.lacking = self.sql(_LACKING)
        self.hiding = self.sql(_HIDING)
        self.encodings = self.sql(_ENCODINGS)
        self.encoding_advice = "CREATE DATABASE … ENCODING 'UTF8' makes one that has them all"


class SqliteStatements(ReturningStatements):
    """One writer at a time."""

    words = SQLITE
    for_update = ""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        super().__init__(table, dialect)
        self.prune = self.sql(_PRUNE, locking="")
        self.record = self.sql(_RECORD_ONE_WRITER)
