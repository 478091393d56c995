-- SQLite 3.35 or newer: one statement for each method of the store, outside of any transaction.
--
-- To try a statement, replace {table} with the table's name (kv_store), and set the parameters,
-- such as :key, by ".parameter set :key 'value'" in SQLite's shell.
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
-- SQLite has one writer at a time, so no statement needs to lock rows.
--
-- Times are ISO texts of one length, so that comparing the texts compares the times.
-- unixepoch('subsec') is not used, because before SQLite 3.42 it returns NULL without an error.

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
-- abs(-1 - x) is x + 1. SQLite turns a sum that is too large into a floating-point number, to which
-- 1 could be added without effect. abs() raises an error instead.
INSERT INTO {table} AS mine (
  key, task, value, updated_at, fence, write, queue, newest_sent, holder, task_id, acquired_at,
  expires_at
) VALUES (
  :key, :task, 'null', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'),
  CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER), 0, 1,
  :sent, :holder, :task_id, strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'),
  strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', :ttl || ' seconds')
)
ON CONFLICT (key) DO UPDATE SET
  fence = CASE WHEN mine.holder = :holder THEN mine.fence ELSE max(
    abs(-1 - coalesce(mine.fence, 0)),
    abs(-1 - coalesce(mine.newest, 0)),
    CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)
  ) END,
  write = CASE WHEN mine.holder = :holder THEN mine.write
    WHEN mine.holder IS NOT NULL THEN -1 ELSE 0 END,
  queue = CASE WHEN mine.holder = :holder THEN mine.queue ELSE coalesce(mine.queue, 0) + 1 END,
  acquired_at = CASE WHEN mine.holder = :holder THEN mine.acquired_at
    ELSE strftime('%Y-%m-%d %H:%M:%f+00:00', 'now') END,
  expires_at = CASE WHEN mine.holder = :holder THEN max(
    coalesce(mine.expires_at, strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', :ttl || ' seconds')),
    strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', :ttl || ' seconds')
  ) ELSE strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', :ttl || ' seconds') END,
  handoff_to = CASE WHEN mine.holder = :holder THEN mine.handoff_to END,
  newest_sent = CASE WHEN mine.holder = :holder THEN mine.newest_sent ELSE :sent END,
  queued_until = CASE WHEN mine.holder = :holder THEN mine.queued_until
    WHEN mine.queued_task_id = :task_id THEN NULL ELSE mine.queued_until END,
  task = coalesce(:task, mine.task),
  holder = :holder,
  task_id = :task_id,
  hold_until = NULL
WHERE mine.holder = :holder OR (
  (mine.holder IS NULL OR mine.expires_at IS NULL
    OR mine.expires_at <= strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'))
  AND (mine.hold_until IS NULL OR mine.hold_until <= strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'))
  AND CASE WHEN :rank = 0
    THEN NOT coalesce(mine.newest_sent LIKE :of_clock AND mine.newest_sent > :sent, FALSE)
    ELSE max(coalesce(mine.fence, 0), coalesce(mine.newest, 0)) <= :rank END
)
RETURNING
  fence, value, schema_version, history,
  round((julianday(acquired_at) - 2440587.5) * 86400.0, 3), write, ticks_done;

-- name: renew
-- Renew one or several leases.
UPDATE {table} AS mine SET
  expires_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', held.ttl || ' seconds')
FROM (
  SELECT
    json_extract(value, '$.key') AS key, json_extract(value, '$.fence') AS fence,
    json_extract(value, '$.holder') AS holder, json_extract(value, '$.ttl') AS ttl
  FROM json_each(:leases)
) AS held
WHERE mine.key = held.key AND mine.fence = held.fence AND mine.holder = held.holder
RETURNING key, handoff_to;

-- name: save
-- Store a state during a run, or as the last statement of a transaction, and renew the lease.
-- The statement changes nothing if the row's write number is above the parameter "number", because
-- then a newer write has taken effect, or below the parameter "seen", because then the database has
-- lost writes that it had confirmed.
UPDATE {table} SET
  value = :value, schema_version = :schema_version,
  updated_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'),
  write = :number, expires_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', :ttl || ' seconds')
WHERE key = :key AND fence = :fence AND holder = :holder
  AND write BETWEEN :seen AND :number
RETURNING handoff_to;

-- name: written
-- Read whether a transaction took effect, although its COMMIT was not answered.
SELECT fence = :fence AND holder = :holder, write >= :number
FROM {table} WHERE key = :key;

-- name: release
-- Release a lease without storing a state, and record how its run has ended.
-- The holder is NULL in the hold period, too. So late statements of the ended run are refused.
UPDATE {table} SET
  hold_until = CASE
    WHEN :hold > 0 AND strftime('%Y-%m-%d %H:%M:%f+00:00', acquired_at, :hold || ' seconds')
      > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
    THEN strftime('%Y-%m-%d %H:%M:%f+00:00', acquired_at, :hold || ' seconds') END,
  holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL,
  run_count = coalesce(run_count, 0) + 1, last_outcome = :outcome,
  last_finished_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), history = :history,
  ticks_done = coalesce(:ticks_done, ticks_done)
WHERE key = :key AND fence = :fence AND holder = :holder
RETURNING wanted;

-- name: save_and_release
-- Store a state, release the lease, and record how its run has ended.
UPDATE {table} SET
  value = :value, schema_version = :schema_version,
  updated_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'),
  write = :number,
  hold_until = CASE
    WHEN :hold > 0 AND strftime('%Y-%m-%d %H:%M:%f+00:00', acquired_at, :hold || ' seconds')
      > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
    THEN strftime('%Y-%m-%d %H:%M:%f+00:00', acquired_at, :hold || ' seconds') END,
  holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL,
  run_count = coalesce(run_count, 0) + 1, last_outcome = :outcome,
  last_finished_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), history = :history,
  ticks_done = coalesce(:ticks_done, ticks_done)
WHERE key = :key AND fence = :fence AND holder = :holder
  AND write BETWEEN :seen AND :number
RETURNING wanted;

-- name: give_back
-- Release a lease by its holder's name alone, because the answer to the acquisition was lost.
-- In this case the fence is not known, and the lease may never have been acquired.
UPDATE {table} SET holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL
WHERE key = :key AND holder = :holder
RETURNING wanted;

-- name: peek
-- Read the row of one singleton.
SELECT
  key, task, schema_version, round((julianday(updated_at) - 2440587.5) * 86400.0, 3), fence,
  holder, task_id, round((julianday(acquired_at) - 2440587.5) * 86400.0, 3),
  round((julianday(coalesce(expires_at, hold_until)) - 2440587.5) * 86400.0, 3)
    - round((julianday('now') - 2440587.5) * 86400.0, 3),
  coalesce(run_count, 0), last_outcome,
  round((julianday(last_finished_at) - 2440587.5) * 86400.0, 3), history,
  round((julianday('now') - 2440587.5) * 86400.0, 3), value, wanted,
  coalesce(write, 0), handoff_to, coalesce(newest, 0), newest_sent, ticks_done,
  coalesce(queue, 0),
  CASE WHEN queued_until > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now') THEN queued_task_id END,
  round((julianday(queued_until) - 2440587.5) * 86400.0, 3)
    - round((julianday('now') - 2440587.5) * 86400.0, 3)
FROM {table} WHERE fence IS NOT NULL AND key = :key;

-- name: list
-- Read the rows of the singletons under a prefix, and of one more singleton, without states.
SELECT
  key, task, schema_version, round((julianday(updated_at) - 2440587.5) * 86400.0, 3), fence,
  holder, task_id, round((julianday(acquired_at) - 2440587.5) * 86400.0, 3),
  round((julianday(coalesce(expires_at, hold_until)) - 2440587.5) * 86400.0, 3)
    - round((julianday('now') - 2440587.5) * 86400.0, 3),
  coalesce(run_count, 0), last_outcome,
  round((julianday(last_finished_at) - 2440587.5) * 86400.0, 3),
  CASE WHEN last_outcome = 'succeeded' THEN NULL ELSE history END,
  round((julianday('now') - 2440587.5) * 86400.0, 3)
FROM {table}
WHERE fence IS NOT NULL
  AND (substr(key, 1, length(:prefix)) = :prefix OR key = :also)
ORDER BY key;

-- name: contents
-- Read the histories of some singletons, and their states if the caller asks for them.
SELECT key, history, CASE WHEN :values THEN value END
FROM {table} WHERE key IN (SELECT value FROM json_each(:keys));

-- name: ticks
-- Read which ticks of some singletons are done, and whether their leases are held.
-- A hold period counts as held. Its task id is NULL, because no message is running.
SELECT
  key,
  coalesce(coalesce(expires_at, hold_until) > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), FALSE),
  task_id, ticks_done
