"""What Redis and Valkey carry out for each verb: one script each, by the server's own clock.

A singleton is a hash under its key, with the fields that its row would have. It has no expiry of
its own: its lease has, and its fence must outlive that. All keys stand in one sorted set, by which
they are listed.

A script is atomic: nothing comes between what it reads and what it writes.

Every script begins its writes with one that changes nothing (``touch``), and that has two effects:

- A replica refuses the script. Without that a primary that was demoted would go on to answer from
  old data: that a lease is held, or that it is lost.
- A server whose memory is full accepts the script's other writes. It refuses only a *first* write
  that can need memory. So renewals, releases and runs of known singletons go on; only a singleton
  that the server does not know yet is refused.
"""

from __future__ import annotations

#: A field that is not there is ``false``; so is what a script answers for a refusal.
_HEAD = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local key = KEYS[1]
local function moment(at) return string.format('%.6f', at) end
local function get(name) return redis.call('HGET', key, name) end
local function set(name, value) redis.call('HSET', key, name, value) end
local function drop(...) redis.call('HDEL', key, ...) end
local function later(name) local at = tonumber(get(name) or ''); return at and at > now end
local function touch() redis.call('HDEL', key, '') end
local function make(task)
  if redis.call('HEXISTS', key, 'fence') == 1 then return touch() end
  redis.call('HSET', key, 'fence', '0', 'updated_at', moment(now))
  if task ~= '' then set('task', task) end
  redis.call('ZADD', KEYS[2], 0, key)
end
local function is_larger(one, other)
  if #one ~= #other then return #one > #other end
  return one > other
end
local function is_held()
  return later(redis.call('HEXISTS', key, 'holder') == 1 and 'expires_at' or 'hold_until')
end
local function is_held_by(holder, fence)
  return get('holder') == holder and get('fence') == fence
end
"""

#: The acquisition and the release are what a run waits for, so each reads all fields at once. Lua's
#: numbers are exact up to 2^53 only: beyond that Redis itself adds to the fence, it is answered as
#: text, and numbers are compared as texts.
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
  set('expires_at', moment(math.max(tonumber(expires_at or '0'), now + ttl)))
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
redis.call('HSET', key, 'holder', holder, 'acquired_at', moment(now),
  'expires_at', moment(now + ttl), 'task_id', task_id, 'write', write)
if task_id == '' then drop('handoff_to', 'task_id') else drop('handoff_to') end
if queued == task_id then drop('queued_until') end
if hold_until then drop('hold_until') end
if sent == '' then drop('newest_sent') else set('newest_sent', sent) end
if task ~= '' then set('task', task) end
return {{fence, history, moment(now), write, ticks_done}}
"""

#: For each of the keys three arguments; answers for each ``false``, or who asks to take over.
RENEW = f"""
{_HEAD}
local found = {{}}
touch()
for number = 1, #KEYS do
  key = KEYS[number]
  local first = 3 * number - 2
  if is_held_by(ARGV[first], ARGV[first + 1]) then
    set('expires_at', moment(now + tonumber(ARGV[first + 2])))
    found[number] = get('handoff_to') or ''
  else
    found[number] = false
  end
end
return found
"""

RELEASE = f"""
{_HEAD}
touch()
local holder, fence, outcome, history, hold, ticks_done = unpack(ARGV)
local other, last, acquired_at, wanted = unpack(redis.call(
  'HMGET', key, 'holder', 'fence', 'acquired_at', 'wanted'))
if other ~= holder or last ~= fence then return false end
redis.call('HINCRBY', key, 'run_count', 1)
redis.call('HSET', key, 'last_outcome', outcome, 'last_finished_at', moment(now),
  'history', history)
if ticks_done ~= '' then set('ticks_done', ticks_done) end
local until_then = tonumber(acquired_at or '0') + tonumber(hold)
drop('task_id', 'acquired_at', 'holder', 'expires_at')
if tonumber(hold) > 0 and until_then > now then set('hold_until', moment(until_then)) end
return wanted or ''
"""

#: By the holder alone: its fence may be unknown, and a holder's name is never used again.
GIVE_BACK = f"""
{_HEAD}
touch()
local other, wanted = unpack(redis.call('HMGET', key, 'holder', 'wanted'))
if other ~= ARGV[1] then return false end
drop('task_id', 'acquired_at', 'holder', 'expires_at')
return wanted or ''
"""

PEEK = f"""
{_HEAD}
touch()
return {{moment(now), redis.call('HGETALL', key)}}
"""

