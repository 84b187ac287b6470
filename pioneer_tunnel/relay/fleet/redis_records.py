"""How records stand in Redis, and the scripts that read and write them.

A record is text, so that an operator can read it:

    VERSION
    FENCE PROCESS NODE SESSION ["KEY ID","INSTANCE",SINCE]
    FENCE PROCESS NODE SESSION ["KEY ID","INSTANCE",SINCE,INDEX,OF]

with one line for each holding. For some seconds after the last session has left with its process, which drains, it is
the word `leaving`. What is read is not trusted: any client of Redis may have put it there. A record
that is not exactly like this counts as one without holdings.
"""

from __future__ import annotations

import json
import re
from typing import Final

from ..._wire.links import MOST_LINKS, LinkPlace
from .records import LEAVING, Holding, Record

__all__ = [
    "BREAK",
    "MOST_COUNTED",
    "MOST_RECORD_BYTES",
    "READ",
    "RENEW",
    "WRITE",
    "BrokenRecord",
    "decode",
    "encode_holding",
]

MOST_RECORD_BYTES: Final = 64 * 1024
"""Bytes of the longest record that is read: eight links whose instances have 1024 characters fit."""

MOST_NUMBER: Final = 2**51
"""Fences and versions are below it. Lua counts exactly so far, and milliseconds since 1970 do not reach it."""

MOST_COUNTED: Final = 2**50
"""The scripts count on from numbers below it alone: milliseconds do not reach it either, so a higher one is forged.

If they counted up to `MOST_NUMBER`, no record could be read after that. And each node tells Redis the highest number
that it has seen, so this would last until all nodes were restarted at once.
"""

_VERSION: Final = re.compile(rb"[1-9][0-9]*")
_LINE: Final = re.compile(
    r"(?P<fence>[0-9]{1,16}) (?P<process>[0-9a-f]{16}) "
    r"(?P<node>[!-~]{1,128}) (?P<session>[!-~]{1,64}) (?P<rest>\[.*\])"
)


class BrokenRecord(Exception):
    """What stands in Redis is no record. The text says why; it quotes nothing.

    Args:
        why: the text.
        version: what the scripts take for its version.
    """

    def __init__(self, why: str, version: int = 0) -> None:
        super().__init__(why)
        self.version = version


def encode_holding(holding: Holding) -> str:
    """A holding as the line of a record."""
    rest: list[object] = [holding.key_id, holding.instance, holding.since]
    if holding.place is not None:
        rest += [holding.place.index, holding.place.of]
    text = json.dumps(rest, separators=(",", ":"), ensure_ascii=False)
    return f"{holding.fence} {holding.process} {holding.node} {holding.session} {text}"


def decode(data: bytes) -> Record:
    """Read a record; no bytes are that of a tunnel that no process has.

    Raises:
        BrokenRecord: it is none.
    """
    if not data:
        return Record(0)
    if data == b"leaving":
        return LEAVING
    begin = _VERSION.match(data)
    version = int(begin[0]) if begin is not None and len(begin[0]) <= 16 else 0
    try:
        if len(data) > MOST_RECORD_BYTES:
            raise BrokenRecord("it is too long")
        first, *lines = data.decode().split("\n")
        if first != str(version) or not 0 < version < MOST_NUMBER:
            raise BrokenRecord("it does not begin with a version")
        if len(lines) > 2 * MOST_LINKS:
            raise BrokenRecord("it has too many holdings")
        return Record(version, tuple(map(_decode_holding, lines)))
    except UnicodeDecodeError:
        raise BrokenRecord("it is not UTF-8", version) from None
    except BrokenRecord as broken:
        raise BrokenRecord(str(broken), version) from None


def _decode_holding(line: str) -> Holding:
    match = _LINE.fullmatch(line)
    if match is None:
        raise BrokenRecord("one of its lines is no holding")
    fence = int(match["fence"])
    if not 0 < fence < MOST_NUMBER:
        raise BrokenRecord("a holding has an impossible fence")
    try:
        rest = json.loads(match["rest"])
    except (ValueError, RecursionError):
        raise BrokenRecord("a holding ends with something that is not JSON") from None
    if [*map(type, rest)] not in _SHAPES:
        raise BrokenRecord("a holding ends with something else than a key, an instance, a time and a place")
    key_id, instance, since, *place = rest
    if place and not 0 <= place[0] < place[1] <= MOST_LINKS:
        raise BrokenRecord("a holding has an impossible place")
    if not (len(key_id) <= 128 and len(instance) <= 1024 and 0 <= since < 2**40):
        raise BrokenRecord("a holding has an impossible key, instance or time")
    try:
        f"{key_id}{instance}".encode()
    except UnicodeEncodeError:  # it could not be written back
        raise BrokenRecord("a holding has a key or an instance with half a character") from None
    return Holding(
        node=match["node"],
        process=match["process"],
        session=match["session"],
        fence=fence,
        key_id=key_id,
        instance=instance,
        since=float(since),
        place=LinkPlace(*place) if place else None,
    )


