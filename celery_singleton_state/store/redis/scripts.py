"""The Lua scripts that Redis and Valkey run: one for each method of the store.

A singleton is a hash under its key. The hash has the fields that the singleton's row in SQL would
have. The hash itself never expires, because the fence must outlive the lease; the lease's expiry is
a field. One sorted set holds the keys of all hashes, so that the hashes can be listed.

Redis runs a script atomically: no other command runs between its reads and its writes. All times
come from the server's own clock.

The first write of every script changes nothing (``touch``, which removes a field that does not
exist). This write has two effects:

- A replica refuses the script. Without this write, a primary that was demoted to a replica would
  answer from old data, for example that a lease is held, or that it is lost.
- A server whose memory is full accepts the script's later writes, because it refuses a write that
  can need memory only if this is the script's *first* write. So renewals, releases and runs of
  known singletons go on. Only a singleton that the server does not know yet is refused.
"""

from __future__ import annotations

#: The Lua functions with which every script begins. In Lua the value of a missing field is
#: ``false``. A script that refuses a request returns ``false`` or 0.
_HEAD = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local key = KEYS[1]
local function timestamp(at) return string.format('%.6f', at) end
local function get(name) return redis.call('HGET', key, name) end
local function set(name, value) redis.call('HSET', key, name, value) end
local function drop(...) redis.call('HDEL', key, ...) end
local function is_future(name) local at = tonumber(get(name) or ''); return at and at > now end
local function touch() redis.call('HDEL', key, '') end
local function make(task)
  if redis.call('HEXISTS', key, 'fence') == 1 then return touch() end
  redis.call('HSET', key, 'fence', '0', 'updated_at', timestamp(now))
  if task ~= '' then set('task', task) end
  redis.call('ZADD', KEYS[2], 0, key)
end
local function is_larger(one, other)
  if #one ~= #other then return #one > #other end
  return one > other
end
local function is_held()
  return is_future(redis.call('HEXISTS', key, 'holder') == 1 and 'expires_at' or 'hold_until')
end
local function is_held_by(holder, fence)
  return get('holder') == holder and get('fence') == fence
end
"""

#: Acquire a lease. The answer is ``false`` if the lease is held, or if a newer message has acquired
#: it or asked for it. A run waits for this script, so the script is fast: it reads all fields at
#: once. Lua's numbers are exact only up to 2^53, and a fence can be larger. So Redis itself
#: increments the fence (HINCRBY), the script returns the fence as text, and ``is_larger`` compares
#: numbers as texts.
ACQUIRE = f"""
{_HEAD}
local holder, ttl, task_id, rank, sent, task = ARGV[1], tonumber(ARGV[2]), unpack(ARGV, 3)
local other, expires_at, fence, history, queued, acquired_at, write, ticks_done, newest, last,
  hold_until = unpack(redis.call('HMGET', key, 'holder', 'expires_at', 'fence', 'history',
    'queued_task_id', 'acquired_at', 'write', 'ticks_done', 'newest', 'newest_sent', 'hold_until'))
local free_at = tonumber(other and expires_at or hold_until or '') or now
if other ~= holder and free_at > now then touch() return false end
if not is_larger(newest or '0', fence or '0') then newest = fence end
local is_older
if rank == '0' then
  local clock = string.sub(sent, 1, -21)
  is_older = last and clock ~= '' and clock == string.sub(last, 1, -21) and last > sent
else
  is_older = is_larger(newest or '0', rank)
end
if other ~= holder and is_older then touch() return false end
make(task)
if other == holder then
  set('expires_at', timestamp(math.max(tonumber(expires_at or '0'), now + ttl)))
  return {{fence, history, acquired_at, tonumber(write or '0'), ticks_done}}
end
local clock = time[1] * 1000 + math.floor(time[2] / 1000)
if tonumber(newest or '0') < clock then
  fence = string.format('%.0f', clock)
  set('fence', fence)
else
  set('fence', newest or '0')
  redis.call('HINCRBY', key, 'fence', 1)
  fence = get('fence')
end
write = other and -1 or 0
redis.call('HINCRBY', key, 'queue', 1)
redis.call('HSET', key, 'holder', holder, 'acquired_at', timestamp(now),
  'expires_at', timestamp(now + ttl), 'task_id', task_id, 'write', write)
if task_id == '' then drop('handoff_to', 'task_id') else drop('handoff_to') end
if queued == task_id then drop('queued_until') end
if hold_until then drop('hold_until') end
if sent == '' then drop('newest_sent') else set('newest_sent', sent) end
if task ~= '' then set('task', task) end
return {{fence, history, timestamp(now), write, ticks_done}}
"""

#: Renew several leases. The arguments are the holder, the fence and the life of each lease. The
#: answer has one item for each lease: ``false`` if the lease is lost, otherwise the task id of the
#: message that asks the holder to hand over, or an empty text if no message asks.
RENEW = f"""
{_HEAD}
local found = {{}}
touch()
for number = 1, #KEYS do
  key = KEYS[number]
  local first = 3 * number - 2
  if is_held_by(ARGV[first], ARGV[first + 1]) then
    set('expires_at', timestamp(now + tonumber(ARGV[first + 2])))
    found[number] = get('handoff_to') or ''
  else
    found[number] = false
  end
