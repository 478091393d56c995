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
  holder = :holder, task_id = :task_id, acquired_at = {now}, expires_at = {later}
WHERE mine.holder IS NULL OR mine.holder = :holder
  OR mine.expires_at <= {now} OR mine.expires_at IS NULL
RETURNING fence, value, schema_version, history, {acquired_at}
"""

_HELD = "WHERE key = :key AND fence = :fence AND holder = :holder"

_SAVE = f"""
UPDATE {{table}} SET value = :value, schema_version = :schema_version, updated_at = {{now}},
  expires_at = {{later}}
{_HELD}
RETURNING {{updated_at}}
"""

_RELEASE = f"""
UPDATE {{table}} SET {{new_value}}
  holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL,
  run_count = coalesce(run_count, 0) + 1, last_outcome = :outcome, last_finished_at = {{now}},
  history = :history
{_HELD}
"""

_NEW_VALUE = "value = :value, schema_version = :schema_version, updated_at = {now},"

_RENEW = """
UPDATE {table} SET expires_at = {held_later}
FROM {held}
WHERE key = held_key AND fence = held_fence AND holder = held_holder {unlocked}
RETURNING key
"""

_UNLOCKED = """
AND key IN (
  SELECT key FROM {table} WHERE key IN (SELECT held_key FROM {held}) FOR UPDATE SKIP LOCKED
)
"""

_ROWS = """
SELECT key, value, schema_version, {updated_at}, fence, holder, task_id, {acquired_at},
  {expires_at} - {epoch_now}, coalesce(run_count, 0), last_outcome, {last_finished_at}, history,
  {epoch_now}
FROM {table} WHERE fence IS NOT NULL AND
"""

_SET_ASIDE = """
INSERT INTO {table} (key, value, updated_at) VALUES (:key, :value, {now})
ON CONFLICT (key) DO NOTHING
"""

_CHECK = "SELECT {columns} FROM {table} WHERE 1 = 0"


@dataclass(frozen=True)
class _Words:
    """How a database spells time and a list of leases."""

    now: str
    later: str
    epoch: str
    held: str
    parameter: str
    skips_locked: bool


_SQLITE_NOW = "strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'{})"

_WORDS = {
    "postgresql": _Words(
        now="clock_timestamp()",
        later="clock_timestamp() + make_interval(secs => {seconds})",
        epoch="CAST(extract(epoch FROM {moment}) AS double precision)",
        held="(SELECT key AS held_key, fence AS held_fence, holder AS held_holder, ttl AS held_ttl"
        " FROM jsonb_to_recordset(CAST(:leases AS jsonb))"
        " AS lease(key text, fence bigint, holder text, ttl double precision)) AS held",
        parameter=r"%(\1)s",
        skips_locked=True,
    ),
    "sqlite": _Words(
        now=_SQLITE_NOW.format(""),
        later=_SQLITE_NOW.format(", {seconds} || ' seconds'"),
        epoch="round((julianday({moment}) - 2440587.5) * 86400.0, 3)",
        held="(SELECT json_extract(value, '$.key') AS held_key,"
        " json_extract(value, '$.fence') AS held_fence,"
        " json_extract(value, '$.holder') AS held_holder,"
        " json_extract(value, '$.ttl') AS held_ttl FROM json_each(:leases)) AS held",
        parameter=r":\1",
        skips_locked=False,
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
                epoch_now=words.epoch.format(moment=words.now),
                **epochs,
                **more,
            )
            return re.sub(r":([a-z_]+)", words.parameter, text)

        self.now = words.now
        self.acquire = sql(_ACQUIRE)
        self.renew = sql(_RENEW, unlocked="")
        unlocked = sql(_UNLOCKED) if words.skips_locked else ""
        self.renew_unlocked = sql(_RENEW, unlocked=unlocked)
        self.save = sql(_SAVE)
        self.release = sql(_RELEASE, new_value="")
        self.release_with_value = sql(_RELEASE, new_value=_NEW_VALUE.format(now=words.now))
        self.peek = sql(_ROWS + " key = :key")
        self.list = sql(_ROWS + " substr(key, 1, length(:prefix)) = :prefix ORDER BY key")
        self.set_aside = sql(_SET_ASIDE)
        self.check = sql(_CHECK, columns=", ".join(table.columns.keys()))