_SHAPES: Final = [[str, str, number, *place] for number in (float, int) for place in ((), (int, int))]


_BROKEN: Final = "-"
"""In place of a lease: its process was killed. No node has such a name."""

# The scripts. `load` takes a key of another type for an absent one: an error would look like an outage of Redis.
# `living` returns the record without dead processes, whether a process in it lives, and whether one was killed.

_COMMON: Final = f"""
local function load(key)
  local value = redis.pcall('GET', key)
  if type(value) ~= 'string' or #value > {MOST_RECORD_BYTES} then return '' end
  return value
end
local function version(record)
  local number = string.match(record, '^([1-9]%d*)')
  if number == nil or #number > 16 then return '0' end
  return number
end
local function number(text)
  local value = tonumber(text) or 0
  if value >= 0 and value < {MOST_COUNTED} then return value end
  return 0
end
local function living(record, prefix, trusting)
  if trusting == '1' then return record, true, false end
  local lines, lives, any, left = {{}}, {{}}, false, false
  for line in string.gmatch(record, '[^\\n]+') do
    local process = string.match(line, '^%d+ (%x+) ')
    if process == nil then
      lines[#lines + 1] = line
    else
      if lives[process] == nil then
        local lease = load(prefix .. 'lease:' .. process)
        left = left or lease == '{_BROKEN}'
        lives[process] = lease ~= '' and lease ~= '{_BROKEN}'
      end
      if lives[process] then
        lines[#lines + 1] = line
        any = true
      end
    end
  end
  return table.concat(lines, '\\n'), any, left
end
"""

READ: Final = (
    _COMMON
    + """
-- KEYS: the record. ARGV: prefix, trusting (0 or 1), milliseconds that a record is kept.
local record = load(KEYS[1])
if record == '' then return '' end
local found, any, left = living(record, ARGV[1], ARGV[2])
if left and not any then return 'leaving' end
if any then
  local expires = redis.call('PTTL', KEYS[1])
  if expires >= 0 and expires < ARGV[3] / 2 then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
end
return found
"""
)

WRITE: Final = (
    _COMMON
    + """
-- KEYS: the record, the counter, the writer's lease.
-- ARGV: prefix, trusting, milliseconds that a record is kept, the writer, the tunnel, the version that it expects, the
-- highest number that the writer has seen, its node, milliseconds that a lease lives, milliseconds for which a record
-- without holdings says that the writer leaves (0: not at all); then a line for each holding.
-- A writer whose lease has expired lives: else two such writers would not see each other, and write in turn for ever.
local lived = redis.call('EXISTS', KEYS[3])
if lived == 0 then redis.call('SET', KEYS[3], ARGV[8], 'PX', ARGV[9]) end
local record = load(KEYS[1])
if version(record) ~= ARGV[6] then return {0, (living(record, ARGV[1], ARGV[2])), lived} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local counter = string.format('%.0f', math.max(number(load(KEYS[2])), number(ARGV[7]), now) + 1)
redis.call('SET', KEYS[2], counter)
local told = {}
for process in string.gmatch(record, '\\n%d+ (%x+) ') do told[process] = true end
local lines = {counter}
for index = 11, #ARGV do
  local fence, rest = string.match(ARGV[index], '^(%d+)( .*)$')
  if fence == '0' then fence = counter end
  lines[#lines + 1] = fence .. rest
  told[string.match(rest, '^ (%x+) ')] = true
end
local new = ''
if #lines == 1 and ARGV[10] ~= '0' then
  new = 'leaving'
  redis.call('SET', KEYS[1], new, 'PX', ARGV[10])
elseif #lines == 1 then
  redis.call('DEL', KEYS[1])
else
  new = table.concat(lines, '\\n')
  redis.call('SET', KEYS[1], new, 'PX', ARGV[3])
end
told[ARGV[4]] = nil
for process in pairs(told) do redis.call('PUBLISH', ARGV[1] .. 'to:' .. process, ARGV[5] .. '\\n' .. new) end
return {1, new, lived}
"""
)

RENEW: Final = (
    _COMMON
    + """
-- KEYS: the lease, the counter. ARGV: the node, milliseconds that the lease lives, the highest number that it has seen.
local lived = redis.call('EXISTS', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if number(load(KEYS[2])) < number(ARGV[3]) then redis.call('SET', KEYS[2], ARGV[3]) end
return lived
"""
)

BREAK: Final = f"""
-- KEYS: the lease. ARGV: milliseconds for which a record says that its session has left.
redis.call('SET', KEYS[1], '{_BROKEN}', 'PX', ARGV[1])
return 1
"""
