-- PostgreSQL: one statement for each method of the store, outside of any transaction.
--
-- To try a statement, replace {table} with the table's name (kv_store), and the parameters, which
-- are psycopg's (%(key)s), with values.
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
-- INSERT … ON CONFLICT DO UPDATE … WHERE waits if another transaction has locked the row, and then
-- reads the row again. So the lease and the state that it returns belong together.
--
-- now() is the time at which the transaction began, so it is too old after a wait for a lock.
-- clock_timestamp() is the present time.

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
INSERT INTO {table} AS mine (
  key, task, value, updated_at, fence, write, queue, newest_sent, holder, task_id, acquired_at,
  expires_at
) VALUES (
  %(key)s, %(task)s, 'null', clock_timestamp(),
  CAST(floor(extract(epoch FROM clock_timestamp()) * 1000) AS bigint), 0, 1,
  %(sent)s, %(holder)s, %(task_id)s, clock_timestamp(),
  clock_timestamp() + %(ttl)s * interval '1 second'
)
ON CONFLICT (key) DO UPDATE SET
  fence = CASE WHEN mine.holder = %(holder)s THEN mine.fence ELSE greatest(
    coalesce(mine.fence, 0) + 1,
    coalesce(mine.newest, 0) + 1,
    CAST(floor(extract(epoch FROM clock_timestamp()) * 1000) AS bigint)
  ) END,
  write = CASE WHEN mine.holder = %(holder)s THEN mine.write
    WHEN mine.holder IS NOT NULL THEN -1 ELSE 0 END,
  queue = CASE WHEN mine.holder = %(holder)s THEN mine.queue ELSE coalesce(mine.queue, 0) + 1 END,
  acquired_at = CASE WHEN mine.holder = %(holder)s THEN mine.acquired_at
    ELSE clock_timestamp() END,
  expires_at = CASE WHEN mine.holder = %(holder)s THEN greatest(
    coalesce(mine.expires_at, clock_timestamp() + %(ttl)s * interval '1 second'),
    clock_timestamp() + %(ttl)s * interval '1 second'
  ) ELSE clock_timestamp() + %(ttl)s * interval '1 second' END,
  handoff_to = CASE WHEN mine.holder = %(holder)s THEN mine.handoff_to END,
  newest_sent = CASE WHEN mine.holder = %(holder)s THEN mine.newest_sent ELSE %(sent)s END,
  queued_until = CASE WHEN mine.holder = %(holder)s THEN mine.queued_until
    WHEN mine.queued_task_id = %(task_id)s THEN NULL ELSE mine.queued_until END,
  task = coalesce(%(task)s, mine.task),
  holder = %(holder)s,
  task_id = %(task_id)s,
  hold_until = NULL
WHERE mine.holder = %(holder)s OR (
  (mine.holder IS NULL OR mine.expires_at <= clock_timestamp() OR mine.expires_at IS NULL)
  AND (mine.hold_until IS NULL OR mine.hold_until <= clock_timestamp())
  AND CASE WHEN %(rank)s = 0
    THEN NOT coalesce(mine.newest_sent LIKE %(of_clock)s AND mine.newest_sent > %(sent)s, FALSE)
    ELSE greatest(coalesce(mine.fence, 0), coalesce(mine.newest, 0)) <= %(rank)s END
)
RETURNING
  fence, value, schema_version, history,
  CAST(extract(epoch FROM acquired_at) AS double precision), write, ticks_done;

-- name: renew
-- Renew one or several leases, and wait for rows that another transaction has locked.
UPDATE {table} AS mine SET expires_at = clock_timestamp() + held.ttl * interval '1 second'
FROM jsonb_to_recordset(CAST(%(leases)s AS jsonb))
  AS held(key text, fence bigint, holder text, ttl double precision)
WHERE mine.key = held.key AND mine.fence = held.fence AND mine.holder = held.holder
RETURNING mine.key, handoff_to;

