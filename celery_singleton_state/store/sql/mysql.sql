-- MariaDB from 10.6 on, and MySQL 8, on which nothing was run.
--
-- Each verb of the store is a short transaction, sent as one text, in one round trip. To try a
-- statement, put the table's name (kv_store) for {table}, and values for the parameters, which are
-- PyMySQL's: %(key)s.
--
-- There is no UPDATE … RETURNING, so what is written is read back before the transaction's end,
-- while its row is locked. ROW_COUNT() tells whether the statement before it found a row. Four rules
-- of these databases shape the texts:
--
-- - Assignments are carried out from left to right, and each sees those before it. So what a
--   condition reads is assigned last.
-- - A row that a statement only looks at on its way is locked by it as well, and small tables are
--   looked at whole. So in a join the table comes last, and by its key.
-- - A condition that stands in several assignments is evaluated anew in each. So the time is taken
--   once, after the row is locked, into a variable. NOW() stands still from the statement's start,
--   so after a wait for a lock it is old: SYSDATE() is not.
-- - With REPEATABLE READ, the default, who asks for a row that is not there locks the gap where it
--   would be, and two who do so wait for each other. So it is READ COMMITTED here.
--
-- Texts from JSON have the columns' collation, so that they are compared with these by their index.

-- name: acquire
-- Take a lease that nobody holds, or repeat what the same holder took, and load the row.
-- Repeated by the same holder it changes nothing but an expiry that would be nearer. The condition
-- reads what is assigned here, so it is evaluated once. Fences and ranks grow on one line, so that a
-- message that was ranked before a fence was given is older. A moment (sent) is a clock's name and a
-- number of fixed length, so two moments of one clock compare as texts. The write number -1 tells
-- that the lease of another holder had run out.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
SELECT 1 FROM {table} WHERE `key` = %(key)s FOR UPDATE;
SET @singleton_now = CAST(SYSDATE(6) AS DATETIME(6));
INSERT INTO {table} (
  `key`, task, value, updated_at, fence, `write`, queue, newest_sent, holder, task_id, acquired_at,
  expires_at
) VALUES (
  %(key)s, %(task)s, 'null', CAST(@singleton_now AS DATETIME(6)),
  TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) DIV 1000, 0, 1,
  %(sent)s, %(holder)s, %(task_id)s, CAST(@singleton_now AS DATETIME(6)),
  CAST(@singleton_now AS DATETIME(6)) + INTERVAL %(ttl)s SECOND
)
ON DUPLICATE KEY UPDATE
  fence = IF(@singleton_takes := coalesce(
      (holder IS NULL OR expires_at IS NULL OR expires_at <= CAST(@singleton_now AS DATETIME(6)))
      AND (hold_until IS NULL OR hold_until <= CAST(@singleton_now AS DATETIME(6)))
      AND NOT holder <=> %(holder)s
      AND IF(%(rank)s = 0,
        NOT coalesce(newest_sent LIKE %(of_clock)s AND newest_sent > %(sent)s, FALSE),
        greatest(coalesce(fence, 0), coalesce(newest, 0)) <= %(rank)s),
      0),
    greatest(
      coalesce(fence, 0) + 1,
      coalesce(newest, 0) + 1,
      TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) DIV 1000
    ),
    fence),
  `write` = IF(@singleton_takes, IF(holder IS NOT NULL, -1, 0), `write`),
  queue = IF(@singleton_takes, coalesce(queue, 0) + 1, queue),
  acquired_at = IF(@singleton_takes, CAST(@singleton_now AS DATETIME(6)), acquired_at),
  handoff_to = IF(@singleton_takes, NULL, handoff_to),
  newest_sent = IF(@singleton_takes, %(sent)s, newest_sent),
  queued_until = IF(@singleton_takes AND queued_task_id = %(task_id)s, NULL, queued_until),
  task = IF(@singleton_takes, coalesce(%(task)s, task), task),
  task_id = IF(@singleton_takes, %(task_id)s, task_id),
  hold_until = IF(@singleton_takes, NULL, hold_until),
  holder = IF(@singleton_takes, %(holder)s, holder),
  expires_at = IF(holder = %(holder)s,
    greatest(
      coalesce(expires_at, CAST(@singleton_now AS DATETIME(6)) + INTERVAL %(ttl)s SECOND),
      CAST(@singleton_now AS DATETIME(6)) + INTERVAL %(ttl)s SECOND
    ),
    expires_at);