FROM {table} WHERE key IN (SELECT value FROM json_each(:keys));

-- name: request_handoff
-- Ask the holder of a lease to hand over, or record which message is next after a hold period.
-- The rank of the message must be larger than the ranks of all earlier messages. So a late request
-- of an older message is refused. A repeated request is not refused. In a hold period the holder is
-- NULL, in the row as well as in the parameter.
UPDATE {table} SET handoff_to = :handoff_to, newest = :rank, newest_sent = :sent
WHERE key = :key AND fence = :fence AND holder IS :holder
  AND coalesce(expires_at, hold_until) > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
  AND (coalesce(newest, 0) < :rank OR (newest = :rank AND handoff_to = :handoff_to));

-- name: release_early
-- End a hold period early, if the row still has the hold period that the caller has read.
UPDATE {table} SET hold_until = NULL
WHERE key = :key AND fence = :fence AND holder IS :holder
  AND holder IS NULL AND hold_until > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now');

-- name: request_run
-- Note a pending run, which the holder sends when it releases the lease.
-- A pending run that the caller has not read yet is newer, and stays.
UPDATE {table} SET wanted = :pending_run
WHERE key = :key AND fence = :fence AND holder IS :holder
  AND coalesce(expires_at, hold_until) > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
  AND wanted IS :wanted;