-- name: renew_unlocked
-- Renew several leases, except leases whose rows another transaction has locked.
-- The statement is a join, because PostgreSQL executes key IN (SELECT …) as a loop over all leases
-- for each lease.
UPDATE {table} AS mine SET expires_at = clock_timestamp() + unlocked.ttl * interval '1 second'
FROM (
  SELECT held.*
  FROM jsonb_to_recordset(CAST(%(leases)s AS jsonb))
    AS held(key text, fence bigint, holder text, ttl double precision)
  JOIN {table} AS seen
    ON seen.key = held.key AND seen.fence = held.fence AND seen.holder = held.holder
  FOR UPDATE OF seen SKIP LOCKED
) AS unlocked
WHERE mine.key = unlocked.key AND mine.fence = unlocked.fence AND mine.holder = unlocked.holder
RETURNING mine.key, handoff_to;

-- name: save
-- Store a state during a run, or as the last statement of a transaction, and renew the lease.
-- The statement changes nothing if the row's write number is above the parameter "number", because
-- then a newer write has taken effect, or below the parameter "seen", because then the database has
-- lost writes that it had confirmed.
UPDATE {table} SET
  value = %(value)s, schema_version = %(schema_version)s, updated_at = clock_timestamp(),
  write = %(number)s, expires_at = clock_timestamp() + %(ttl)s * interval '1 second'
WHERE key = %(key)s AND fence = %(fence)s AND holder = %(holder)s
  AND write BETWEEN %(seen)s AND %(number)s
RETURNING handoff_to;

-- name: written
-- Read whether a transaction took effect, although its COMMIT was not answered.
-- The statement locks the row, so that it waits for a COMMIT that is still in progress.
SELECT fence = %(fence)s AND holder = %(holder)s, write >= %(number)s
FROM {table} WHERE key = %(key)s
FOR UPDATE;

-- name: release
-- Release a lease without storing a state, and record how its run has ended.
-- The holder is NULL in the hold period, too. So late statements of the ended run are refused.
UPDATE {table} SET
  hold_until = CASE
    WHEN %(hold)s > 0 AND acquired_at + %(hold)s * interval '1 second' > clock_timestamp()
    THEN acquired_at + %(hold)s * interval '1 second' END,
  holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL,
  run_count = coalesce(run_count, 0) + 1, last_outcome = %(outcome)s,
  last_finished_at = clock_timestamp(), history = %(history)s,
  ticks_done = coalesce(%(ticks_done)s, ticks_done)
WHERE key = %(key)s AND fence = %(fence)s AND holder = %(holder)s
RETURNING wanted;

-- name: save_and_release
-- Store a state, release the lease, and record how its run has ended.
UPDATE {table} SET
  value = %(value)s, schema_version = %(schema_version)s, updated_at = clock_timestamp(),
  write = %(number)s,
  hold_until = CASE
    WHEN %(hold)s > 0 AND acquired_at + %(hold)s * interval '1 second' > clock_timestamp()
    THEN acquired_at + %(hold)s * interval '1 second' END,
  holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL,
  run_count = coalesce(run_count, 0) + 1, last_outcome = %(outcome)s,
  last_finished_at = clock_timestamp(), history = %(history)s,
  ticks_done = coalesce(%(ticks_done)s, ticks_done)
WHERE key = %(key)s AND fence = %(fence)s AND holder = %(holder)s
  AND write BETWEEN %(seen)s AND %(number)s
RETURNING wanted;

-- name: give_back
-- Release a lease by its holder's name alone, because the answer to the acquisition was lost.
-- In this case the fence is not known, and the lease may never have been acquired.
UPDATE {table} SET holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL
WHERE key = %(key)s AND holder = %(holder)s
RETURNING wanted;

-- name: peek
-- Read the row of one singleton.
SELECT
  key, task, schema_version, CAST(extract(epoch FROM updated_at) AS double precision), fence,
  holder, task_id, CAST(extract(epoch FROM acquired_at) AS double precision),
  CAST(extract(epoch FROM coalesce(expires_at, hold_until)) AS double precision)
    - CAST(extract(epoch FROM clock_timestamp()) AS double precision),
  coalesce(run_count, 0), last_outcome,
  CAST(extract(epoch FROM last_finished_at) AS double precision), history,
  CAST(extract(epoch FROM clock_timestamp()) AS double precision), value, wanted,
  coalesce(write, 0), handoff_to, coalesce(newest, 0), newest_sent, ticks_done,
  coalesce(queue, 0), CASE WHEN queued_until > clock_timestamp() THEN queued_task_id END,
  CAST(extract(epoch FROM queued_until) AS double precision)
    - CAST(extract(epoch FROM clock_timestamp()) AS double precision)
