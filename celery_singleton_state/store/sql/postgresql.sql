-- PostgreSQL: each verb of the store is one statement, and nothing around it.
--
-- To try a statement, put the table's name (kv_store) for {table}, and values for the parameters,
-- which are psycopg's: %(key)s.
--
-- INSERT … ON CONFLICT DO UPDATE … WHERE waits for a row that another transaction has locked and
-- then reads it anew, so that the lease and the state that it returns belong together.
--
-- now() stands still from the transaction's start, so after a wait for a lock it is old:
-- clock_timestamp() is not.

-- name: acquire
-- Take a lease that nobody holds, or repeat what the same holder took, and load the row.
-- Repeated by the same holder it changes nothing but an expiry that would be nearer. Fences and
-- ranks grow on one line, so that a message that was ranked before a fence was given is older. A
-- moment (sent) is a clock's name and a number of fixed length, so two moments of one clock compare
-- as texts. The write number -1 tells that the lease of another holder had run out.
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
-- Prolong one lease, or several; it waits for a row that somebody has locked.
UPDATE {table} AS mine SET expires_at = clock_timestamp() + held.ttl * interval '1 second'
FROM jsonb_to_recordset(CAST(%(leases)s AS jsonb))
  AS held(key text, fence bigint, holder text, ttl double precision)
WHERE mine.key = held.key AND mine.fence = held.fence AND mine.holder = held.holder
RETURNING mine.key, handoff_to;

-- name: renew_unlocked
-- Prolong those of several leases whose rows nobody has locked.
-- A join, and not key IN (SELECT …), which is carried out as a loop over all leases for each lease.
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
-- Store a state in mid-run, or as the last statement of a transaction, and prolong the lease.
UPDATE {table} SET
  value = %(value)s, schema_version = %(schema_version)s, updated_at = clock_timestamp(),
  write = %(number)s, expires_at = clock_timestamp() + %(ttl)s * interval '1 second'
WHERE key = %(key)s AND fence = %(fence)s AND holder = %(holder)s
  AND write BETWEEN %(seen)s AND %(number)s
RETURNING handoff_to;

-- name: written
-- Tell whether a transaction was committed whose COMMIT was not answered.
-- It locks the row, so that a COMMIT that is under way has ended.
SELECT fence = %(fence)s AND holder = %(holder)s, write >= %(number)s
FROM {table} WHERE key = %(key)s
FOR UPDATE;

-- name: release
-- Give a lease back without a state, and note how its run has ended.
-- Nobody is the holder in the hold period, so what the run sent before, and repeats, is refused.
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
-- Store a state, give the lease back, and note how its run has ended.
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
-- Give back a lease whose fence may be unknown, and which may never have been taken.
UPDATE {table} SET holder = NULL, task_id = NULL, acquired_at = NULL, expires_at = NULL
WHERE key = %(key)s AND holder = %(holder)s
RETURNING wanted;

-- name: peek
-- Read a singleton's row.
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
-- Read the rows of the singletons whose keys begin with a prefix, and one more, without states.
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
-- Read the histories of some singletons, and their states if they are wanted.
SELECT key, history, CASE WHEN %(values)s THEN value END
FROM {table} WHERE key IN (SELECT value FROM json_array_elements_text(CAST(%(keys)s AS json)));

-- name: ticks
-- Read what is known of the ticks of some singletons, and whether their leases are held.
-- In its hold period a lease is held for no task.
SELECT
  key, coalesce(coalesce(expires_at, hold_until) > clock_timestamp(), FALSE), task_id, ticks_done
FROM {table} WHERE key IN (SELECT value FROM json_array_elements_text(CAST(%(keys)s AS json)));

-- name: request_handoff
-- Ask the holder that was seen to hand over, or note who is to be next after a hold period.
-- By growing ranks: a late request of an older message is refused, a repeated one is not. In a hold
-- period the holder is NULL, in the row and as it was seen.
UPDATE {table} SET handoff_to = %(handoff_to)s, newest = %(rank)s, newest_sent = %(sent)s
WHERE key = %(key)s AND fence = %(fence)s AND holder IS NOT DISTINCT FROM %(holder)s
  AND coalesce(expires_at, hold_until) > clock_timestamp()
  AND (coalesce(newest, 0) < %(rank)s OR (newest = %(rank)s AND handoff_to = %(handoff_to)s));

-- name: release_early
-- End the hold period that was seen.
UPDATE {table} SET hold_until = NULL
WHERE key = %(key)s AND fence = %(fence)s AND holder IS NOT DISTINCT FROM %(holder)s
  AND holder IS NULL AND hold_until > clock_timestamp();

-- name: request_run
-- Note that one more run is to be sent when the holder that was seen releases.
UPDATE {table} SET wanted = %(pending_run)s
WHERE key = %(key)s AND fence = %(fence)s AND holder IS NOT DISTINCT FROM %(holder)s
  AND coalesce(expires_at, hold_until) > clock_timestamp()
  AND wanted IS NOT DISTINCT FROM %(wanted)s;

-- name: wanted
-- Read the pending run of a row.
SELECT wanted FROM {table} WHERE key = %(key)s;

