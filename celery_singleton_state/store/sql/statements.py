"""The SQL that all databases share, as text; what differs is in their :class:`Words`.

How a lease is acquired, renewed and released differs in more than words: PostgreSQL and SQLite do
so in one statement (:mod:`.returning`), MariaDB and MySQL in several that are sent as one
(:mod:`.mysql`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Any

from sqlalchemy import Dialect, Table

from .words import Words

#: Which row a holder may write: by fence and holder alone, however late.
HELD = "WHERE {key} = :key AND fence = :fence AND holder = :holder"

#: Which write of a holder's is in its order: neither late, nor behind what the database lost.
IN_ORDER = "AND {write} BETWEEN :seen AND :number"

#: Whether a message that was not ranked was sent before the newest message in the row. A moment is
#: a clock's name and a number of fixed length, so two moments of one clock compare as texts.
SENT_BEFORE = "coalesce(newest_sent LIKE :of_clock AND newest_sent > :sent, FALSE)"

FREE = "holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL,"

#: With the row's own acquisition, so before that is struck out. Nobody is the holder in the hold
#: period, so what the run sent before, and repeats, is refused.
KEPT = "hold_until = CASE WHEN :hold > 0 AND {hold_until} > {now} THEN {hold_until} END,"

#: Whether no hold period keeps the lease.
NOT_KEPT = "(hold_until IS NULL OR hold_until <= {now})"

NEW_VALUE = (
    "value = :value, schema_version = :schema_version, updated_at = {now}, {write} = :number,"
)

ENDED = """
  run_count = coalesce(run_count, 0) + 1, last_outcome = :outcome, last_finished_at = {now},
  history = :history, ticks_done = coalesce(:ticks_done, ticks_done)
"""

_ROWS = """
SELECT {key}, task, schema_version, {updated_at}, fence, holder, task_id, {acquired_at},
  {free_at} - {epoch_now}, coalesce(run_count, 0), last_outcome, {last_finished_at},
  {more}
FROM {table} WHERE fence IS NOT NULL AND
"""

_WHOLE = """
  history, {epoch_now}, value, wanted, coalesce({write}, 0), handoff_to, coalesce(newest, 0),
  newest_sent, ticks_done, coalesce(queue, 0),
  CASE WHEN queued_until > {now} THEN queued_task_id END, {queued_until} - {epoch_now}
"""

_LISTED = "CASE WHEN last_outcome = 'succeeded' THEN NULL ELSE history END, {epoch_now}"

_BEGINS = "substr({key}, 1, {length}(:prefix)) = :prefix"

_CONTENTS = """
SELECT {key}, history, CASE WHEN :values THEN value END FROM {table}
WHERE {key} IN (SELECT value FROM {keys})
"""

# In its hold period a lease is held for no task.
_TICKS = """
SELECT {key}, coalesce(coalesce(expires_at, hold_until) > {now}, 1 = 0), task_id, ticks_done
FROM {table} WHERE {key} IN (SELECT value FROM {keys})
"""

# In a hold period the holder is NULL, in the row and as it was seen.
_SEEN = """WHERE {key} = :key AND fence = :fence AND holder {is_same} :holder
  AND coalesce(expires_at, hold_until) > {now}"""

# By growing ranks: a late request of an older message is refused, a repeated one is not.
_ASK_TO_HAND_OVER = f"""
UPDATE {{table}} SET handoff_to = :who, newest = :rank, newest_sent = :sent
{_SEEN} AND (coalesce(newest, 0) < :rank OR (newest = :rank AND handoff_to = :who))
"""

_WANT = f"UPDATE {{table}} SET wanted = :wish {_SEEN} AND wanted {{is_same}} :wanted"

GIVE_BACK = f"UPDATE {{table}} SET {FREE.rstrip(',')} WHERE {{key}} = :key AND holder = :holder"

# With the lock, where a database has locks of rows: a COMMIT that is under way has ended then.
_WRITTEN = """
SELECT fence = :fence AND holder = :holder, {write} >= :number FROM {table}
WHERE {key} = :key {for_update}
"""

_LET_GO = f"UPDATE {{table}} SET hold_until = NULL {_SEEN} AND holder IS NULL"

_WANTED = "SELECT wanted FROM {table} WHERE {key} = :key"

_GRANTED = "UPDATE {table} SET wanted = NULL WHERE {key} = :key AND wanted = :wish"

_QUEUED = """
SELECT coalesce(queue, 0), CASE WHEN queued_until > {now} THEN queued_task_id END,
  CASE WHEN expires_at > {now} THEN task_id END