end
return found
"""

#: Release a lease and record the run's outcome. The answer is ``false`` if the lease is lost,
#: otherwise the pending run, or an empty text if there is no pending run. A run waits for this
#: script, so the script is fast: it reads all fields at once.
RELEASE = f"""
{_HEAD}
touch()
local holder, fence, outcome, history, hold, ticks_done = unpack(ARGV)
local other, last, acquired_at, wanted = unpack(redis.call(
  'HMGET', key, 'holder', 'fence', 'acquired_at', 'wanted'))
if other ~= holder or last ~= fence then return false end
redis.call('HINCRBY', key, 'run_count', 1)
redis.call('HSET', key, 'last_outcome', outcome, 'last_finished_at', timestamp(now),
  'history', history)
if ticks_done ~= '' then set('ticks_done', ticks_done) end
local hold_until = tonumber(acquired_at or '0') + tonumber(hold)
drop('task_id', 'acquired_at', 'holder', 'expires_at')
if tonumber(hold) > 0 and hold_until > now then set('hold_until', timestamp(hold_until)) end
return wanted or ''
"""

#: Release a lease without recording a run. The answer is ``false`` if this holder does not have the
#: lease. The script checks only the holder's name, because the caller does not know the fence: the
#: answer to its acquisition was lost. The name is enough, because it is never used twice.
GIVE_BACK = f"""
{_HEAD}
touch()
local other, wanted = unpack(redis.call('HMGET', key, 'holder', 'wanted'))
if other ~= ARGV[1] then return false end
drop('task_id', 'acquired_at', 'holder', 'expires_at')
return wanted or ''
"""

#: Read a singleton's hash and the server's time.
PEEK = f"""
{_HEAD}
touch()
return {{timestamp(now), redis.call('HGETALL', key)}}
"""

#: The common beginning of scripts that read the keys with a prefix. Such a script reads only one
#: page of keys, because the server serves no other client while a script runs. The script's
#: arguments are the prefix, the last key of the preceding page (empty for the first page) and the
#: page's size. The second item of the script's answer is the last key of the page that was read, or
#: ``false`` if there are no more keys.
_PAGE = f"""
{_HEAD}
redis.call('ZREM', KEYS[1], '')
local prefix, after, size = ARGV[1], ARGV[2], tonumber(ARGV[3])
local page = redis.call('ZRANGEBYLEX', KEYS[1],
  after == '' and '[' .. prefix or '(' .. after, '[' .. prefix .. '\\255', 'LIMIT', 0, size)