-- name: pending_run_sent
-- Strike out a pending run that was sent.
UPDATE {table} SET wanted = NULL WHERE key = %(key)s AND wanted = %(pending_run)s;

-- name: queued
-- Read the queue's number and the message that is queued or running.
SELECT
  coalesce(queue, 0), CASE WHEN queued_until > clock_timestamp() THEN queued_task_id END,
  CASE WHEN expires_at > clock_timestamp() THEN task_id END
FROM {table} WHERE key = %(key)s;

-- name: claim
-- Note a message as queued, if the queue has the number that was seen.
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
-- Note that a message is queued no more.
-- The number grows whoever is queued, and where there is no row yet: a claim that is under way is
-- refused then.
INSERT INTO {table} AS mine (key, task, value, updated_at, fence, queue)
VALUES (%(key)s, %(task)s, 'null', clock_timestamp(), 0, 1)
ON CONFLICT (key) DO UPDATE SET
  queue = coalesce(mine.queue, 0) + 1,
  queued_until = CASE WHEN mine.queued_task_id = %(task_id)s THEN NULL ELSE mine.queued_until END;

-- name: expect
-- Make rows for singletons that are to run, unless there are some.
INSERT INTO {table} (key, task, value, updated_at, fence)
SELECT expected.key, expected.task, 'null', clock_timestamp(), 0
FROM json_to_recordset(CAST(%(tasks)s AS json)) AS expected(key text, task text)
ON CONFLICT (key) DO NOTHING;

-- name: put
-- Store a state from outside a run, if nobody holds the lease and the row is as it was seen.
INSERT INTO {table} AS mine (key, task, value, schema_version, updated_at, fence, write)
VALUES (%(key)s, %(task)s, %(value)s, %(schema_version)s, clock_timestamp(), 0, 1)
ON CONFLICT (key) DO UPDATE SET
  value = %(value)s, schema_version = %(schema_version)s, updated_at = clock_timestamp(),
  fence = coalesce(mine.fence, 0), write = coalesce(mine.write, 0) + 1
WHERE mine.holder IS NULL AND (mine.hold_until IS NULL OR mine.hold_until <= clock_timestamp())
  AND coalesce(mine.fence, 0) = %(fence)s AND coalesce(mine.write, 0) = %(write)s
RETURNING key;

-- name: set_aside
-- Keep a value that cannot be decoded under a key of its own.
INSERT INTO {table} (key, value, updated_at) VALUES (%(key)s, %(value)s, clock_timestamp())
ON CONFLICT (key) DO NOTHING;

-- name: unused
-- Read the keys, and the tasks, of the singletons that nobody has used for so long.
-- In no order: what there is of a large table comes as it is found, and without a silence. The
-- subselects are carried out once, so that the index on updated_at can be used.
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
-- Remove the rows of those singletons that nobody uses even now.
-- A row is locked and then looked at anew, so that a run which began meanwhile keeps it; one that
-- somebody has locked is passed over. WITH, because a subselect that locks may be carried out many
-- times.
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
-- Read the rows of a schedule's entries.
SELECT key, value FROM {table}
WHERE substr(key, 1, length(%(prefix)s)) = %(prefix)s AND key <> %(prefix)s;

-- name: record
-- Store what entries of a schedule have become, and prolong the lease of the beat that leads.
-- The leader's row comes first: who waits for it sees what became of it meanwhile, which a
-- condition on it in the same statement's snapshot would not.
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
-- Remove rows of a schedule's entries, within a transaction and if the first statement finds a row.
UPDATE {table} SET write = %(number)s
WHERE key = %(key)s AND fence = %(fence)s AND holder = %(holder)s
  AND write BETWEEN %(seen)s AND %(number)s
RETURNING key;
DELETE FROM {table} WHERE key IN (SELECT value FROM json_array_elements_text(CAST(%(keys)s AS json)));

-- name: check
-- See that the table is there, with all its columns.
SELECT
  key, value, updated_at, task, schema_version, fence, write, holder, task_id, acquired_at,
  expires_at, hold_until, run_count, last_outcome, last_finished_at, history, ticks_done,
  handoff_to, wanted, queue, queued_task_id, queued_until, newest, newest_sent
FROM {table} WHERE FALSE;

-- name: lacking
-- Ask which privileges on the table the role lacks.
-- Rights on single columns count, because they may be on all that are needed.
SELECT quote_ident(current_user), string_agg(privilege, ', ')
FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
WHERE NOT CASE privilege WHEN 'DELETE' THEN has_table_privilege(%(table)s, privilege)
  ELSE has_any_column_privilege(%(table)s, privilege) END
HAVING count(*) > 0;

-- name: hiding
-- Ask whether row-level security can hide rows from the role.
-- For each kind of statement (r, a, w, d) one policy is enough that lets the role see all rows; one
-- that is restrictive can hide rows in spite of that.
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
-- Ask whether the database's encoding lacks characters.
-- One of SQL_ASCII takes every byte as it is.
SELECT 'the database, whose encoding is ' || current_setting('server_encoding') || ','
WHERE current_setting('server_encoding') NOT IN ('UTF8', 'SQL_ASCII');
