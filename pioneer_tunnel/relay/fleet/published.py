"""What Redis keeps for the registry: texts that the operator has signed, and claims of names that nodes have signed.

    pioneer:entry:ID                what the operator has said about the tunnel ID
    pioneer:key:KEY-ID              the id of the tunnel that a key opens
    pioneer:host:HOST               the id of the tunnel that a host leads to
    pioneer:name:HOST               the claim of a name below a wildcard
    pioneer:names:KEY-ID            the names that a key has claimed, to count them
    pioneer:registry                a channel: each entry that is written

Only texts count, and the caller checks their signatures. The rest says where to look. Entries expire when they are not
valid any more, and tombstones when all that they revoke has expired.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, final

import trio

from ..._model.exception_groups import leaves
from ..._model.text import clean_message
from .redis_address import RedisAccess
from .signed import MOST_BYTES, SignedEntry

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from coredis import Redis

__all__ = ["Published", "RedisUnreachable", "connected"]

TIMEOUT: Final = 3.0
"""Seconds that Redis has for an answer."""

IDLE: Final = 5.0
"""Seconds of silence after which Redis is asked whether it is there."""

_PREFIX: Final = "pioneer"
_CHANNEL: Final = f"{_PREFIX}:registry"
_MOST_ID: Final = 512
"""Bytes of an id."""

_PAGE: Final = 500

# Any client of Redis may have written a key. One of another type, or with a longer value than any text, counts as
# absent: an error would look like an outage, and long values would fill the memory of each node that reads them.
_TEXT: Final = f"""
local function text(key)
    local size = redis.pcall('STRLEN', key)
    if type(size) ~= 'number' or size > {MOST_BYTES} then return '' end
    return redis.call('GET', key) or ''
end
"""

_READ: Final = (
    _TEXT
    + """
local found = {}
for i, key in ipairs(KEYS) do found[i] = text(key) end
return found
"""
)

# The texts of some keys, and where to go on. ARGV: where to begin, what the keys are like, how many to look at.
_PAGE_OF: Final = (
    _TEXT
    + """