FROM {table} WHERE fence IS NOT NULL AND key = %(key)s;

-- name: list
-- Read the rows of the singletons under a prefix, and of one more singleton, without states.
SELECT
  key, task, schema_version, CAST(extract(epoch FROM updated_at) AS double precision), fence,
  holder, task_id, CAST(extract(epoch FROM acquired_at) AS double precision),
  CAST(extract(epoch FROM coalesce(expires_at, hold_until)) AS double precision)
    - CAST(extract(epoch FROM clock_timestamp()) AS double precision),
  coalesce(run_count, 0), last_outcome,
  CAST(extract(epoch FROM last_finished_at) AS double precision),
  CASE WHEN last_outcome = 'succeeded' THEN NULL ELSE history END,
  CAST(extract(epoch FROM clock_timestamp()) AS double precision)
FROM {table}
WHERE fence IS NOT NULL
  AND (substr(key, 1, length(%(prefix)s)) = %(prefix)s OR key = %(also)s)
ORDER BY key;

-- name: contents
-- Read the histories of some singletons, and their states if the caller asks for them.
SELECT key, history, CASE WHEN %(values)s THEN value END
FROM {table} WHERE key IN (SELECT value FROM json_array_elements_text(CAST(%(keys)s AS json)));

-- name: ticks
-- Read which ticks of some singletons are done, and whether their leases are held.
-- A hold period counts as held. Its task id is NULL, because no message is running.
SELECT
  key, coalesce(coalesce(expires_at, hold_until) > clock_timestamp(), FALSE), task_id, ticks_done
FROM {table} WHERE key IN (SELECT value FROM json_array_elements_text(CAST(%(keys)s AS json)));

-- name: request_handoff
-- Ask the holder of a lease to hand over, or record which message is next after a hold period.
-- The rank of the message must be larger than the ranks of all earlier messages. So a late request
-- of an older message is refused. A repeated request is not refused. In a hold period the holder is
-- NULL, in the row as well as in the parameter.
UPDATE {table} SET handoff_to = %(handoff_to)s, newest = %(rank)s, newest_sent = %(sent)s
WHERE key = %(key)s AND fence = %(fence)s AND holder IS NOT DISTINCT FROM %(holder)s
  AND coalesce(expires_at, hold_until) > clock_timestamp()
  AND (coalesce(newest, 0) < %(rank)s OR (newest = %(rank)s AND handoff_to = %(handoff_to)s));

-- name: release_early
-- End a hold period early, if the row still has the hold period that the caller has read.
UPDATE {table} SET hold_until = NULL
WHERE key = %(key)s AND fence = %(fence)s AND holder IS NOT DISTINCT FROM %(holder)s
  AND holder IS NULL AND hold_until > clock_timestamp();

-- name: request_run
-- Note a pending run, which the holder sends when it releases the lease.
-- A pending run that the caller has not read yet is newer, and stays.
UPDATE {table} SET wanted = %(pending_run)s
WHERE key = %(key)s AND fence = %(fence)s AND holder IS NOT DISTINCT FROM %(holder)s
  AND coalesce(expires_at, hold_until) > clock_timestamp()
  AND wanted IS NOT DISTINCT FROM %(wanted)s;

-- name: wanted
-- Read the pending run of a row.
SELECT wanted FROM {table} WHERE key = %(key)s;

-- name: pending_run_sent
-- Remove a pending run from the row because it was sent.
-- A newer pending run stays.
UPDATE {table} SET wanted = NULL WHERE key = %(key)s AND wanted = %(pending_run)s;

-- name: queued
-- Read the queue number, the queued message and the running message.
SELECT
  coalesce(queue, 0), CASE WHEN queued_until > clock_timestamp() THEN queued_task_id END,
  CASE WHEN expires_at > clock_timestamp() THEN task_id END
FROM {table} WHERE key = %(key)s;

-- name: claim
-- Note a message as queued, if the row still has the queue number that the caller has read.
-- If the answer to a claim was lost, the caller repeats the claim with 0 as the parameter "first".
-- Only such a repetition succeeds if the row has an equal claim already.
INSERT INTO {table} AS mine (
  key, task, value, updated_at, fence, queue, queued_task_id, queued_until
) VALUES (
  %(key)s, %(task)s, 'null', clock_timestamp(), 0, 1, %(task_id)s,
  clock_timestamp() + %(ttl)s * interval '1 second'
)
ON CONFLICT (key) DO UPDATE SET
  queued_task_id = %(task_id)s,
  queued_until = clock_timestamp() + %(ttl)s * interval '1 second',
  queue = %(number)s + 1