SELECT
  fence, value, schema_version, history,
  TIMESTAMPDIFF(MICROSECOND, '1970-01-01', acquired_at) / 1e6, `write`, ticks_done
FROM {table} WHERE `key` = %(key)s AND holder = %(holder)s;
COMMIT;

-- name: renew
-- Prolong one lease, or several; it waits for a row that somebody has locked.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
SELECT seen.`key`, seen.handoff_to
FROM JSON_TABLE(%(leases)s, '$[*]' COLUMNS (
  held_key VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.key',
  held_fence BIGINT PATH '$.fence',
  held_holder VARCHAR(1024) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.holder'
)) AS held
STRAIGHT_JOIN {table} AS seen FORCE INDEX (PRIMARY)
  ON seen.`key` = held_key AND seen.fence = held_fence AND seen.holder = held_holder
FOR UPDATE;
UPDATE (
  SELECT held_key, held_ttl
  FROM JSON_TABLE(%(leases)s, '$[*]' COLUMNS (
    held_key VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.key',
    held_fence BIGINT PATH '$.fence',
    held_holder VARCHAR(1024) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.holder',
    held_ttl DOUBLE PATH '$.ttl'
  )) AS held
  STRAIGHT_JOIN {table} AS seen FORCE INDEX (PRIMARY)
    ON seen.`key` = held_key AND seen.fence = held_fence AND seen.holder = held_holder
  FOR UPDATE
) AS locked
STRAIGHT_JOIN {table} AS mine FORCE INDEX (PRIMARY) ON mine.`key` = held_key
SET mine.expires_at = SYSDATE(6) + INTERVAL held_ttl SECOND;
COMMIT;

-- name: renew_unlocked
-- Prolong those of several leases whose rows nobody has locked.
-- Those that are locked by now are renewed; one that was unlocked meanwhile may be as well, and is
-- not in the answer.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
SELECT seen.`key`, seen.handoff_to
FROM JSON_TABLE(%(leases)s, '$[*]' COLUMNS (
  held_key VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.key',
  held_fence BIGINT PATH '$.fence',
  held_holder VARCHAR(1024) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.holder'
)) AS held
STRAIGHT_JOIN {table} AS seen FORCE INDEX (PRIMARY)
  ON seen.`key` = held_key AND seen.fence = held_fence AND seen.holder = held_holder
FOR UPDATE SKIP LOCKED;
UPDATE (
  SELECT held_key, held_ttl
  FROM JSON_TABLE(%(leases)s, '$[*]' COLUMNS (
    held_key VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.key',
    held_fence BIGINT PATH '$.fence',
    held_holder VARCHAR(1024) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.holder',
    held_ttl DOUBLE PATH '$.ttl'
  )) AS held
  STRAIGHT_JOIN {table} AS seen FORCE INDEX (PRIMARY)
    ON seen.`key` = held_key AND seen.fence = held_fence AND seen.holder = held_holder
  FOR UPDATE SKIP LOCKED
) AS locked
STRAIGHT_JOIN {table} AS mine FORCE INDEX (PRIMARY) ON mine.`key` = held_key
SET mine.expires_at = SYSDATE(6) + INTERVAL held_ttl SECOND;
COMMIT;

-- name: save
-- Store a state in mid-run, or as the last statement of a transaction, and prolong the lease.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
UPDATE {table} SET
  value = %(value)s, schema_version = %(schema_version)s, updated_at = SYSDATE(6),
  `write` = %(number)s, expires_at = SYSDATE(6) + INTERVAL %(ttl)s SECOND
WHERE `key` = %(key)s AND fence = %(fence)s AND holder = %(holder)s
  AND `write` BETWEEN %(seen)s AND %(number)s;
SELECT handoff_to FROM {table} WHERE `key` = %(key)s AND ROW_COUNT() = 1;
COMMIT;

-- name: written
-- Tell whether a transaction was committed whose COMMIT was not answered.
-- It locks the row, so that a COMMIT that is under way has ended.
SELECT fence = %(fence)s AND holder = %(holder)s, `write` >= %(number)s
FROM {table} WHERE `key` = %(key)s
FOR UPDATE;

