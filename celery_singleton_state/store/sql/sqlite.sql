-- SQLite, 3.35 or newer: each verb of the store is one statement, and nothing around it.
--
-- To try a statement, put the table's name (kv_store) for {table}, and give the parameters, which
-- are :key and the like, values: ".parameter set :key 'value'" in SQLite's shell.
--
-- There is one writer at a time. unixepoch('subsec') answers NULL without an error before 3.42, so
-- times are ISO texts of fixed width, which compare as they sort.

-- name: acquire
-- Take a lease that nobody holds, or repeat what the same holder took, and load the row.
-- Repeated by the same holder it changes nothing but an expiry that would be nearer. Fences and
-- ranks grow on one line, so that a message that was ranked before a fence was given is older. A
-- moment (sent) is a clock's name and a number of fixed length, so two moments of one clock compare
-- as texts. A sum that is too large becomes a number with a point, which grows no more: abs() is an
-- error instead. The write number -1 tells that the lease of another holder had run out.
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
-- Prolong one lease, or several.
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
-- Store a state in mid-run, or as the last statement of a transaction, and prolong the lease.
UPDATE {table} SET
  value = :value, schema_version = :schema_version,
  updated_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'),
  write = :number, expires_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now', :ttl || ' seconds')
WHERE key = :key AND fence = :fence AND holder = :holder
  AND write BETWEEN :seen AND :number
RETURNING handoff_to;

-- name: written
-- Tell whether a transaction was committed whose COMMIT was not answered.
SELECT fence = :fence AND holder = :holder, write >= :number
FROM {table} WHERE key = :key;

-- name: release
-- Give a lease back without a state, and note how its run has ended.
-- Nobody is the holder in the hold period, so what the run sent before, and repeats, is refused.
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
-- Store a state, give the lease back, and note how its run has ended.
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
-- Give back a lease whose fence may be unknown, and which may never have been taken.
UPDATE {table} SET holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL
WHERE key = :key AND holder = :holder
RETURNING wanted;

-- name: peek
-- Read a singleton's row.
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
-- Read the rows of the singletons whose keys begin with a prefix, and one more, without states.
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
-- Read the histories of some singletons, and their states if they are wanted.
SELECT key, history, CASE WHEN :values THEN value END
FROM {table} WHERE key IN (SELECT value FROM json_each(:keys));

-- name: ticks
-- Read what is known of the ticks of some singletons, and whether their leases are held.
-- In its hold period a lease is held for no task.
SELECT
  key,
  coalesce(coalesce(expires_at, hold_until) > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), FALSE),
  task_id, ticks_done
FROM {table} WHERE key IN (SELECT value FROM json_each(:keys));

-- name: request_handoff
-- Ask the holder that was seen to hand over, or note who is to be next after a hold period.
-- By growing ranks: a late request of an older message is refused, a repeated one is not. In a hold
-- period the holder is NULL, in the row and as it was seen.
UPDATE {table} SET handoff_to = :handoff_to, newest = :rank, newest_sent = :sent
WHERE key = :key AND fence = :fence AND holder IS :holder
  AND coalesce(expires_at, hold_until) > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
  AND (coalesce(newest, 0) < :rank OR (newest = :rank AND handoff_to = :handoff_to));

-- name: release_early
-- End the hold period that was seen.
UPDATE {table} SET hold_until = NULL
WHERE key = :key AND fence = :fence AND holder IS :holder
  AND holder IS NULL AND hold_until > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now');

-- name: request_run
-- Note that one more run is to be sent when the holder that was seen releases.
UPDATE {table} SET wanted = :pending_run
WHERE key = :key AND fence = :fence AND holder IS :holder
  AND coalesce(expires_at, hold_until) > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
  AND wanted IS :wanted;

-- name: wanted
-- Read the pending run of a row.
SELECT wanted FROM {table} WHERE key = :key;

-- name: pending_run_sent
-- Strike out a pending run that was sent.
UPDATE {table} SET wanted = NULL WHERE key = :key AND wanted = :pending_run;

-- name: queued
-- Read the queue's number and the message that is queued or running.
SELECT
  coalesce(queue, 0),
  CASE WHEN queued_until > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now') THEN queued_task_id END,
  CASE WHEN expires_at > strftime('%Y-%m-%d %H:%M:%f+00:00', 'now') THEN task_id END
FROM {table} WHERE key = :key;

-- name: claim
-- Note a message as queued, if the queue has the number that was seen.
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
-- Note that a message is queued no more.
-- The number grows whoever is queued, and where there is no row yet: a claim that is under way is
-- refused then.
INSERT INTO {table} AS mine (key, task, value, updated_at, fence, queue)
VALUES (:key, :task, 'null', strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), 0, 1)
ON CONFLICT (key) DO UPDATE SET
  queue = coalesce(mine.queue, 0) + 1,
  queued_until = CASE WHEN mine.queued_task_id = :task_id THEN NULL ELSE mine.queued_until END;

-- name: expect
-- Make rows for singletons that are to run, unless there are some.
INSERT INTO {table} (key, task, value, updated_at, fence)
SELECT
  json_extract(expected.value, '$.key'), json_extract(expected.value, '$.task'), 'null',
  strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'), 0
FROM json_each(:tasks) AS expected WHERE TRUE
ON CONFLICT (key) DO NOTHING;

-- name: put
-- Store a state from outside a run, if nobody holds the lease and the row is as it was seen.
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
-- Keep a value that cannot be decoded under a key of its own.
INSERT INTO {table} (key, value, updated_at)
VALUES (:key, :value, strftime('%Y-%m-%d %H:%M:%f+00:00', 'now'))
ON CONFLICT (key) DO NOTHING;

-- name: unused
-- Read the keys, and the tasks, of the singletons that nobody has used for so long.
-- In no order: what there is of a large table comes as it is found, and without a silence. The
-- subselects are carried out once, so that the index on updated_at can be used.
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
-- Remove the rows of those singletons that nobody uses even now.
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
-- Read the rows of a schedule's entries.
SELECT key, value FROM {table}
WHERE substr(key, 1, length(:prefix)) = :prefix AND key <> :prefix;

-- name: record
-- Store what entries of a schedule have become, and prolong the lease of the beat that leads.
-- There is one writer at a time, so its statement sees nothing change. The leader's row comes with
-- the entries, to be renewed by the same INSERT.
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
-- Remove rows of a schedule's entries, within a transaction and if the first statement finds a row.
UPDATE {table} SET write = :number
WHERE key = :key AND fence = :fence AND holder = :holder
  AND write BETWEEN :seen AND :number
RETURNING key;
DELETE FROM {table} WHERE key IN (SELECT value FROM json_each(:keys));

-- name: check
-- See that the table is there, with all its columns.
SELECT
  key, value, updated_at, task, schema_version, fence, write, holder, task_id, acquired_at,
  expires_at, hold_until, run_count, last_outcome, last_finished_at, history, ticks_done,
  handoff_to, wanted, queue, queued_task_id, queued_until, newest, newest_sent
FROM {table} WHERE FALSE;
