"""How each database spells time, and lists of keys and leases.

Time is the database's alone. PostgreSQL's ``now()`` stands still from the transaction's start, so
after a lock wait it is old: ``clock_timestamp()`` is not; nor is ``SYSDATE`` of MariaDB and MySQL,
where ``NOW`` stands still from the statement's start. SQLite's ``unixepoch('subsec')`` answers NULL
without an error before 3.42, so its times are ISO texts of fixed width, which compare as they sort.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """What differs between databases in statements that are the same otherwise.

    :param key: the column, quoted where its name is a word of the database's own.
    :param later: the time in ``{seconds}`` from now.
    :param hold_until: until when a lease is kept after its run.
    :param epoch: a ``{moment}`` in seconds since the epoch.
    :param held: rows of leases, from the parameter ``leases``; ``keys``, from ``keys``: of keys;
        ``tasks``, from ``tasks``: of keys with their tasks.
    :param milliseconds: the time in whole milliseconds since 1970, which a fence is never below.
    :param larger: the function that answers the larger of its arguments.
    :param plus_one: the ``{number}`` + 1, and an error if that is larger than its column can hold.
    :param is_same: compares two values that may be NULL.
    :param parameter: a parameter in the driver's style.
    """

    now: str
    later: str
    hold_until: str
    epoch: str
    held: str
    keys: str
    tasks: str
    parameter: str
    milliseconds: str
    larger: str
    is_same: str
    key: str = "key"
    write: str = "write"
    length: str = "length"
    plus_one: str = "{number} + 1"


POSTGRESQL = Words(
    now="clock_timestamp()",
    later="clock_timestamp() + {seconds} * interval '1 second'",
    hold_until="acquired_at + :hold * interval '1 second'",
    epoch="CAST(extract(epoch FROM {moment}) AS double precision)",
    held="(SELECT key AS held_key, fence AS held_fence, holder AS held_holder, ttl AS held_ttl"
    " FROM jsonb_to_recordset(CAST(:leases AS jsonb))"
    " AS lease(key text, fence bigint, holder text, ttl double precision)) AS held",
    keys="json_array_elements_text(CAST(:keys AS json))",
    tasks="(SELECT key AS expected_key, task AS expected_task"
    " FROM json_to_recordset(CAST(:tasks AS json)) AS each(key text, task text)) AS expected",
    parameter=r"%(\1)s",
    milliseconds="CAST(floor(extract(epoch FROM clock_timestamp()) * 1000) AS bigint)",
    larger="greatest",
    is_same="IS NOT DISTINCT FROM",
)

_SQLITE_NOW = "strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'{})"

SQLITE = Words(
    now=_SQLITE_NOW.format(""),
    later=_SQLITE_NOW.format(", {seconds} || ' seconds'"),
    hold_until=_SQLITE_NOW.format(", :hold || ' seconds'").replace("'now'", "acquired_at"),
    epoch="round((julianday({moment}) - 2440587.5) * 86400.0, 3)",
    held="(SELECT json_extract(value, '$.key') AS held_key,"
    " json_extract(value, '$.fence') AS held_fence,"
    " json_extract(value, '$.holder') AS held_holder,"
    " json_extract(value, '$.ttl') AS held_ttl FROM json_each(:leases)) AS held",
    keys="json_each(:keys)",
    tasks="(SELECT json_extract(value, '$.key') AS expected_key,"
    " json_extract(value, '$.task') AS expected_task FROM json_each(:tasks)) AS expected",
    parameter=r":\1",
    milliseconds="CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)",
    larger="max",
    is_same="IS",
    # A sum that is too large becomes a number with a point, which grows no more.
    plus_one="abs(-1 - {number})",
)

#: As the columns are, so that what comes from JSON is compared with them by their index.
_TEXT = "VARCHAR({}) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"

MYSQL = Words(
    now="SYSDATE(6)",
    later="SYSDATE(6) + INTERVAL {seconds} SECOND",
    hold_until="acquired_at + INTERVAL :hold SECOND",
    # No matter which time zone, and without an end in 2038.
    epoch="TIMESTAMPDIFF(MICROSECOND, '1970-01-01', {moment}) / 1e6",
    held=f"JSON_TABLE(:leases, '$[*]' COLUMNS (held_key {_TEXT.format(255)} PATH '$.key',"
    f" held_fence BIGINT PATH '$.fence', held_holder {_TEXT.format(1024)} PATH '$.holder',"
    " held_ttl DOUBLE PATH '$.ttl')) AS held",
    keys=f"JSON_TABLE(:keys, '$[*]' COLUMNS (value {_TEXT.format(255)} PATH '$')) AS listed",
    tasks=f"JSON_TABLE(:tasks, '$[*]' COLUMNS (expected_key {_TEXT.format(255)} PATH '$.key',"
    " expected_task LONGTEXT CHARACTER SET utf8mb4 PATH '$.task')) AS expected",
    parameter=r"%(\1)s",
    milliseconds="TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) DIV 1000",
    larger="greatest",
    is_same="<=>",
    key="`key`",
    write="`write`",
    length="CHAR_LENGTH",
)

#: Of a schedule's entries, from the parameter ``entries``.
MYSQL_ENTRIES = (
    f"JSON_TABLE(:entries, '$[*]' COLUMNS (entry_key {_TEXT.format(255)} PATH '$.key',"
    " entry_value LONGTEXT CHARACTER SET utf8mb4 PATH '$.value')) AS entry"
)