#: One page of the keys that begin with a prefix: those after a key, or the first ones. A script
#: stops the server for as long as it runs, so none reads all keys. Its second answer is the key
#: after which the next page begins, ``false`` at the end.
_PAGE = f"""
{_HEAD}
redis.call('ZREM', KEYS[1], '')
local prefix, after, size = ARGV[1], ARGV[2], tonumber(ARGV[3])
local page = redis.call('ZRANGEBYLEX', KEYS[1],
  after == '' and '[' .. prefix or '(' .. after, '[' .. prefix .. '\\255', 'LIMIT', 0, size)
local next_after = #page == size and page[size]
local found = {{}}
"""

#: Histories of singletons whose last run succeeded are left out.
LIST = f"""
{_PAGE}
for _, each in ipairs(page) do
  key = each
  -- A key that is not of a hash is somebody else's value.
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
return {{moment(now), next_after, found}}
"""

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

#: For each of the keys ``false``, or whether the lease is held, for which task, and the ticks.
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

_SEEN = f"""
{_HEAD}
touch()
if (get('holder') or '') ~= ARGV[1] or get('fence') ~= ARGV[2] or not is_held() then return 0 end
"""

REQUEST_HANDOFF = f"""
{_SEEN}
local who, rank, sent = ARGV[3], ARGV[4], ARGV[5]
local newest = get('newest') or '0'
local is_repeated = newest == rank and get('handoff_to') == who
if not is_larger(rank, newest) and not is_repeated then return 0 end
redis.call('HSET', key, 'handoff_to', who, 'newest', rank)
if sent == '' then drop('newest_sent') else set('newest_sent', sent) end
return 1
"""

#: Only in place of the wish that was seen together with the holder, so that a late request does
#: not replace a newer wish.
REQUEST_RUN = f"""
{_SEEN}
if (get('wanted') or '') ~= ARGV[3] then return 0 end
set('wanted', ARGV[4])
return 1
"""

RELEASE_EARLY = f"""
{_SEEN}
if get('holder') then return 0 end
drop('hold_until')
return 1
"""

WANTED = f"""
{_HEAD}
touch()
return get('wanted')
"""

PENDING_RUN_SENT = f"""
{_HEAD}
touch()
if get('wanted') == ARGV[1] then drop('wanted') end
return 1
"""

#: The queue's number, and the message that is queued or running.
QUEUED = f"""
{_HEAD}
touch()
local queued = later('queued_until') and get('queued_task_id')
local running = later('expires_at') and get('task_id')
return {{tonumber(get('queue') or '0'), queued or false, running or false}}
"""

#: By the number that the queue had when it was read. A repeated claim is answered like the first; a
#: first claim is not taken for the repetition of another caller's with the same task id.
CLAIM = f"""
{_HEAD}
local task_id, life, number = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local is_first, task = ARGV[4] == '1', ARGV[5]
local queue = tonumber(get('queue') or '0')
local is_repeated = queue == number + 1 and get('queued_task_id') == task_id
  and later('queued_until') and not is_first
if queue ~= number and not is_repeated then touch() return 0 end
make(task)
redis.call('HSET', key, 'queue', number + 1, 'queued_task_id', task_id,
  'queued_until', moment(now + life))
return 1
"""

#: The number grows whoever is queued, also of a singleton that is not known yet: a claim of this
#: message that is still under way is refused.
DEQUEUE = f"""
{_HEAD}
make(ARGV[2])
redis.call('HINCRBY', key, 'queue', 1)
if get('queued_task_id') == ARGV[1] then drop('queued_until') end
return 1
"""

#: Nobody holds it, asks for it, wishes it to run once more or has it queued, for so long.
_IS_UNUSED = """
local function is_old(name)
  local at = tonumber(get(name) or '0')
  return at and at <= now - older_than
end
local function is_unused()
  if redis.call('TYPE', key).ok ~= 'hash' then return false end
  return not get('holder') and not later('hold_until')
    and not get('handoff_to') and not get('wanted') and not later('queued_until')
    and is_old('updated_at') and is_old('last_finished_at')
end
"""

UNUSED = f"""
{_PAGE}
local older_than = tonumber(ARGV[4])
{_IS_UNUSED}
for _, each in ipairs(page) do
  key = each
  if is_unused() then found[#found + 1] = {{key, get('task')}} end
end
return {{moment(now), next_after, found}}
"""

#: The last of the keys is that of all keys.
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

EXPECT = f"""
{_HEAD}
make(ARGV[1])
return 1
"""