local next_after = #page == size and page[size]
local found = {{}}
"""

#: Read one page of the hashes of singletons. The script leaves out the history of a singleton whose
#: last run succeeded, because lists do not show such a history.
LIST = f"""
{_PAGE}
for _, each in ipairs(page) do
  key = each
  -- If another program has written a value that is not a hash under this key, list no fields.
  local all, fields = redis.pcall('HGETALL', key), {{}}
  if all.err then all = {{}} end
  local brief = #all > 0 and get('last_outcome') == 'succeeded'
  for number = 1, #all, 2 do
    if not (brief and all[number] == 'history') then
      fields[#fields + 1] = all[number]
      fields[#fields + 1] = all[number + 1]
    end
  end
  found[#found + 1] = {{key, fields}}
end
return {{timestamp(now), next_after, found}}
"""

#: Read the histories of several singletons. The item for a key without a history is ``false``.
HISTORIES = f"""
{_HEAD}
touch()
local found = {{}}
for number = 1, #KEYS do
  local history = redis.pcall('HGET', KEYS[number], 'history')
  found[number] = type(history) == 'string' and history
end
return found
"""

#: Read which ticks of several singletons are done. The item for a key is ``false`` if the key does
#: not exist, otherwise three values: whether the lease is held, the run's task id, and the record
#: of the ticks that are done.
TICKS = f"""
{_HEAD}
local found = {{}}
touch()
for number = 1, #KEYS do
  key = KEYS[number]
  found[number] = redis.call('EXISTS', key) == 1 and {{
    is_held() and 1 or 0, get('task_id'), get('ticks_done')}}
end
return found
"""

#: The common beginning of requests about a lease, or about a hold period, that the caller has read.
#: The request is refused if the singleton has another holder or fence by now, or if the lease has
#: expired or the hold period has ended.
_SAME_LEASE = f"""
{_HEAD}
touch()
if (get('holder') or '') ~= ARGV[1] or get('fence') ~= ARGV[2] or not is_held() then return 0 end
"""

#: Ask the holder to hand over. The request is refused if a newer message has asked. A repeated
#: request succeeds again, because the caller repeats a request whose answer was lost.
REQUEST_HANDOFF = f"""
{_SAME_LEASE}
local requester, rank, sent = ARGV[3], ARGV[4], ARGV[5]
local newest = get('newest') or '0'
local is_repeated = newest == rank and get('handoff_to') == requester
if not is_larger(rank, newest) and not is_repeated then return 0 end
redis.call('HSET', key, 'handoff_to', requester, 'newest', rank)
if sent == '' then drop('newest_sent') else set('newest_sent', sent) end
return 1
"""

#: Record a pending run: one more run, for which a coalesced message asks. The new pending run
#: replaces only the pending run that the caller has read, so that a late request does not replace a
#: newer pending run.
REQUEST_RUN = f"""
{_SAME_LEASE}
if (get('wanted') or '') ~= ARGV[3] then return 0 end
set('wanted', ARGV[4])
return 1
"""

#: End a hold period early, unless a run holds the lease.
RELEASE_EARLY = f"""
{_SAME_LEASE}
if get('holder') then return 0 end
drop('hold_until')
return 1
"""

#: Read a singleton's pending run.
WANTED = f"""
{_HEAD}
touch()
return get('wanted')
"""

#: Remove a pending run that was sent, unless a newer one has replaced it.
PENDING_RUN_SENT = f"""
{_HEAD}
touch()
if get('wanted') == ARGV[1] then drop('wanted') end
return 1
"""

#: For ``enqueue_once``: read the queue number, the task id of the queued message, and the task id
#: of the run in progress.
QUEUED = f"""
{_HEAD}
touch()
local queued = is_future('queued_until') and get('queued_task_id')
local running = is_future('expires_at') and get('task_id')
return {{tonumber(get('queue') or '0'), queued or false, running or false}}
"""

#: For ``enqueue_once``: note a message as queued (a claim). The caller names the queue number that
#: it has read, and is refused if the queue number has changed. If the answer to a claim was lost,
#: the caller repeats the claim, and the repetition succeeds if the claim had taken effect. In a
#: caller's first attempt (``is_first``) an equal claim in the hash belongs to another caller with
#: the same task id, so the attempt is refused.
CLAIM = f"""
{_HEAD}
local task_id, life, number = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local is_first, task = ARGV[4] == '1', ARGV[5]
local queue = tonumber(get('queue') or '0')
local is_repeated = queue == number + 1 and get('queued_task_id') == task_id
  and is_future('queued_until') and not is_first
if queue ~= number and not is_repeated then touch() return 0 end
make(task)
redis.call('HSET', key, 'queue', number + 1, 'queued_task_id', task_id,
  'queued_until', timestamp(now + life))
return 1
"""

#: For ``enqueue_once``: note that a message is no longer queued. The queue number grows even if
#: another message is queued or the singleton is new, so that a claim of this message that is still
#: in flight is refused.
DEQUEUE = f"""
{_HEAD}
make(ARGV[2])
redis.call('HINCRBY', key, 'queue', 1)
if get('queued_task_id') == ARGV[1] then drop('queued_until') end
return 1
"""

#: The Lua function that returns whether a singleton is unused. A singleton is unused if it has no
#: holder, no hold period, no handoff request, no pending run and no queued message, and if it was
#: created and its last run ended at least ``older_than`` seconds ago.
_IS_UNUSED = """
local function is_old(name)
  local at = tonumber(get(name) or '0')
  return at and at <= now - older_than
end
local function is_unused()
  if redis.call('TYPE', key).ok ~= 'hash' then return false end
  return not get('holder') and not is_future('hold_until')
    and not get('handoff_to') and not get('wanted') and not is_future('queued_until')
    and is_old('updated_at') and is_old('last_finished_at')
end
"""

#: Read the keys and the names of the tasks of the unused singletons in one page of keys.
UNUSED = f"""
{_PAGE}
local older_than = tonumber(ARGV[4])
{_IS_UNUSED}
for _, each in ipairs(page) do
  key = each
  if is_unused() then found[#found + 1] = {{key, get('task')}} end
end
return {{timestamp(now), next_after, found}}
"""

#: Remove several singletons, if they are still unused. The last item of ``KEYS`` is the key of the
#: sorted set.
PRUNE = f"""
{_HEAD}
local older_than = tonumber(ARGV[1])
{_IS_UNUSED}
local found = {{}}
touch()
for number = 1, #KEYS - 1 do
  key = KEYS[number]
  if is_unused() then
    redis.call('DEL', key)
    redis.call('ZREM', KEYS[#KEYS], key)
    found[#found + 1] = key
  end
end
return found
"""

#: Create the hash of a singleton that has not run yet, so that lists show it.
EXPECT = f"""
{_HEAD}
make(ARGV[1])
return 1
"""
