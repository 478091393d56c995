"""The SQL of the five verbs, as text: one statement each, and nothing around it.

``INSERT … ON CONFLICT DO UPDATE … WHERE`` waits for a row that another transaction has
locked and then reads it anew, so that the lease and the state it returns belong together.

Time is the database's alone. PostgreSQL's ``now()`` stands still from the transaction's
start, so after a lock wait it is old: ``clock_timestamp()`` is not. SQLite's
``unixepoch('subsec')`` answers NULL without an error before 3.42, so times are ISO texts of
fixed width, which compare as they sort.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sqlalchemy import Dialect, Table

_ACQUIRE = """
INSERT INTO {table} AS mine
  (key, value, updated_at, fence, holder, task_id, acquired_at, expires_at)
VALUES (:key, 'null', {now}, 1, :holder, :task_id, {now}, {later})
ON CONFLICT (key) DO UPDATE SET
  fence = CASE WHEN mine.holder = :holder THEN mine.fence ELSE coalesce(mine.fence, 0) + 1 END,
  holder = :holder, task_id = :task_id, acquired_at = {now}, expires_at = {later},
  handoff_to = NULL,
  queued_until = CASE WHEN mine.queued_task_id = :task_id THEN NULL ELSE mine.queued_until END
WHERE mine.holder IS NULL OR mine.holder = :holder
  OR mine.expires_at <= {now} OR mine.expires_at IS NULL
RETURNING fence, value, schema_version, history, {acquired_at}
"""

_HELD = "WHERE key = :key AND fence = :fence AND holder = :holder"

_SAVE = f"""
UPDATE {{table}} SET value = :value, schema_version = :schema_version, updated_at = {{now}},
  expires_at = {{later}}
{_HELD}
RETURNING {{updated_at}}, handoff_to
"""

_RELEASE = f"""
UPDATE {{table}} SET {{new_value}} {{lease}}
  run_count = coalesce(run_count, 0) + 1, last_outcome = :outcome, last_finished_at = {{now}},
  history = :history
{_HELD}
RETURNING wanted
"""

#: Added to the holder's name while the lease is held on after its run.
HELD_ON = " (held on)"

_FREE = "holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL,"

# By another holder's name, so that what its run sent before, and repeats, is refused.
_KEPT = f"""
  task_id = NULL, acquired_at = NULL,
  expires_at = CASE WHEN {{hold_until}} > {{now}} THEN {{hold_until}} END,
  holder = CASE WHEN {{hold_until}} > {{now}} THEN holder || '{HELD_ON}' END,
"""

_NEW_VALUE = "value = :value, schema_version = :schema_version, updated_at = {now},"

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

_ROWS = """
SELECT key, schema_version, {updated_at}, fence, holder, task_id, {acquired_at},
  {expires_at} - {epoch_now}, coalesce(run_count, 0), last_outcome, {last_finished_at},
  {more}
FROM {table} WHERE fence IS NOT NULL AND
"""

_WHOLE = "history, {epoch_now}, value"

_LISTED = "CASE WHEN last_outcome = 'succeeded' THEN NULL ELSE history END, {epoch_now}"

_CONTENTS = """
SELECT key, history, CASE WHEN :values THEN value END FROM {table}
WHERE key IN (SELECT value FROM {keys})
"""

_SET_ASIDE = """
INSERT INTO {table} (key, value, updated_at) VALUES (:key, :value, {now})
ON CONFLICT (key) DO NOTHING
"""

_SEEN = "WHERE key = :key AND fence = :fence AND holder = :holder AND expires_at > {now}"

_ASK_TO_HAND_OVER = f"UPDATE {{table}} SET handoff_to = :who {_SEEN}"

_WANT = f"UPDATE {{table}} SET wanted = :wish {_SEEN}"

_LET_GO = f"UPDATE {{table}} SET {_FREE.rstrip(',')} {_SEEN} AND acquired_at IS NULL"

_WANTED = "SELECT wanted FROM {table} WHERE key = :key"

_GRANTED = "UPDATE {table} SET wanted = NULL WHERE key = :key AND wanted = :wish"

_ENQUEUE = """
INSERT INTO {table} AS mine (key, value, updated_at, fence, queued_task_id, queued_until)
VALUES (:key, 'null', {now}, 0, :task_id, {later})
ON CONFLICT (key) DO UPDATE SET queued_task_id = :task_id, queued_until = {later}
WHERE (mine.queued_until IS NULL OR mine.queued_until <= {now})
  AND (mine.task_id IS NULL OR mine.expires_at IS NULL OR mine.expires_at <= {now})
