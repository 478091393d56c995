-- MariaDB 10.6 or newer, and MySQL 8 (the tests run only on MariaDB): one text for each method of
-- the store. Most texts are a short transaction, which is sent in one round trip.
--
-- To try a statement, replace {table} with the table's name (kv_store), and the parameters, which
-- are PyMySQL's (%(key)s), with values.
--
-- A row of the table is a singleton, a task of which at most one run may be active. A run needs the
-- row's lease. The columns:
--
-- - fence, holder, task_id, acquired_at, expires_at: the lease. The fence is a number that grows
--   with each acquisition. The holder renews the lease before it expires.
-- - value, schema_version, updated_at: the singleton's state as JSON, and when it was changed last.
-- - write: the number of the last write of the state under the present lease.
-- - hold_until: the end of the hold period, for which a lease is kept after its run.
-- - handoff_to, newest: the task id and the rank of the message that asks the holder to hand over.
--   Ranks order the messages of a singleton from old to new.
-- - newest_sent: the time at which the newest message was sent, the last one that acquired the
--   lease or asked for a handoff.
-- - wanted: the pending run, one more run that the holder sends when it releases the lease.
-- - queue, queued_task_id, queued_until: the message that is queued, and the queue number, which
--   each acquisition and each change of the queued message raises.
-- - run_count, last_outcome, last_finished_at, history, ticks_done: the runs so far, and the due
--   times (ticks) of a beat schedule that are done.
--
-- Rows without a fence are no singletons: they are key-value pairs, or entries of a beat schedule.
--
-- A statement may arrive late, after newer ones. So a statement that changes a row names the fence,
-- the holder, the write number or the queue number that its sender knows. If the sender's knowledge
-- is out of date, the statement changes nothing.
--
-- These databases have no UPDATE … RETURNING. So a transaction reads a row back after it has
-- written it, while the row is still locked. ROW_COUNT() says whether the preceding statement found
-- a row. Five rules of these databases explain the texts:
--
-- - Assignments are carried out from left to right, and each one sees the earlier ones. So a column
--   that a condition reads is assigned last.
-- - A statement also locks rows that it only reads on its way, and it reads small tables as a
--   whole. So in a join the table comes last, and is read by its key.
-- - A condition that stands in several assignments is evaluated in each of them, and its results
--   could differ. So the present time is read only once, into a variable, after the row is locked.
-- - NOW() is the time at which the statement began, so it is too old after a wait for a lock.
--   SYSDATE() is the present time.
-- - At the level REPEATABLE READ, the default, a statement that finds no row locks the gap in which
--   the row would be. Two transactions that do so before they insert the row wait for each other.
--   So the level is READ COMMITTED.
--
-- Texts that are read from JSON get the collation of the columns, so that comparing such a text
-- with the key can use the index.

-- name: acquire
-- Acquire a lease that is free or has expired, and return the singleton's row.
-- The same holder may repeat the statement if its answer was lost. The repetition only makes sure
-- that the lease does not expire earlier than ttl seconds from now.
-- A message that is older than the row's newest message does not get the lease:
-- - A message with a rank does not get the lease if the row's rank (newest) or fence is larger. The
--   new fence exceeds both, because it is the rank of the message that acquires the lease.
-- - A message without a rank (0) does not get the lease if the newest message was sent later by the
--   same clock (newest_sent). The column has a text: the name of a clock, and a number of fixed
--   length. So comparing two texts with the same name compares the times.
-- The write number is -1 after a takeover of another holder's expired lease, otherwise 0.
-- @singleton_takes: whether the lease is acquired. It is computed once, because the assignments
-- change columns that its condition reads.
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
-- Renew one or several leases, and wait for rows that another transaction has locked.
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
-- Renew several leases, except leases whose rows another transaction has locked.
-- The SELECT locks rows and returns the answer, and the UPDATE renews the leases of these rows. If
-- another transaction unlocks a row between the two, the row's lease may be renewed without being
-- in the answer.
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
-- Store a state during a run, or as the last statement of a transaction, and renew the lease.
-- The statement changes nothing if the row's write number is above the parameter "number", because
-- then a newer write has taken effect, or below the parameter "seen", because then the database has
-- lost writes that it had confirmed.
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
-- Read whether a transaction took effect, although its COMMIT was not answered.
-- The statement locks the row, so that it waits for a COMMIT that is still in progress.
SELECT fence = %(fence)s AND holder = %(holder)s, `write` >= %(number)s
FROM {table} WHERE `key` = %(key)s
FOR UPDATE;

-- name: release
-- Release a lease without storing a state, and record how its run has ended.
-- The holder is NULL in the hold period, too. So late statements of the ended run are refused.
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
-- Store a state, release the lease, and record how its run has ended.
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
-- Release a lease by its holder's name alone, because the answer to the acquisition was lost.
-- In this case the fence is not known, and the lease may never have been acquired.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
START TRANSACTION;
UPDATE {table} SET holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL
WHERE `key` = %(key)s AND holder = %(holder)s;
SELECT wanted FROM {table} WHERE `key` = %(key)s AND ROW_COUNT() = 1;
COMMIT;

-- name: peek
-- Read the row of one singleton.
-- Times are counted from 1970 by TIMESTAMPDIFF, which works in every time zone, and beyond 2038.
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
-- Read the rows of the singletons under a prefix, and of one more singleton, without states.
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
-- Read the histories of some singletons, and their states if the caller asks for them.
SELECT `key`, history, CASE WHEN %(values)s THEN value END
FROM {table} WHERE `key` IN (
  SELECT value FROM JSON_TABLE(%(keys)s, '$[*]' COLUMNS (
    value VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$'
  )) AS listed
);

