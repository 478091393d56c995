"""What Redis and Valkey carry out for each verb: one script each, by the server's own clock.

A singleton is a hash under its key, with the fields that its row would have. It has no expiry of
its own: its lease has, and its fence must outlive that. All keys stand in one sorted set, by which
they are listed.

A script is atomic: nothing comes between what it reads and what it writes.
"""

from __future__ import annotations

from .statements import HELD_ON

#: A field that is not there is ``false``; so is what a script answers for a refusal.
_HEAD = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local key = KEYS[1]
local function moment(at) return string.format('%.6f', at) end
local function get(name) return redis.call('HGET', key, name) end
local function set(name, value) redis.call('HSET', key, name, value) end
local function drop(...) redis.call('HDEL', key, ...) end
local function later(name) local at = get(name); return at and tonumber(at) > now end
local function make()
  if redis.call('HSETNX', key, 'fence', '0') == 1 then
    set('updated_at', moment(now))
    redis.call('ZADD', KEYS[2], 0, key)
  end
end
local function is_held_by(holder, fence)
  return get('holder') == holder and get('fence') == fence
end
"""

#: This one and the release are what a run waits for, so each reads all at once.
ACQUIRE = f"""
{_HEAD}
local holder, ttl, task_id = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local other, expires_at, fence, history, queued = unpack(redis.call(
  'HMGET', key, 'holder', 'expires_at', 'fence', 'history', 'queued_task_id'))
if other and other ~= holder and expires_at and tonumber(expires_at) > now then return false end
if not fence then make() end
if other ~= holder then fence = redis.call('HINCRBY', key, 'fence', 1) end
redis.call('HSET', key, 'holder', holder, 'acquired_at', moment(now),
  'expires_at', moment(now + ttl), 'task_id', task_id)
if task_id == '' then drop('handoff_to', 'task_id') else drop('handoff_to') end
if queued == task_id then drop('queued_until') end
return {{tonumber(fence), history, moment(now)}}
"""

#: For each of the keys three arguments; answers for each ``false``, or who asks to take over.
RENEW = f"""
{_HEAD}
local found = {{}}
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
local holder, fence, outcome, history, hold = unpack(ARGV)
local other, last, acquired_at, wanted = unpack(redis.call(
  'HMGET', key, 'holder', 'fence', 'acquired_at', 'wanted'))
if other ~= holder or last ~= fence then return false end
redis.call('HINCRBY', key, 'run_count', 1)
redis.call('HSET', key, 'last_outcome', outcome, 'last_finished_at', moment(now),
  'history', history)
local until_then = tonumber(acquired_at or '0') + tonumber(hold)
if tonumber(hold) > 0 and until_then > now then
  drop('task_id', 'acquired_at')
  redis.call('HSET', key, 'holder', holder .. '{HELD_ON}', 'expires_at', moment(until_then))
else
  drop('task_id', 'acquired_at', 'holder', 'expires_at')
end
return wanted or ''
"""

PEEK = f"""
{_HEAD}
return {{moment(now), redis.call('HGETALL', key)}}
"""

#: Of all keys that begin so. Histories of those whose last run succeeded are left out.
LIST = f"""
{_HEAD}
local found = {{}}
local first, last = '[' .. ARGV[1], '[' .. ARGV[1] .. '\\255'
for _, each in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], first, last)) do
  key = each
  local all, fields = redis.call('HGETALL', key), {{}}
  local brief = get('last_outcome') == 'succeeded'
  for number = 1, #all, 2 do
    if not (brief and all[number] == 'history') then
      fields[#fields + 1] = all[number]
      fields[#fields + 1] = all[number + 1]
    end
  end
  found[#found + 1] = {{key, fields}}
end
return {{moment(now), found}}
"""

_SEEN = f"""
{_HEAD}
if not is_held_by(ARGV[1], ARGV[2]) or not later('expires_at') then return 0 end
"""

#: Of one whom somebody has seen: sets a field.
TELL = f"""
{_SEEN}
set(ARGV[3], ARGV[4])
return 1
"""

LET_GO = f"""
{_SEEN}
if get('acquired_at') then return 0 end
drop('holder', 'task_id', 'expires_at')
return 1
"""

WANTED = f"""
{_HEAD}
return get('wanted')
"""

GRANTED = f"""
{_HEAD}
if get('wanted') == ARGV[1] then drop('wanted') end
return 1
"""

ENQUEUE = f"""
{_HEAD}
if later('queued_until') then return get('queued_task_id') end
if get('task_id') and later('expires_at') then return get('task_id') end
make()
set('queued_task_id', ARGV[1])
set('queued_until', moment(now + tonumber(ARGV[2])))
return ARGV[1]
"""

DEQUEUE = f"""
{_HEAD}
if get('queued_task_id') == ARGV[1] then drop('queued_until') end
return 1
"""

#: Nobody holds it, asks for it, wishes it to run once more or has it queued, for so long.
_IS_UNUSED = """
local function is_old(name) return not (tonumber(get(name) or '0') > now - tonumber(ARGV[1])) end
local function is_unused()
  local held_on = get('holder') and not get('acquired_at') and not later('expires_at')
  return redis.call('EXISTS', key) == 1 and (held_on or not get('holder'))
    and not get('handoff_to') and not get('wanted') and not later('queued_until')
    and is_old('updated_at') and is_old('last_finished_at')
end
"""

UNUSED = f"""
{_HEAD}
{_IS_UNUSED}
local found = {{}}
local first, last = '[' .. ARGV[2], '[' .. ARGV[2] .. '\\255'
for _, each in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], first, last)) do
  key = each
  if is_unused() then found[#found + 1] = key end
end
return found
"""

#: The last of the keys is that of all keys.
PRUNE = f"""
{_HEAD}
{_IS_UNUSED}
local found = {{}}
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
make()
return 1
"""