local page = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])
local found = {page[1]}
for _, key in ipairs(page[2]) do found[#found + 1] = text(key) end
return found
"""
)

# Writes an entry and where to look for it, if it was not written in between. ARGV: the text that was there, the new
# one, when it expires, the id, whether other tunnels lose their hosts to it, the channel.
_PUT: Final = (
    _TEXT
    + """
if text(KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'EXAT', ARGV[3])
for i = 2, #KEYS do
    if ARGV[5] == '1' or text(KEYS[i]) == '' then
        redis.call('SET', KEYS[i], ARGV[4], 'EXAT', ARGV[3])
    end
end
redis.call('PUBLISH', ARGV[6], ARGV[2])
return 1
"""
)

# Writes a claim, if it was not written in between, and no key has too many names. ARGV: the text that was there, the
# new one, the host, how many names a key may have.
_CLAIM: Final = (
    _TEXT
    + """
if text(KEYS[1]) ~= ARGV[1] then return 0 end
for i = 2, #KEYS do
    if redis.call('TYPE', KEYS[i]).ok ~= 'set' then redis.call('DEL', KEYS[i]) end
    if redis.call('SISMEMBER', KEYS[i], ARGV[3]) == 0 and redis.call('SCARD', KEYS[i]) >= tonumber(ARGV[4]) then
        return -1
    end
end
redis.call('SET', KEYS[1], ARGV[2])
for i = 2, #KEYS do redis.call('SADD', KEYS[i], ARGV[3]) end
return 1
"""
)


class RedisUnreachable(Exception):
    """Redis does not answer, or refuses to. The message says why, for a log."""


@contextlib.asynccontextmanager
async def connected(access: RedisAccess) -> AsyncIterator[Published]:
    """A connection to Redis, while the block runs. The files of `access` are read each time.

    The block is cancelled when Redis is lost, if it reads `Published.messages`.

    Args:
        access: where Redis is, with complete paths.

    Raises:
        RedisUnreachable: it does not answer now, refuses the password, or was lost.
        InvalidSettingsError: a file holds something else than it should, or the extra `fleet` is missing.
        StorageError: a file cannot be read, or others may access it.
    """
    server = await trio.to_thread.run_sync(access.server)
    with _failures_told():
        async with server.connect() as client:
            for script in (_READ, _PAGE_OF, _PUT, _CLAIM):  # so that none is missing when it is run
                await _within(client.script_load(script))
            yield Published(client)


@final
class Published:
    """The keys of the registry.

    Args:
        client: the client, entered.

    Each method raises `RedisUnreachable`: Redis does not answer in time, or refuses.
    """

    def __init__(self, client: Redis[bytes]) -> None:
        self._client: Final = client
        self._read: Final = client.register_script(_READ)
        self._page_of: Final = client.register_script(_PAGE_OF)
        self._put: Final = client.register_script(_PUT)
        self._claim: Final = client.register_script(_CLAIM)

    async def entries(self, ids: Sequence[str]) -> list[bytes | None]:
        """What is said about these tunnels."""
        return await self._texts([f"{_PREFIX}:entry:{name}" for name in ids])

    async def entry_of(self, way: str) -> bytes | None:
        """What is said about the tunnel that has a key, `key:ID`, or a host, `host:HOST`."""
        (found,) = await self._texts([f"{_PREFIX}:{way}"])
        if found is None or len(found) > _MOST_ID:
            return None
        return (await self._texts([f"{_PREFIX}:entry:".encode() + found]))[0]

    async def claims(self, hosts: Sequence[str]) -> list[bytes | None]:
        """The claims of these names."""
        return await self._texts([f"{_PREFIX}:name:{host}" for host in hosts])

    async def put(self, entry: SignedEntry, ways: Collection[str], *, expected: bytes | None, overrule: bool) -> bool:
        """Write an entry, and tell all nodes. False if another one was written in between.

        Args:
            entry: the entry.
            ways: how it is found: `key:` and the id of a key, `host:` and a host.
            expected: what was there.
            overrule: whether it is found by these ways also if another one was.
        """
        keys = [f"entry:{entry.id}", *ways]
        values: list[str | bytes] = [
            expected or b"",
            entry.text,
            str(entry.not_after),
            entry.id,
            str(int(overrule)),
            _CHANNEL,
        ]
        return await self._run(self._put, keys, values) == 1

    async def claim(self, host: str, text: bytes, keys: Collection[str], *, expected: bytes | None, most: int) -> int:
        """Write the claim of a name. 1: it is written; 0: another one was, in between; -1: a key has `most` already."""
        names = [f"name:{host}", *(f"names:{key}" for key in sorted(keys))]
        return await self._run(self._claim, names, [expected or b"", text, host, str(most)])

    @contextlib.asynccontextmanager
    async def messages(self) -> AsyncIterator[AsyncIterator[bytes]]:
        """Entries as they are written, while the block runs."""
        from coredis.retry import NoRetryPolicy  # noqa: PLC0415  # an extra

        subscription = self._client.pubsub(
            channels=[_CHANNEL],
            ignore_subscribe_messages=True,
            retry_policy=NoRetryPolicy(),
            subscription_timeout=TIMEOUT,
            max_idle_seconds=IDLE,
        )
        with _failures_told():
            async with subscription as messages:
                yield (message["data"] async for message in messages if isinstance(message["data"], bytes))

    async def all_entries(self) -> AsyncIterator[bytes]:
        """What is said about every tunnel, in any order."""
        cursor = b"0"
        while True:
            cursor, *texts = await _within(self._page_of([], [cursor, f"{_PREFIX}:entry:*", _PAGE]))
            for text in filter(None, texts):
                yield text
            if cursor == b"0":
                return

    async def _texts(self, keys: Sequence[str | bytes]) -> list[bytes | None]:
        if not keys:
            return []
        return [text or None for text in await _within(self._read(keys, []))]

    @staticmethod
    async def _run(script: Any, keys: Sequence[str], values: Sequence[str | bytes]) -> int:
        answer = await _within(script([f"{_PREFIX}:{key}" for key in keys], values))
        return answer if isinstance(answer, int) else 0


async def _within(asked: Awaitable[Any]) -> Any:
    with _failures_told(), trio.fail_after(TIMEOUT):
        return await asked


@contextlib.contextmanager
def _failures_told() -> Iterator[None]:
    """Turn the failures of the client, also in groups, into `RedisUnreachable`."""
    from anyio import BrokenResourceError, ClosedResourceError, EndOfStream  # noqa: PLC0415  # comes with the extra
    from coredis.exceptions import RedisError  # noqa: PLC0415

    failures = (
        RedisError, OSError, TimeoutError, trio.TooSlowError, BrokenResourceError, ClosedResourceError, EndOfStream
    )  # fmt: skip
    try:
        yield
    except failures as error:
        raise _told(error) from error
    except BaseExceptionGroup as group:
        ours, others = group.split((*failures, RedisUnreachable))
        if ours is None:
            raise
        if others is not None:  # a cancellation, which counts more
            raise others from None
        raise _told(leaves(ours)[0]) from group


def _told(error: BaseException) -> RedisUnreachable:
    if isinstance(error, RedisUnreachable):
        return error
    if isinstance(error, TimeoutError | trio.TooSlowError):
        return RedisUnreachable(f"it has not answered within {TIMEOUT:g} seconds")
    return RedisUnreachable(clean_message(str(error)) or type(error).__name__)
