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

ACQUIRE = f"""
{_HEAD}
local holder, ttl, task_id = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local other = get('holder')
if other and other ~= holder and later('expires_at') then return false end
make()
if other ~= holder then redis.call('HINCRBY', key, 'fence', 1) end
set('holder', holder)
set('acquired_at', moment(now))
set('expires_at', moment(now + ttl))
drop('handoff_to')
if task_id == '' then drop('task_id') else
  set('task_id', task_id)
  if get('queued_task_id') == task_id then drop('queued_until') end
end
return {{get('fence'), get('history'), moment(now)}}
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
if not is_held_by(holder, fence) then return false end
local until_then = tonumber(get('acquired_at') or '0') + tonumber(hold)
drop('task_id', 'acquired_at')
if tonumber(hold) > 0 and until_then > now then
  set('holder', holder .. '{HELD_ON}')
  set('expires_at', moment(until_then))
else
  drop('holder', 'expires_at')
end
redis.call('HINCRBY', key, 'run_count', 1)
set('last_outcome', outcome)
set('last_finished_at', moment(now))
set('history', history)
return get('wanted') or ''
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