WHERE coalesce(mine.queue, 0) = %(number)s OR (
  mine.queue = %(number)s + 1 AND mine.queued_task_id = %(task_id)s
  AND mine.queued_until > clock_timestamp() AND %(first)s = 0
)
RETURNING queue;

-- name: dequeue
-- Note that a message is no longer queued.
-- The queue number grows even if another message is queued, and a missing row is inserted. So a
-- claim that arrives later is refused, because it names the old number.
INSERT INTO {table} AS mine (key, task, value, updated_at, fence, queue)
VALUES (%(key)s, %(task)s, 'null', clock_timestamp(), 0, 1)
ON CONFLICT (key) DO UPDATE SET
  queue = coalesce(mine.queue, 0) + 1,
  queued_until = CASE WHEN mine.queued_task_id = %(task_id)s THEN NULL ELSE mine.queued_until END;

-- name: expect
-- Insert a row for each singleton that is expected to run and has no row yet.
INSERT INTO {table} (key, task, value, updated_at, fence)
SELECT expected.key, expected.task, 'null', clock_timestamp(), 0
FROM json_to_recordset(CAST(%(tasks)s AS json)) AS expected(key text, task text)
ON CONFLICT (key) DO NOTHING;

-- name: put
-- Store a state while the lease is free, if the row is unchanged since the caller read it.
INSERT INTO {table} AS mine (key, task, value, schema_version, updated_at, fence, write)
VALUES (%(key)s, %(task)s, %(value)s, %(schema_version)s, clock_timestamp(), 0, 1)
ON CONFLICT (key) DO UPDATE SET
  value = %(value)s, schema_version = %(schema_version)s, updated_at = clock_timestamp(),
  fence = coalesce(mine.fence, 0), write = coalesce(mine.write, 0) + 1
WHERE mine.holder IS NULL AND (mine.hold_until IS NULL OR mine.hold_until <= clock_timestamp())
  AND coalesce(mine.fence, 0) = %(fence)s AND coalesce(mine.write, 0) = %(write)s
RETURNING key;

-- name: set_aside
-- Store a copy of a state that cannot be decoded, under a separate key.
INSERT INTO {table} (key, value, updated_at) VALUES (%(key)s, %(value)s, clock_timestamp())
ON CONFLICT (key) DO NOTHING;

-- name: unused
-- Read the keys and the tasks of the singletons that were not used for a given time.
-- The rows come in no order, so that the first rows of a large table arrive at once. The subselects
-- are evaluated once, so that the database can use the index on updated_at.
SELECT key, task FROM {table}
WHERE substr(key, 1, length(%(prefix)s)) = %(prefix)s
  AND fence IS NOT NULL AND holder IS NULL
  AND (hold_until IS NULL OR hold_until <= clock_timestamp())
  AND handoff_to IS NULL AND wanted IS NULL
  AND (queued_until IS NULL OR queued_until <= clock_timestamp())
  AND updated_at <= (SELECT clock_timestamp() - %(older_than)s * interval '1 second')
  AND (last_finished_at IS NULL
    OR last_finished_at <= (SELECT clock_timestamp() - %(older_than)s * interval '1 second'));

-- name: prune
-- Delete the rows of given singletons, if they are still unused.
-- Each row is locked and then checked again, so a singleton whose run has begun meanwhile keeps its
-- row. Rows that another transaction has locked are skipped. The subselect that locks stands in
-- WITH, because elsewhere PostgreSQL may execute the subselect many times.
WITH chosen AS (
  SELECT key FROM {table}
  WHERE key IN (SELECT value FROM json_array_elements_text(CAST(%(keys)s AS json)))
    AND fence IS NOT NULL AND holder IS NULL
    AND (hold_until IS NULL OR hold_until <= clock_timestamp())
    AND handoff_to IS NULL AND wanted IS NULL
    AND (queued_until IS NULL OR queued_until <= clock_timestamp())
    AND updated_at <= (SELECT clock_timestamp() - %(older_than)s * interval '1 second')
    AND (last_finished_at IS NULL
      OR last_finished_at <= (SELECT clock_timestamp() - %(older_than)s * interval '1 second'))
  FOR UPDATE SKIP LOCKED
)
DELETE FROM {table} WHERE key IN (SELECT key FROM chosen)
RETURNING key;