-- name: ticks
-- Read which ticks of some singletons are done, and whether their leases are held.
-- A hold period counts as held. Its task id is NULL, because no message is running.
SELECT `key`, coalesce(coalesce(expires_at, hold_until) > SYSDATE(6), FALSE), task_id, ticks_done
FROM {table} WHERE `key` IN (
  SELECT value FROM JSON_TABLE(%(keys)s, '$[*]' COLUMNS (
    value VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$'
  )) AS listed
);

-- name: request_handoff
-- Ask the holder of a lease to hand over, or record which message is next after a hold period.
-- The rank of the message must be larger than the ranks of all earlier messages. So a late request
-- of an older message is refused. A repeated request is not refused. In a hold period the holder is
-- NULL, in the row as well as in the parameter.
UPDATE {table} SET handoff_to = %(handoff_to)s, newest = %(rank)s, newest_sent = %(sent)s
WHERE `key` = %(key)s AND fence = %(fence)s AND holder <=> %(holder)s
  AND coalesce(expires_at, hold_until) > SYSDATE(6)
  AND (coalesce(newest, 0) < %(rank)s OR (newest = %(rank)s AND handoff_to = %(handoff_to)s));

-- name: release_early
-- End a hold period early, if the row still has the hold period that the caller has read.
UPDATE {table} SET hold_until = NULL
WHERE `key` = %(key)s AND fence = %(fence)s AND holder <=> %(holder)s
  AND holder IS NULL AND hold_until > SYSDATE(6);

-- name: request_run
-- Note a pending run, which the holder sends when it releases the lease.
-- A pending run that the caller has not read yet is newer, and stays.
UPDATE {table} SET wanted = %(pending_run)s
WHERE `key` = %(key)s AND fence = %(fence)s AND holder <=> %(holder)s
  AND coalesce(expires_at, hold_until) > SYSDATE(6)
  AND wanted <=> %(wanted)s;

-- name: wanted
-- Read the pending run of a row.
SELECT wanted FROM {table} WHERE `key` = %(key)s;

-- name: pending_run_sent
-- Remove a pending run from the row because it was sent.
-- A newer pending run stays.
UPDATE {table} SET wanted = NULL WHERE `key` = %(key)s AND wanted = %(pending_run)s;

-- name: queued
-- Read the queue number, the queued message and the running message.
SELECT
  coalesce(queue, 0), CASE WHEN queued_until > SYSDATE(6) THEN queued_task_id END,
  CASE WHEN expires_at > SYSDATE(6) THEN task_id END
FROM {table} WHERE `key` = %(key)s;

-- name: claim
-- Note a message as queued, if the row still has the queue number that the caller has read.
-- If the answer to a claim was lost, the caller repeats the claim with 0 as the parameter "first".
-- Only such a repetition succeeds if the row has an equal claim already.
-- A missing row cannot be locked, so the condition is evaluated when the row is written.
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
-- Note that a message is no longer queued.
-- The queue number grows even if another message is queued, and a missing row is inserted. So a
-- claim that arrives later is refused, because it names the old number.
INSERT INTO {table} (`key`, task, value, updated_at, fence, queue)
VALUES (%(key)s, %(task)s, 'null', SYSDATE(6), 0, 1)
ON DUPLICATE KEY UPDATE
  queue = coalesce(queue, 0) + 1,
  queued_until = IF(queued_task_id = %(task_id)s, NULL, queued_until);

-- name: expect
-- Insert a row for each singleton that is expected to run and has no row yet.
INSERT INTO {table} (`key`, task, value, updated_at, fence)
SELECT expected_key, expected_task, 'null', SYSDATE(6), 0
FROM JSON_TABLE(%(tasks)s, '$[*]' COLUMNS (
  expected_key VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$.key',
  expected_task LONGTEXT CHARACTER SET utf8mb4 PATH '$.task'
)) AS expected
ON DUPLICATE KEY UPDATE fence = fence;

-- name: put
-- Store a state while the lease is free, if the row is unchanged since the caller read it.
-- A missing row cannot be locked, so the condition is evaluated when the row is written.
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
-- Store a copy of a state that cannot be decoded, under a separate key.
INSERT INTO {table} (`key`, value, updated_at) VALUES (%(key)s, %(value)s, SYSDATE(6))
ON DUPLICATE KEY UPDATE updated_at = updated_at;

-- name: unused
-- Read the keys and the tasks of the singletons that were not used for a given time.
-- The rows come in no order, so that the first rows of a large table arrive at once. The subselects
-- are evaluated once, so that the database can use the index on updated_at.
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
-- Delete the rows of given singletons, if they are still unused.
-- Rows that another transaction has locked are skipped.
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
-- Read the rows of the entries of a beat schedule.
SELECT `key`, value FROM {table}
WHERE substr(`key`, 1, CHAR_LENGTH(%(prefix)s)) = %(prefix)s AND `key` <> %(prefix)s;

-- name: record
-- Store the entries of a beat schedule, and renew the lease of the leading beat.
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
-- Delete entries of a beat schedule, if the leading beat still has its lease.
-- The statements are one transaction. If the SELECT returns no row, the DELETE is not run.
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
-- Check that the table exists and has all columns, and that the role may read and change it.
-- The last three statements change nothing. If the role lacks a privilege, one of them fails with
-- an error that names the privilege.
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
-- Return the columns of the table whose character set lacks characters.
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