-- name: wanted
-- Read the pending run of a row.
SELECT wanted FROM {table} WHERE key = :key;

-- name: pending_run_sent
-- Remove a pending run from the row because it was sent.
-- A newer pending run stays.
UPDATE {table} SET wanted = NULL WHERE key = :key AND wanted = :pending_run;

-- name: queued
-- Read the queue number, the queued message and the running message.
SELECT
  coalesce(queue, 0),
  CASE WHEN queued_until > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now') THEN queued_task_id END,
  CASE WHEN expires_at > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now') THEN task_id END
FROM {table} WHERE key = :key;

-- name: claim
-- Note a message as queued, if the row still has the queue number that the caller has read.
-- If the answer to a claim was lost, the caller repeats the claim with 0 as the parameter "first".
-- Only such a repetition succeeds if the row has an equal claim already.
INSERT INTO {table} AS mine (
  key, task, value, updated_at, fence, queue, queued_task_id, queued_until
) VALUES (
  :key, :task, 'null', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), 0, 1, :task_id,
  strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', :ttl || ' seconds')
)
ON CONFLICT (key) DO UPDATE SET
  queued_task_id = :task_id,
  queued_until = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', :ttl || ' seconds'),
  queue = :number + 1
WHERE coalesce(mine.queue, 0) = :number OR (
  mine.queue = :number + 1 AND mine.queued_task_id = :task_id
  AND mine.queued_until > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now') AND :first = 0
)
RETURNING queue;

-- name: dequeue
-- Note that a message is no longer queued.
-- The queue number grows even if another message is queued, and a missing row is inserted. So a
-- claim that arrives later is refused, because it names the old number.
INSERT INTO {table} AS mine (key, task, value, updated_at, fence, queue)
VALUES (:key, :task, 'null', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), 0, 1)
ON CONFLICT (key) DO UPDATE SET
  queue = coalesce(mine.queue, 0) + 1,
  queued_until = CASE WHEN mine.queued_task_id = :task_id THEN NULL ELSE mine.queued_until END;

-- name: expect
-- Insert a row for each singleton that is expected to run and has no row yet.
INSERT INTO {table} (key, task, value, updated_at, fence)
SELECT
  json_extract(expected.value, '$.key'), json_extract(expected.value, '$.task'), 'null',
  strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), 0
FROM json_each(:tasks) AS expected WHERE TRUE
ON CONFLICT (key) DO NOTHING;

-- name: put
-- Store a state while the lease is free, if the row is unchanged since the caller read it.
INSERT INTO {table} AS mine (key, task, value, schema_version, updated_at, fence, write)
VALUES (:key, :task, :value, :schema_version, strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), 0, 1)
ON CONFLICT (key) DO UPDATE SET
  value = :value, schema_version = :schema_version,
  updated_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'),
  fence = coalesce(mine.fence, 0), write = coalesce(mine.write, 0) + 1