-- name: entries
-- Read the rows of the entries of a beat schedule.
SELECT key, value FROM {table}
WHERE substr(key, 1, length(%(prefix)s)) = %(prefix)s AND key <> %(prefix)s;

-- name: record
-- Store the entries of a beat schedule, and renew the lease of the leading beat.
-- The leader's row is updated first. The UPDATE waits if another transaction has locked the row,
-- and then reads the row again. A condition of the INSERT would see the row as it was before the
-- wait.
WITH leader AS (
  UPDATE {table} SET
    expires_at = clock_timestamp() + %(ttl)s * interval '1 second', write = %(number)s
  WHERE key = %(key)s AND fence = %(fence)s AND holder = %(holder)s
    AND write BETWEEN %(seen)s AND %(number)s
  RETURNING CAST(extract(epoch FROM clock_timestamp()) AS double precision) AS now
), recorded AS (
  INSERT INTO {table} (key, value, updated_at)
  SELECT entry.key, entry.value, clock_timestamp()
  FROM leader, json_to_recordset(CAST(%(entries)s AS json)) AS entry(key text, value text)
  ON CONFLICT (key) DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at
)
SELECT now FROM leader;

-- name: forget
-- Delete entries of a beat schedule, if the leading beat still has its lease.
-- The statements are one transaction. If the first one returns no row, the second one is not run.
UPDATE {table} SET write = %(number)s
WHERE key = %(key)s AND fence = %(fence)s AND holder = %(holder)s
  AND write BETWEEN %(seen)s AND %(number)s
RETURNING key;
DELETE FROM {table} WHERE key IN (SELECT value FROM json_array_elements_text(CAST(%(keys)s AS json)));

-- name: check
-- Check that the table exists and has all columns.
SELECT
  key, value, updated_at, task, schema_version, fence, write, holder, task_id, acquired_at,
  expires_at, hold_until, run_count, last_outcome, last_finished_at, history, ticks_done,
  handoff_to, wanted, queue, queued_task_id, queued_until, newest, newest_sent
FROM {table} WHERE FALSE;

-- name: lacking
-- Read which privileges on the table the role lacks.
-- A privilege on columns counts as well, because the role may have it on all columns in use.
SELECT quote_ident(current_user), string_agg(privilege, ', ')
FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
WHERE NOT CASE privilege WHEN 'DELETE' THEN has_table_privilege(%(table)s, privilege)
  ELSE has_any_column_privilege(%(table)s, privilege) END
HAVING count(*) > 0;

-- name: hiding
-- Return the role if row-level security can hide rows of the table from this role.
-- For each kind of command one permissive policy that shows all rows is enough: r, a, w and d stand
-- for SELECT, INSERT, UPDATE and DELETE. A restrictive policy can hide rows in spite of such
-- policies.
WITH own AS (
  SELECT polcmd, polpermissive, coalesce(pg_get_expr(polqual, polrelid), 'true') = 'true'
    AND coalesce(pg_get_expr(polwithcheck, polrelid), 'true') = 'true' AS hides_nothing
  FROM pg_policy WHERE polrelid = to_regclass(%(table)s) AND EXISTS (
    SELECT FROM unnest(polroles) AS admitted(role)
    WHERE CASE role WHEN 0 THEN TRUE ELSE pg_has_role(current_user, role, 'USAGE') END
  )
)
SELECT quote_ident(current_user) WHERE row_security_active(%(table)s) AND (
  EXISTS (SELECT FROM own WHERE NOT polpermissive AND NOT hides_nothing)
  OR EXISTS (
    SELECT FROM unnest(ARRAY['r', 'a', 'w', 'd']) AS wanted(command) WHERE NOT EXISTS (
      SELECT FROM own WHERE polpermissive AND hides_nothing AND polcmd IN ('*', command)
    )
  )
);

-- name: encodings
-- Return the database's encoding if it lacks characters.
-- SQL_ASCII lacks none, because it stores all bytes unchanged.
SELECT 'the database, whose encoding is ' || current_setting('server_encoding') || ','
WHERE current_setting('server_encoding') NOT IN ('UTF8', 'SQL_ASCII');