RETURNING queued_task_id
"""

_ENQUEUED = """
SELECT CASE WHEN queued_until > {now} THEN queued_task_id
  WHEN expires_at > {now} THEN task_id END
FROM {table} WHERE key = :key
"""

_EXPECT = """
INSERT INTO {table} (key, value, updated_at, fence)
SELECT value, 'null', {now}, 0 FROM {keys} WHERE true
ON CONFLICT (key) DO NOTHING
"""

# One that is held on after its run, and no longer, is free.
_PUT = """
INSERT INTO {table} AS mine (key, value, schema_version, updated_at, fence)
VALUES (:key, :value, :schema_version, {now}, 0)
ON CONFLICT (key) DO UPDATE SET value = :value, schema_version = :schema_version,
  updated_at = {now}, fence = coalesce(mine.fence, 0)
WHERE mine.holder IS NULL OR (mine.acquired_at IS NULL AND mine.expires_at <= {now})
RETURNING key
"""

_DEQUEUE = """
UPDATE {table} SET queued_until = NULL WHERE key = :key AND queued_task_id = :task_id
"""

_ENTRIES = """
SELECT key, value FROM {table} WHERE substr(key, 1, length(:prefix)) = :prefix AND key <> :prefix
"""

# The leader's row first: who waits for it sees what became of it meanwhile, which a condition on
# it in the same statement's snapshot would not.
_RECORD = """
WITH leader AS (
  UPDATE {table} SET expires_at = {later}
  WHERE key = :key AND fence = :fence AND holder = :holder
  RETURNING {epoch_now} AS now
), recorded AS (
  INSERT INTO {table} (key, value, updated_at)
  SELECT entry.key, entry.value, {now}
  FROM leader, json_to_recordset(CAST(:entries AS json)) AS entry(key text, value text)
  ON CONFLICT (key) DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at
)
SELECT now FROM leader
"""

# SQLite has no such WITH, and one writer at a time: its statement sees nothing change. The leader's
# row comes with the entries, to be renewed by the same INSERT.
_RECORD_ONE_WRITER = """
INSERT INTO {table} AS mine (key, value, updated_at, expires_at)
SELECT entry.key, entry.value, {now}, entry.expires_at FROM (
  SELECT :key AS key, 'null' AS value, {later} AS expires_at
  UNION ALL
  SELECT json_extract(value, '$.key'), json_extract(value, '$.value'), NULL
  FROM json_each(:entries)
) AS entry
WHERE EXISTS (
  SELECT 1 FROM {table} WHERE key = :key AND fence = :fence AND holder = :holder
)
ON CONFLICT (key) DO UPDATE SET expires_at = excluded.expires_at,
  value = CASE WHEN mine.key = :key THEN mine.value ELSE excluded.value END,
  updated_at = CASE WHEN mine.key = :key THEN mine.updated_at ELSE excluded.updated_at END