WHERE mine.holder IS NULL
  AND (mine.hold_until IS NULL OR mine.hold_until <= strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'))
  AND coalesce(mine.fence, 0) = :fence AND coalesce(mine.write, 0) = :write
RETURNING key;

-- name: set_aside
-- Store a copy of a state that cannot be decoded, under a separate key.
INSERT INTO {table} (key, value, updated_at)
VALUES (:key, :value, strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'))
ON CONFLICT (key) DO NOTHING;

-- name: unused
-- Read the keys and the tasks of the singletons that were not used for a given time.
-- The rows come in no order, so that the first rows of a large table arrive at once. The subselects
-- are evaluated once, so that the database can use the index on updated_at.
SELECT key, task FROM {table}
WHERE substr(key, 1, length(:prefix)) = :prefix
  AND fence IS NOT NULL AND holder IS NULL
  AND (hold_until IS NULL OR hold_until <= strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'))
  AND handoff_to IS NULL AND wanted IS NULL
  AND (queued_until IS NULL OR queued_until <= strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'))
  AND updated_at <= (SELECT strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', -:older_than || ' seconds'))
  AND (last_finished_at IS NULL
    OR last_finished_at
      <= (SELECT strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', -:older_than || ' seconds')));

-- name: prune
-- Delete the rows of given singletons, if they are still unused.
DELETE FROM {table}
WHERE key IN (SELECT value FROM json_each(:keys))
  AND fence IS NOT NULL AND holder IS NULL
  AND (hold_until IS NULL OR hold_until <= strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'))
  AND handoff_to IS NULL AND wanted IS NULL
  AND (queued_until IS NULL OR queued_until <= strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'))
  AND updated_at <= (SELECT strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', -:older_than || ' seconds'))
  AND (last_finished_at IS NULL
    OR last_finished_at
      <= (SELECT strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', -:older_than || ' seconds')))
RETURNING key;

-- name: entries
-- Read the rows of the entries of a beat schedule.
SELECT key, value FROM {table}
WHERE substr(key, 1, length(:prefix)) = :prefix AND key <> :prefix;

-- name: record
-- Store the entries of a beat schedule, and renew the lease of the leading beat.
-- The leader's row is inserted together with the entries, so that the same INSERT renews the lease.
-- No other connection can change the row during the statement.
INSERT INTO {table} AS mine (key, value, updated_at, expires_at, write)
SELECT
  entry.key, entry.value, strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), entry.expires_at,
  entry.number
FROM (
  SELECT
    :key AS key, 'null' AS value,
    strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', :ttl || ' seconds') AS expires_at,
    :number AS number
  UNION ALL
  SELECT json_extract(value, '$.key'), json_extract(value, '$.value'), NULL, NULL
  FROM json_each(:entries)
) AS entry
WHERE EXISTS (
  SELECT 1 FROM {table} WHERE key = :key AND fence = :fence AND holder = :holder
    AND write BETWEEN :seen AND :number
)
ON CONFLICT (key) DO UPDATE SET
  expires_at = excluded.expires_at, write = excluded.write,
  value = CASE WHEN mine.key = :key THEN mine.value ELSE excluded.value END,
  updated_at = CASE WHEN mine.key = :key THEN mine.updated_at ELSE excluded.updated_at END
RETURNING round((julianday('now') - 2440587.5) * 86400.0, 3);

-- name: forget
-- Delete entries of a beat schedule, if the leading beat still has its lease.
-- The statements are one transaction. If the first one returns no row, the second one is not run.
UPDATE {table} SET write = :number
WHERE key = :key AND fence = :fence AND holder = :holder
  AND write BETWEEN :seen AND :number
RETURNING key;
DELETE FROM {table} WHERE key IN (SELECT value FROM json_each(:keys));

-- name: check
-- Check that the table exists and has all columns.
SELECT
  key, value, updated_at, task, schema_version, fence, write, holder, task_id, acquired_at,
  expires_at, hold_until, run_count, last_outcome, last_finished_at, history, ticks_done,
  handoff_to, wanted, queue, queued_task_id, queued_until, newest, newest_sent
FROM {table} WHERE FALSE;