-- name: release
-- Give a lease back without a state, and note how its run has ended.
-- Nobody is the holder in the hold period, so what the run sent before, and repeats, is refused.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
UPDATE {table} SET
  hold_until = CASE
    WHEN %(hold)s > 0 AND acquired_at + INTERVAL %(hold)s SECOND > SYSDATE(6)
    THEN acquired_at + INTERVAL %(hold)s SECOND END,
  holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL,
  run_count = coalesce(run_count, 0) + 1, last_outcome = %(outcome)s,
  last_finished_at = SYSDATE(6), history = %(history)s,
  ticks_done = coalesce(%(ticks_done)s, ticks_done)
WHERE `key` = %(key)s AND fence = %(fence)s AND holder = %(holder)s;
SELECT wanted FROM {table} WHERE `key` = %(key)s AND ROW_COUNT() = 1;
COMMIT;

-- name: save_and_release
-- Store a state, give the lease back, and note how its run has ended.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
UPDATE {table} SET
  value = %(value)s, schema_version = %(schema_version)s, updated_at = SYSDATE(6),
  `write` = %(number)s,
  hold_until = CASE
    WHEN %(hold)s > 0 AND acquired_at + INTERVAL %(hold)s SECOND > SYSDATE(6)
    THEN acquired_at + INTERVAL %(hold)s SECOND END,
  holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL,
  run_count = coalesce(run_count, 0) + 1, last_outcome = %(outcome)s,
  last_finished_at = SYSDATE(6), history = %(history)s,
  ticks_done = coalesce(%(ticks_done)s, ticks_done)
WHERE `key` = %(key)s AND fence = %(fence)s AND holder = %(holder)s
  AND `write` BETWEEN %(seen)s AND %(number)s;
SELECT wanted FROM {table} WHERE `key` = %(key)s AND ROW_COUNT() = 1;
COMMIT;

-- name: give_back
-- Give back a lease whose fence may be unknown, and which may never have been taken.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
UPDATE {table} SET holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL
WHERE `key` = %(key)s AND holder = %(holder)s;
SELECT wanted FROM {table} WHERE `key` = %(key)s AND ROW_COUNT() = 1;
COMMIT;

-- name: peek
-- Read a singleton's row.
-- Moments are counted from 1970 no matter which time zone, and without an end in 2038.
SELECT
  `key`, task, schema_version, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', updated_at) / 1e6, fence,
  holder, task_id, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', acquired_at) / 1e6,
  TIMESTAMPDIFF(MICROSECOND, '1970-01-01', coalesce(expires_at, hold_until)) / 1e6
    - TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) / 1e6,
  coalesce(run_count, 0), last_outcome,
  TIMESTAMPDIFF(MICROSECOND, '1970-01-01', last_finished_at) / 1e6, history,
  TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) / 1e6, value, wanted,
  coalesce(`write`, 0), handoff_to, coalesce(newest, 0), newest_sent, ticks_done,
  coalesce(queue, 0), CASE WHEN queued_until > SYSDATE(6) THEN queued_task_id END,
  TIMESTAMPDIFF(MICROSECOND, '1970-01-01', queued_until) / 1e6
    - TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) / 1e6
FROM {table} WHERE fence IS NOT NULL AND `key` = %(key)s;

-- name: list
-- Read the rows of the singletons whose keys begin with a prefix, and one more, without states.
SELECT
  `key`, task, schema_version, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', updated_at) / 1e6, fence,
  holder, task_id, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', acquired_at) / 1e6,
  TIMESTAMPDIFF(MICROSECOND, '1970-01-01', coalesce(expires_at, hold_until)) / 1e6
    - TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) / 1e6,
  coalesce(run_count, 0), last_outcome,
  TIMESTAMPDIFF(MICROSECOND, '1970-01-01', last_finished_at) / 1e6,
  CASE WHEN last_outcome = 'succeeded' THEN NULL ELSE history END,
  TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) / 1e6
FROM {table}
WHERE fence IS NOT NULL
  AND (substr(`key`, 1, CHAR_LENGTH(%(prefix)s)) = %(prefix)s OR `key` = %(also)s)
ORDER BY `key`;

-- name: contents
-- Read the histories of some singletons, and their states if they are wanted.
SELECT `key`, history, CASE WHEN %(values)s THEN value END
FROM {table} WHERE `key` IN (
  SELECT value FROM JSON_TABLE(%(keys)s, '$[*]' COLUMNS (
    value VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$'
  )) AS listed
);