RETURNING {epoch_now}
"""

_FORGET = """
WITH leader AS (
  SELECT 1 FROM {table} WHERE key = :key AND fence = :fence AND holder = :holder FOR UPDATE
)
DELETE FROM {table} USING leader
WHERE key IN (SELECT value FROM {keys})
"""

_FORGET_ONE_WRITER = """
DELETE FROM {table} WHERE key IN (SELECT value FROM {keys}) AND EXISTS (
  SELECT 1 FROM {table} WHERE key = :key AND fence = :fence AND holder = :holder
)
"""

_CHECK = "SELECT {columns} FROM {table} WHERE 1 = 0"


@dataclass(frozen=True)
class _Words:
    """How a database spells time and a list of leases."""

    now: str
    later: str
    hold_until: str
    epoch: str
    held: str
    keys: str
    parameter: str
    skips_locked: bool
    one_writer: bool


_SQLITE_NOW = "strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'{})"

_WORDS = {
    "postgresql": _Words(
        now="clock_timestamp()",
        later="clock_timestamp() + make_interval(secs => {seconds})",
        hold_until="acquired_at + make_interval(secs => :hold)",
        epoch="CAST(extract(epoch FROM {moment}) AS double precision)",
        held="(SELECT key AS held_key, fence AS held_fence, holder AS held_holder, ttl AS held_ttl"
        " FROM jsonb_to_recordset(CAST(:leases AS jsonb))"
        " AS lease(key text, fence bigint, holder text, ttl double precision)) AS held",
        keys="json_array_elements_text(CAST(:keys AS json))",
        parameter=r"%(\1)s",
        skips_locked=True,
        one_writer=False,
    ),
    "sqlite": _Words(
        now=_SQLITE_NOW.format(""),
        later=_SQLITE_NOW.format(", {seconds} || ' seconds'"),
        hold_until=_SQLITE_NOW.format(", :hold || ' seconds'").replace("'now'", "acquired_at"),
        epoch="round((julianday({moment}) - 2440587.5) * 86400.0, 3)",
        held="(SELECT json_extract(value, '$.key') AS held_key,"
        " json_extract(value, '$.fence') AS held_fence,"
        " json_extract(value, '$.holder') AS held_holder,"
        " json_extract(value, '$.ttl') AS held_ttl FROM json_each(:leases)) AS held",
        keys="json_each(:keys)",
        parameter=r":\1",
        skips_locked=False,
        one_writer=True,
    ),
}

DIALECTS = tuple(_WORDS)


class Statements:
    """The statements for one table on one database, in its driver's parameter style."""

    def __init__(self, table: Table, dialect: Dialect) -> None:
        words = _WORDS[dialect.name]
        epochs = {
            name: words.epoch.format(moment=name)
            for name in ("acquired_at", "updated_at", "expires_at", "last_finished_at")
        }

        def sql(template: str, **more: str) -> str:
            text = template.format(
                table=dialect.identifier_preparer.format_table(table),
                now=words.now,
                later=words.later.format(seconds=":ttl"),
                held_later=words.later.format(seconds="held_ttl"),
                held=words.held,
                keys=words.keys,
                epoch_now=words.epoch.format(moment=words.now),
                **epochs,
                **more,
            )
            return re.sub(r":([a-z_]+)", words.parameter, text)

        self.now = words.now
        self.acquire = sql(_ACQUIRE)
        self.renew = sql(_RENEW, held_rows=words.held)
        unlocked = sql(_UNLOCKED) if words.skips_locked else words.held
        self.renew_unlocked = sql(_RENEW, held_rows=unlocked)
        self.save = sql(_SAVE)
        #: By whether a value is stored, and whether the lease is kept for a while.
        self.release = {
            (stores, holds): sql(
                _RELEASE,
                new_value=_NEW_VALUE.format(now=words.now) if stores else "",
                lease=_KEPT.format(hold_until=words.hold_until, now=words.now) if holds else _FREE,
            )
            for stores in (False, True)
            for holds in (False, True)
        }
        now = words.epoch.format(moment=words.now)
        whole, listed = _WHOLE.format(epoch_now=now), _LISTED.format(epoch_now=now)
        begins = "(substr(key, 1, length(:prefix)) = :prefix OR key = :also)"
        self.peek = sql(_ROWS + " key = :key", more=whole)
        self.list = sql(f"{_ROWS} {begins} ORDER BY key", more=listed)
        self.contents = sql(_CONTENTS)
        self.set_aside = sql(_SET_ASIDE)
        self.ask_to_hand_over = sql(_ASK_TO_HAND_OVER)
        self.let_go = sql(_LET_GO)
        self.want = sql(_WANT)
        self.wanted = sql(_WANTED)
        self.granted = sql(_GRANTED)
        self.enqueue = sql(_ENQUEUE)
        self.enqueued = sql(_ENQUEUED)
        self.dequeue = sql(_DEQUEUE)
        self.expect = sql(_EXPECT)
        self.put = sql(_PUT)
        self.entries = sql(_ENTRIES)
        self.record = sql(_RECORD_ONE_WRITER if words.one_writer else _RECORD)
        self.forget = sql(_FORGET_ONE_WRITER if words.one_writer else _FORGET)
        self.check = sql(_CHECK, columns=", ".join(table.columns.keys()))
