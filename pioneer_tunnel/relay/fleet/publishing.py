"""What an operator does with the tunnels in Redis: publish, revoke, look. The first two need the private key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import attrs

from ..._model.errors import Problem, StorageError
from ..._model.keys import PublicKey, SigningIdentity
from ..._storage.validation import refusal
from .published import Published
from .signed import MOST_VALID, Forged, SignedEntry, publishable, read_entry, sign

__all__ = ["PublishedTunnels", "publish", "published_tunnels", "revoke"]

_ATTEMPTS: Final = 10


@final
@attrs.frozen(kw_only=True)
class PublishedTunnels:
    """What is in Redis.

    Attributes:
        entries: what the operator has signed, tombstones among it, by id.
        forged: how many texts the operator has not signed.
    """

    entries: Mapping[str, SignedEntry]
    forged: int


async def publish(
    published: Published, operator: SigningIdentity, tunnel: Mapping[str, Any], *, now: float, valid: float
) -> SignedEntry:
    """Sign a tunnel, and write it to Redis. Nodes serve it at once.

    Args:
        published: the registry in Redis.
        operator: the private key.
        tunnel: the table of the tunnel, as in a relay's file.
        now: seconds since 1970.
        valid: seconds from now until it ends, `MOST_VALID` at most.

    Raises:
        InvalidSettingsError: it is not valid, names what belongs to one machine, or has a key or a host that another
            published tunnel has.
        StorageError: others write it all the time.
        RedisUnreachable: Redis does not answer.
    """
    entry = publishable(tunnel)
    for _ in range(_ATTEMPTS):
        text, serial = await _next_serial(published, operator.public_key, entry.id, now)
        signed = sign(operator, tunnel, serial=serial, not_after=int(now + valid))
        for way in signed.ways:
            await _refuse_taken(published, operator.public_key, signed, way, now)
        if await published.put(signed, signed.ways, expected=text, overrule=True):
            return signed
    raise StorageError("the tunnel is written by somebody else all the time")


async def revoke(published: Published, operator: SigningIdentity, tunnel_id: str, *, now: float) -> SignedEntry:
    """Sign that there is no such tunnel any more, and write it to Redis. Nodes end its sessions at once.

    Raises:
        StorageError, RedisUnreachable: as `publish`.
    """
    for _ in range(_ATTEMPTS):
        text, serial = await _next_serial(published, operator.public_key, tunnel_id, now)
        tombstone = sign(operator, tunnel_id, serial=serial, not_after=int(serial / 1000 + MOST_VALID))
        if await published.put(tombstone, (), expected=text, overrule=True):
            return tombstone
    raise StorageError("the tunnel is written by somebody else all the time")


async def published_tunnels(published: Published, operator: PublicKey) -> PublishedTunnels:
    """All that is in Redis.

    Raises:
        RedisUnreachable: Redis does not answer.
    """
    entries: dict[str, SignedEntry] = {}
    forged = 0
    async for text in published.all_entries():
        entry = _read(text, operator)
        if entry is None:
            forged += 1
        else:
            entries[entry.id] = entry
    return PublishedTunnels(entries=entries, forged=forged)


async def _next_serial(
    published: Published, operator: PublicKey, tunnel_id: str, now: float
) -> tuple[bytes | None, int]:
    """What is in Redis about a tunnel, and the serial of the next entry."""
    (text,) = await published.entries([tunnel_id])
    before = None if text is None else _read(text, operator)
    return text, max(int(now * 1000), -1 if before is None else before.serial + 1)


async def _refuse_taken(published: Published, operator: PublicKey, signed: SignedEntry, way: str, now: float) -> None:
    text = await published.entry_of(way)
    other = None if text is None else _read(text, operator)
    if other is None or other.id == signed.id or other.not_after <= now or way not in other.ways:
        return
    what, _, name = way.partition(":")
    key = "key" if what == "key" else "url"
    shown = "this key" if what == "key" else repr(name)
    raise refusal([Problem(key=key, message=f"the published tunnel {other.id!r} has {shown} already")])


def _read(text: bytes, operator: PublicKey) -> SignedEntry | None:
    try:
        return read_entry(text, operator)
    except Forged:
        return None