-- name: ticks
-- Read what is known of the ticks of some singletons, and whether their leases are held.
-- In its hold period a lease is held for no task.
SELECT `key`, coalesce(coalesce(expires_at, hold_until) > SYSDATE(6), FALSE), task_id, ticks_done
FROM {table} WHERE `key` IN (
  SELECT value FROM JSON_TABLE(%(keys)s, '$[*]' COLUMNS (
    value VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$'
  )) AS listed
);

-- name: request_handoff
-- Ask the holder that was seen to hand over, or note who is to be next after a hold period.
-- By growing ranks: a late request of an older message is refused, a repeated one is not. In a hold
-- period the holder is NULL, in the row and as it was seen.
UPDATE {table} SET handoff_to = %(handoff_to)s, newest = %(rank)s, newest_sent = %(sent)s
WHERE `key` = %(key)s AND fence = %(fence)s AND holder <=> %(holder)s
  AND coalesce(expires_at, hold_until) > SYSDATE(6)
  AND (coalesce(newest, 0) < %(rank)s OR (newest = %(rank)s AND handoff_to = %(handoff_to)s));

-- name: release_early
-- End the hold period that was seen.
UPDATE {table} SET hold_until = NULL
WHERE `key` = %(key)s AND fence = %(fence)s AND holder <=> %(holder)s
  AND holder IS NULL AND hold_until > SYSDATE(6);

-- name: request_run
-- Note that one more run is to be sent when the holder that was seen releases.
UPDATE {table} SET wanted = %(pending_run)s
WHERE `key` = %(key)s AND fence = %(fence)s AND holder <=> %(holder)s
  AND coalesce(expires_at, hold_until) > SYSDATE(6)
  AND wanted <=> %(wanted)s;

-- name: wanted
-- Read the pending run of a row.
SELECT wanted FROM {table} WHERE `key` = %(key)s;

-- name: pending_run_sent
-- Strike out a pending run that was sent.
UPDATE {table} SET wanted = NULL WHERE `key` = %(key)s AND wanted = %(pending_run)s;

-- name: queued
-- Read the queue's number and the message that is queued or running.
SELECT
  coalesce(queue, 0), CASE WHEN queued_until > SYSDATE(6) THEN queued_task_id END,
  CASE WHEN expires_at > SYSDATE(6) THEN task_id END
FROM {table} WHERE `key` = %(key)s;

-- name: claim
-- Note a message as queued, if the queue has the number that was seen.
-- A row that is not there is not locked, so the condition is evaluated as the row is written.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
SELECT 1 FROM {table} WHERE `key` = %(key)s FOR UPDATE;
SET @singleton_now = CAST(SYSDATE(6) AS DATETIME(6));
SET @singleton_claim = 1;
INSERT INTO {table} (`key`, task, value, updated_at, fence, queue, queued_task_id, queued_until)
VALUES (
  %(key)s, %(task)s, 'null', CAST(@singleton_now AS DATETIME(6)), 0, 1, %(task_id)s,
  CAST(@singleton_now AS DATETIME(6)) + INTERVAL %(ttl)s SECOND
)
ON DUPLICATE KEY UPDATE
  queued_until = IF(@singleton_claim := coalesce(
      coalesce(queue, 0) = %(number)s OR (
        queue = %(number)s + 1 AND queued_task_id = %(task_id)s
        AND queued_until > CAST(@singleton_now AS DATETIME(6)) AND %(first)s = 0
      ),
      0),
    CAST(@singleton_now AS DATETIME(6)) + INTERVAL %(ttl)s SECOND,
    queued_until),
  queued_task_id = IF(@singleton_claim, %(task_id)s, queued_task_id),
  queue = IF(@singleton_claim, %(number)s + 1, queue);
SELECT queue FROM {table} WHERE `key` = %(key)s AND @singleton_claim;
COMMIT;

-- name: dequeue
-- Note that a message is queued no more.
-- The number grows whoever is queued, and where there is no row yet: a claim that is under way is
-- refused then.
INSERT INTO {table} (`key`, task, value, updated_at, fence, queue)
VALUES (%(key)s, %(task)s, 'null', SYSDATE(6), 0, 1)
ON DUPLICATE KEY UPDATE
  queue = coalesce(queue, 0) + 1,
  queued_until = IF(queued_task_id = %(task_id)s, NULL, queued_until);

