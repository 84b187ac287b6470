"""The names that gateways have created below wildcards, as one node of a fleet knows them. See `relay/names.py`.

The claims are in Redis, each signed by the node that took it, and in the state file of each node that has seen it. So a
name that was seen stays with its owner whatever Redis says, and nodes write back what Redis has lost.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Final, NoReturn, final

import trio

from ..._model.errors import StorageError
from ..._model.keys import PublicKey, SigningIdentity
from ..._model.log_fields import about
from ..._model.services import MOST_SERVICES
from ..._net.log_limiter import LogLimiter
from ..gateways.registry import RegistryAway
from ..names import why_unavailable
from ..tunnels import TunnelEntry
from .claims import Claim, UnknownNode, read_claim, sign_claim
from .published import Published, RedisUnreachable
from .seen import SeenFile, in_thread
from .signed import Forged

__all__ = ["FleetNames"]

MOST_KNOWN: Final = 65_536
"""Claims in memory, and as many hosts without a claim. The state file has more claims."""

UNCLAIMED_SECONDS: Final = 3.0
"""How long a host without a claim is not asked for again."""

_ATTEMPTS: Final = 5
_PAGE: Final = 500
_PAUSE: Final = 0.01
_ANY_NUMBER: Final = 1_000_000
_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.fleet"))


@final
class FleetNames:
    """The names below wildcards.

    Args:
        node, identity: this node.
        nodes: the keys of all nodes, this one among them.
        seen: the state file.
        reserved: labels that no gateway may have.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        node: str,
        identity: SigningIdentity,
        nodes: Mapping[str, PublicKey],
        seen: SeenFile,
        *,
        reserved: Collection[str],
        wall_clock: Callable[[], float],
    ) -> None:
        self._node: Final = node
        self._identity: Final = identity
        self._nodes: Final = nodes
        self._seen: Final = seen
        self._reserved: Final = frozenset(reserved)
        self._wall_clock: Final = wall_clock
        self._known: Final[OrderedDict[str, Claim]] = OrderedDict()
        self._unclaimed: Final[OrderedDict[str, float]] = OrderedDict()
        self._published: Published | None = None

    def keys_of_nowait(self, host: str) -> frozenset[str]:
        """The ids of the keys that `host` belongs to; empty if no key has claimed it.

        Raises:
            trio.WouldBlock: to find that out takes time.
        """
        claim = self._known.get(host)
        if claim is not None:
            self._known.move_to_end(host)
            return claim.keys
        if self._unclaimed.get(host, 0.0) > trio.current_time():
            return frozenset()
        raise trio.WouldBlock

    async def keys_of(self, host: str) -> frozenset[str]:
        """The same.

        Raises:
            RegistryAway: Redis cannot be asked, and this node does not know it.
        """
        with suppress(trio.WouldBlock):
            return self.keys_of_nowait(host)
        claim = await self._seen_claim(host)
        if claim is None:
            try:
                _, claim = await self._ask(host)
            except RedisUnreachable:
                raise RegistryAway from None
            except UnknownNode as error:
                _log_limiter.log("node", f"the name {host} is not served: {error}", about=about("entry_refused"))
        if claim is None:
            self._unclaimed[host] = trio.current_time() + UNCLAIMED_SECONDS
            if len(self._unclaimed) > MOST_KNOWN:
                self._unclaimed.popitem(last=False)
            return frozenset()
        return claim.keys

    async def claim(self, entry: TunnelEntry, label: str, domain: str) -> str | None:
        """Let the name `label` below `domain` belong to the keys of `entry`. It is durable when this returns.

        Returns:
            None; or why it is refused, for a person.
        """
        why_not = why_unavailable(label, self._reserved)
        if why_not is not None:
            return why_not
        host, keys = f"{label}.{domain}", frozenset(entry.keys_by_id)
        try:
            return await self._claim(host, keys)
        except UnknownNode as error:
            _log_limiter.log("node", f"the name {host} cannot be claimed: {error}", about=about("name_not_stored"))
            return "a node has it that this one does not know"
        except (RedisUnreachable, StorageError) as error:
            fields = about("name_not_stored", reason=error)
            _log_limiter.log("not stored", f"the name {host} cannot be stored: {error}", about=fields)
            return "the relay cannot store it at the moment"

    async def _claim(self, host: str, keys: frozenset[str]) -> str | None:
        for _ in range(_ATTEMPTS):
            claim = await self._seen_claim(host)
            if claim is not None and claim.keys >= keys:
                return None
            text, theirs = await self._ask(host)
            if theirs is not None:
                claim = theirs
            if claim is None:
                since = int(self._wall_clock() * 1000)
                wanted = sign_claim(self._node, self._identity, host=host, keys=keys, since=since)
            elif claim.keys >= keys:
                return None
            elif claim.keys.isdisjoint(keys):
                return "another key has it"
            else:
                both = claim.keys | keys
                wanted = sign_claim(self._node, self._identity, host=host, keys=both, since=claim.since)
            if self._published is None:  # it was lost since it was asked
                raise RedisUnreachable("it cannot be reached")
            written = await self._published.claim(host, wanted.text, keys, expected=text, most=MOST_SERVICES)
            if written < 0:
                return f"this tunnel has claimed {MOST_SERVICES} names already"
            if written:
                await self._take(wanted)
                return None
        raise RedisUnreachable("other nodes write it all the time")

    async def follow(self, published: Published) -> NoReturn:
        """Use this connection to Redis, and write back what it has lost."""
        self._published = published
        try:
            page: Sequence[tuple[str, bytes]] = [("", b"")]
            while page:
                page = await in_thread(self._seen.names, page[-1][0], _PAGE) or []
                texts = await published.claims([host for host, _ in page])
                for (host, _), theirs in zip(page, texts, strict=True):
                    await self._settle(published, host, theirs)
                await trio.sleep(_PAUSE)
            # No deadline: the connection ends it.
            await trio.sleep_forever()
        finally:
            self._published = None

    async def _settle(self, published: Published, host: str, text: bytes | None) -> None:
        """Of two claims of a name, take the one that counts; write ours to Redis if that is it."""
        ours = await self._seen_claim(host)
        if ours is None or ours.text == text:
            return
        try:
            theirs = None if text is None else self._read(text, host)
        except UnknownNode:
            return
        if theirs is not None and ours.yields_to(theirs):
            await self._take(theirs)
        else:
            # Another node may be faster, with the same text.
            await published.claim(host, ours.text, ours.keys, expected=text, most=_ANY_NUMBER)

    async def _ask(self, host: str) -> tuple[bytes | None, Claim | None]:
        """The text about a name in Redis; and the claim that counts, which this node remembers.

        Raises:
            RedisUnreachable: it cannot be asked.
            UnknownNode: a node has claimed it that the configuration does not name.
        """
        if self._published is None:
            raise RedisUnreachable("it cannot be reached")
        (text,) = await self._published.claims([host])
        claim = None if text is None else self._read(text, host)
        return text, None if claim is None else await self._take(claim)

    async def _seen_claim(self, host: str) -> Claim | None:
        if host not in self._known:
            text = await in_thread(self._seen.name, host)
            if text is not None:
                with suppress(Forged):  # the file is damaged there
                    self._remember(read_claim(text, None))
        return self._known.get(host)

    async def _take(self, claim: Claim) -> Claim:
        """Remember a claim, unless this node knows one that counts more. Returns the one that counts."""
        seen = await self._seen_claim(claim.host)
        if seen is not None and not seen.yields_to(claim):
            return seen
        text = await in_thread(
            self._seen.note_name, claim.host, claim.text, replaces=lambda seen: _counts_more(claim, seen)
        )
        if text is not None and text != claim.text:
            claim = read_claim(text, None)  # another worker has just seen it
        self._remember(claim)
        return claim

    def _remember(self, claim: Claim) -> None:
        self._known[claim.host] = claim
        self._unclaimed.pop(claim.host, None)
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)

    def _read(self, text: bytes, host: str) -> Claim | None:
        """A claim of this name from Redis; None if it is forged.

        Raises:
            UnknownNode: it is of a node that the configuration does not name.
        """
        try:
            claim = read_claim(text, self._nodes)
        except UnknownNode:
            raise
        except Forged as error:
            line = f"the claim of a name in Redis is not used: {error}"
            _log_limiter.log("forged", line, about=about("entry_refused", reason=error))
            return None
        return claim if claim.host == host else None


def _counts_more(claim: Claim, text: bytes) -> bool:
    """Whether a claim counts in place of a text in the state file."""
    try:
        return read_claim(text, None).yields_to(claim)
    except Forged:  # the file is damaged there
        return True