FROM {table} WHERE {key} = :key
"""

# A singleton's row that nobody holds, asks for, wishes to run once more or has queued, for so long.
UNUSED = f"""
  fence IS NOT NULL AND holder IS NULL AND {NOT_KEPT}
  AND handoff_to IS NULL AND wanted IS NULL AND (queued_until IS NULL OR queued_until <= {{now}})
  AND updated_at <= {{long_ago}} AND (last_finished_at IS NULL OR last_finished_at <= {{long_ago}})
"""

# In no order: what there is of a large table comes as it is found, and without a silence.
_UNUSED_KEYS = f"SELECT {{key}}, task FROM {{table}} WHERE {_BEGINS} AND {UNUSED}"

_ENTRIES = f"SELECT {{key}}, value FROM {{table}} WHERE {_BEGINS} AND {{key}} <> :prefix"

_CHECK = "SELECT {columns} FROM {table} WHERE 1 = 0"


class Statements:
    """The statements for one table on one database, in its driver's parameter style."""

    words: Words

    # Those that differ in more than words.
    acquire: str
    #: Waits for a row that somebody has locked; ``renew_unlocked`` passes over it.
    renew: str
    renew_unlocked: str
    save: str
    #: The same, one after the other within a transaction that is open already.
    save_within: Sequence[str]
    #: By whether a value is stored.
    release: Mapping[bool, str]
    give_back: str
    set_aside: str
    claim: str
    dequeue: str
    expect: str
    put: str
    record: str
    #: One after the other within a transaction; the first says whether the write is in order.
    forget_within: Sequence[str]
    prune: str
    #: The rows that a statement answers, of its cursor.
    rows: Callable[[Any], Sequence[tuple[Any, ...]]] = methodcaller("fetchall")
    #: What locks the rows that a SELECT reads.
    for_update = "FOR UPDATE"
    #: Asks which privileges on the table the role lacks, where an error does not say so.
    lacking: str | None = None
    #: Asks whether row-level security can hide rows from the role.
    hiding: str | None = None
    #: Asks what of the database or the table does not have all characters, and what mends that.
    encodings: str | None = None
    encoding_advice = ""
    #: Bytes of the largest text. The server can answer a larger one by closing the connection.
    largest: int | None = None

    def __init__(self, table: Table, dialect: Dialect) -> None:
        #: The table's name, quoted where it must be.
        self.table = dialect.identifier_preparer.format_table(table)
        self.now = self.words.now
        columns = (dialect.identifier_preparer.quote(column.name) for column in table.columns)
        self.peek = self.sql(f"{_ROWS} {{key}} = :key", more=_WHOLE)
        found = f"({_BEGINS} OR {{key}} = :also)"
        self.list = self.sql(f"{_ROWS} {found} ORDER BY {{key}}", more=_LISTED)
        self.contents = self.sql(_CONTENTS)
        self.ticks = self.sql(_TICKS)
        self.ask_to_hand_over = self.sql(_ASK_TO_HAND_OVER)
        self.let_go = self.sql(_LET_GO)
        self.want = self.sql(_WANT)
        self.wanted = self.sql(_WANTED)
        self.granted = self.sql(_GRANTED)
        self.queued = self.sql(_QUEUED)
        self.written = self.sql(_WRITTEN, for_update=self.for_update)
        self.unused = self.sql(_UNUSED_KEYS)
        self.entries = self.sql(_ENTRIES)
        self.check = self.sql(_CHECK, columns=", ".join(columns))

    def is_too_large(self, parameters: Mapping[str, Any]) -> bool:
        """Whether one of a statement's parameters is larger than the database can hold."""
        largest = self.largest
        texts = (each for each in parameters.values() if isinstance(each, str))
        return largest is not None and any(
            len(text) * 4 > largest and len(text.encode()) > largest for text in texts
        )

    def sql(self, template: str, **more: str) -> str:
        """A template with the database's words in it.

        :param more: further words, which may have words in them in turn.
        """
        words = self.words
        own = {
            name: words.epoch.format(moment=name)
            for name in (
                "acquired_at",
                "updated_at",
                "last_finished_at",
                "queued_until",
            )
        } | {
            "table": self.table,
            "key": words.key,
            "write": words.write,
            "milliseconds": words.milliseconds,
            "larger": words.larger,
            "is_same": words.is_same,
            "length": words.length,
            "now": words.now,
            "later": words.later.format(seconds=":ttl"),
            "held_later": words.later.format(seconds="held_ttl"),
            "hold_until": words.hold_until,
            # Asked once, so that the index on it can be used.
            "long_ago": f"(SELECT {words.later.format(seconds='-:older_than')})",
            "held": words.held,
            "keys": words.keys,
            "tasks": words.tasks,
            "epoch_now": words.epoch.format(moment=words.now),
            "free_at": words.epoch.format(moment="coalesce(expires_at, hold_until)"),
        }
        filled = {name: text.format(**own) for name, text in more.items()}
        return re.sub(r":([a-z_]+)", words.parameter, template.format(**own, **filled))