-- name: expect
-- Make rows for singletons that are to run, unless there are some.
INSERT INTO {table} (`key`, task, value, updated_at, fence)
SELECT expected_key, expected_task, 'null', SYSDATE(6), 0
FROM JSON_TABLE(%(tasks)s, '$[*]' COLUMNS (
  expected_key VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.key',
  expected_task LONGTEXT CHARACTER SET utf8mb4 PATH '$.task'
)) AS expected
ON DUPLICATE KEY UPDATE fence = fence;

-- name: put
-- Store a state from outside a run, if nobody holds the lease and the row is as it was seen.
-- A row that is not there is not locked, so the condition is evaluated as the row is written.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
SELECT 1 FROM {table} WHERE `key` = %(key)s FOR UPDATE;
SET @singleton_now = CAST(SYSDATE(6) AS DATETIME(6));
SET @singleton_put = 1;
INSERT INTO {table} (`key`, task, value, schema_version, updated_at, fence, `write`)
VALUES (
  %(key)s, %(task)s, %(value)s, %(schema_version)s, CAST(@singleton_now AS DATETIME(6)), 0, 1
)
ON DUPLICATE KEY UPDATE
  value = IF(@singleton_put := coalesce(
      holder IS NULL
      AND (hold_until IS NULL OR hold_until <= CAST(@singleton_now AS DATETIME(6)))
      AND coalesce(fence, 0) = %(fence)s AND coalesce(`write`, 0) = %(write)s,
      0),
    %(value)s,
    value),
  schema_version = IF(@singleton_put, %(schema_version)s, schema_version),
  updated_at = IF(@singleton_put, CAST(@singleton_now AS DATETIME(6)), updated_at),
  fence = IF(@singleton_put, coalesce(fence, 0), fence),
  `write` = IF(@singleton_put, coalesce(`write`, 0) + 1, `write`);
SELECT `key` FROM {table} WHERE `key` = %(key)s AND @singleton_put;
COMMIT;

-- name: set_aside
-- Keep a value that cannot be decoded under a key of its own.
INSERT INTO {table} (`key`, value, updated_at) VALUES (%(key)s, %(value)s, SYSDATE(6))
ON DUPLICATE KEY UPDATE updated_at = updated_at;

-- name: unused
-- Read the keys, and the tasks, of the singletons that nobody has used for so long.
-- In no order: what there is of a large table comes as it is found, and without a silence. The
-- subselects are carried out once, so that the index on updated_at can be used.
SELECT `key`, task FROM {table}
WHERE substr(`key`, 1, CHAR_LENGTH(%(prefix)s)) = %(prefix)s
  AND fence IS NOT NULL AND holder IS NULL
  AND (hold_until IS NULL OR hold_until <= SYSDATE(6))
  AND handoff_to IS NULL AND wanted IS NULL
  AND (queued_until IS NULL OR queued_until <= SYSDATE(6))
  AND updated_at <= (SELECT SYSDATE(6) - INTERVAL %(older_than)s SECOND)
  AND (last_finished_at IS NULL
    OR last_finished_at <= (SELECT SYSDATE(6) - INTERVAL %(older_than)s SECOND));

-- name: prune
-- Remove the rows of those singletons that nobody uses even now.
-- A row that somebody has locked is passed over.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
SELECT seen.`key`
FROM JSON_TABLE(%(keys)s, '$[*]' COLUMNS (
  value VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$'
)) AS listed
STRAIGHT_JOIN {table} AS seen FORCE INDEX (PRIMARY) ON seen.`key` = listed.value
WHERE fence IS NOT NULL AND holder IS NULL
  AND (hold_until IS NULL OR hold_until <= SYSDATE(6))
  AND handoff_to IS NULL AND wanted IS NULL
  AND (queued_until IS NULL OR queued_until <= SYSDATE(6))
  AND updated_at <= (SELECT SYSDATE(6) - INTERVAL %(older_than)s SECOND)
  AND (last_finished_at IS NULL
    OR last_finished_at <= (SELECT SYSDATE(6) - INTERVAL %(older_than)s SECOND))
FOR UPDATE SKIP LOCKED;
DELETE gone FROM (
  SELECT seen.`key`
  FROM JSON_TABLE(%(keys)s, '$[*]' COLUMNS (
    value VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$'
  )) AS listed
  STRAIGHT_JOIN {table} AS seen FORCE INDEX (PRIMARY) ON seen.`key` = listed.value
  WHERE fence IS NOT NULL AND holder IS NULL
    AND (hold_until IS NULL OR hold_until <= SYSDATE(6))
    AND handoff_to IS NULL AND wanted IS NULL
    AND (queued_until IS NULL OR queued_until <= SYSDATE(6))
    AND updated_at <= (SELECT SYSDATE(6) - INTERVAL %(older_than)s SECOND)
    AND (last_finished_at IS NULL
      OR last_finished_at <= (SELECT SYSDATE(6) - INTERVAL %(older_than)s SECOND))
  FOR UPDATE SKIP LOCKED
) AS chosen
STRAIGHT_JOIN {table} AS gone FORCE INDEX (PRIMARY) ON gone.`key` = chosen.`key`;
COMMIT;

-- name: entries
-- Read the rows of a schedule's entries.
SELECT `key`, value FROM {table}
WHERE substr(`key`, 1, CHAR_LENGTH(%(prefix)s)) = %(prefix)s AND `key` <> %(prefix)s;

-- name: record
-- Store what entries of a schedule have become, and prolong the lease of the beat that leads.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
UPDATE {table} SET
  expires_at = SYSDATE(6) + INTERVAL %(ttl)s SECOND, `write` = %(number)s
WHERE `key` = %(key)s AND fence = %(fence)s AND holder = %(holder)s
  AND `write` BETWEEN %(seen)s AND %(number)s;
INSERT INTO {table} (`key`, value, updated_at)
SELECT entry_key, entry_value, SYSDATE(6)
FROM JSON_TABLE(%(entries)s, '$[*]' COLUMNS (
  entry_key VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.key',
  entry_value LONGTEXT CHARACTER SET utf8mb4 PATH '$.value'
)) AS entry
WHERE EXISTS (
  SELECT 1 FROM {table}
  WHERE `key` = %(key)s AND fence = %(fence)s AND holder = %(holder)s AND `write` = %(number)s
)
ON DUPLICATE KEY UPDATE value = VALUES(value), updated_at = VALUES(updated_at);
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) / 1e6 FROM {table}
WHERE `key` = %(key)s AND fence = %(fence)s AND holder = %(holder)s AND `write` = %(number)s;
COMMIT;

-- name: forget
-- Remove rows of a schedule's entries, within a transaction and if the second statement finds a row.
UPDATE {table} SET `write` = %(number)s
WHERE `key` = %(key)s AND fence = %(fence)s AND holder = %(holder)s
  AND `write` BETWEEN %(seen)s AND %(number)s;
SELECT `key` FROM {table} WHERE `key` = %(key)s AND ROW_COUNT() = 1;
DELETE gone
FROM JSON_TABLE(%(keys)s, '$[*]' COLUMNS (
  value VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$'
)) AS listed
STRAIGHT_JOIN {table} AS gone FORCE INDEX (PRIMARY) ON gone.`key` = listed.value;

-- name: check
-- See that the table is there, with all its columns, and that the role may read and change it.
-- The last three change nothing, and are errors that name the privilege which the role lacks.
SELECT
  `key`, value, updated_at, task, schema_version, fence, `write`, holder, task_id, acquired_at,
  expires_at, hold_until, run_count, last_outcome, last_finished_at, history, ticks_done,
  handoff_to, wanted, queue, queued_task_id, queued_until, newest, newest_sent
FROM {table} WHERE FALSE;
INSERT INTO {table} (`key`, value, updated_at) SELECT `key`, value, updated_at FROM {table}
WHERE FALSE;
UPDATE {table} SET value = value WHERE FALSE;
DELETE FROM {table} WHERE FALSE;

-- name: encodings
-- Ask which of the table's columns have a character set that lacks characters.
SELECT concat(
  group_concat(column_name, ' (', character_set_name, ')' SEPARATOR ', '), ' of table ', %(table)s
)
FROM information_schema.columns
WHERE table_schema = coalesce(nullif(%(schema)s, ''), database()) AND table_name = %(table)s
  AND character_set_name <> 'utf8mb4'
  AND column_name IN (
    'key', 'value', 'updated_at', 'task', 'schema_version', 'fence', 'write', 'holder', 'task_id',
    'acquired_at', 'expires_at', 'hold_until', 'run_count', 'last_outcome', 'last_finished_at',
    'history', 'ticks_done', 'handoff_to', 'wanted', 'queue', 'queued_task_id', 'queued_until',
    'newest', 'newest_sent'
  )
HAVING count(*) > 0;
