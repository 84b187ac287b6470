"""The tunnels that the operator has signed, as one node knows them.

A text counts if the operator has signed it, if its serial is the highest that this node has seen, and until its end.
What is absent from Redis says nothing: only a tombstone revokes. So a Redis that has lost everything ends no session,
and the nodes write back what they know.

How long a revoked key lives at a node:

    Redis tells the nodes at once           less than a second
    the message was lost                    until the node compares all it knows with Redis: after each new connection
                                            to Redis, and every `COMPARE_INTERVAL`
    Redis cannot be reached                 until it can be, but for `unconfirmed_ms` at most
    Redis is hostile, and hides the tombstone    until the end of the entry
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, NoReturn, final

import trio

from ..._model.keys import PublicKey
from ..._model.log_fields import about
from ..._net.log_limiter import LogLimiter
from ..gateways.registry import RegistryAway
from ..tunnels import TunnelEntry
from .published import Published, RedisUnreachable
from .seen import SeenFile, in_thread
from .signed import Forged, SignedEntry, read_entry

__all__ = ["SignedEntries"]

COMPARE_INTERVAL: Final = 600.0
"""Seconds between two times at which a node compares all that it knows with Redis."""

LOOK_INTERVAL: Final = 10.0
"""Seconds between two looks for entries that have ended."""

MOST_KNOWN: Final = 65_536
"""Entries in memory. The state file has more."""

MOST_ABSENT: Final = 16_384
CONFIRM_INTERVAL: Final = 5.0
"""Seconds between two times at which a node takes note that Redis is there."""

ABSENT_SECONDS: Final = 3.0
"""How long a key or host that Redis does not know is not asked for again. An entry that is published ends it."""

MOST_ASKING: Final = 64
"""Lookups at a time."""

_PAGE: Final = 500
_PAUSE: Final = 0.01

_log: Final = logging.getLogger("pioneer_tunnel.relay.fleet")
_log_limiter: Final = LogLimiter(_log)


@final
class SignedEntries:
    """The operator's entries.

    Args:
        operator: the operator's key.
        seen: the state file.
        unconfirmed: seconds that an entry counts while Redis cannot be asked.
        ours: the ids of the tunnels in the node's own file, which no entry replaces.
        on_change: called with the ids of tunnels that may have changed or ended.
        wall_clock: seconds since 1970.

    Attributes:
        ever_confirmed: set when all entries that were seen were compared with Redis, for the first time.
    """

    def __init__(
        self,
        operator: PublicKey,
        seen: SeenFile,
        *,
        unconfirmed: float,
        ours: Callable[[], Collection[str]],
        on_change: Callable[[Collection[str]], object],
        wall_clock: Callable[[], float],
    ) -> None:
        self._operator: Final = operator
        self._seen: Final = seen
        self._unconfirmed: Final = unconfirmed
        self._ours: Final = ours
        self._on_change: Final = on_change
        self._wall_clock: Final = wall_clock
        self._confirmed = 0.0
        self._up_to_date = False
        self.ever_confirmed: Final = trio.Event()
        self._known: Final[OrderedDict[str, SignedEntry]] = OrderedDict()
        self._by_way: Final[dict[str, str]] = {}
        self._absent: Final[OrderedDict[str, float]] = OrderedDict()
        self._asking: Final[dict[str, trio.Event]] = {}
        self._slots: Final = trio.CapacityLimiter(MOST_ASKING)
        self._published: Published | None = None

    @property
    def known(self) -> int:
        """How many entries are in memory."""
        return len(self._known)

    def tunnels(self, ids: Iterable[str]) -> list[TunnelEntry]:
        """Those of these tunnels that are in memory and not revoked."""
        found = (self._known.get(tunnel_id) for tunnel_id in ids)
        return [entry.tunnel for entry in found if entry is not None and entry.tunnel is not None]

    @property
    def unconfirmed_for(self) -> float:
        """Seconds since all entries were known to be Redis's last; 0 while they are."""
        return 0.0 if self._up_to_date else max(0.0, self._wall_clock() - self._confirmed)

    def find_nowait(self, way: str) -> SignedEntry | None:
        """The entry that a key, `key:ID`, or a host, `host:HOST`, leads to, if it counts now. None if there is none.

        Raises:
            trio.WouldBlock: to find that out takes time.
        """
        entry = self._known.get(self._by_way.get(way, ""))
        if entry is not None:
            self._known.move_to_end(entry.id)
            if self._too_long_unconfirmed:
                raise trio.WouldBlock
            return entry if self._counts(entry) else None
        if self._absent.get(way, 0.0) > trio.current_time():
            return None
        raise trio.WouldBlock

    async def find(self, way: str) -> SignedEntry | None:
        """The same.

        Raises:
            RegistryAway: Redis cannot be asked, and this node does not know it, or has not asked for too long.
        """
        while True:
            try:
                return self.find_nowait(way)
            except trio.WouldBlock:
                pass
            if self._too_long_unconfirmed:
                raise RegistryAway(for_long=True)
            if way not in self._asking:
                break
            # No deadline: the caller has one.
            await self._asking[way].wait()
        self._asking[way] = trio.Event()
        try:
            async with self._slots:
                return await self._ask(way)
        finally:
            self._asking.pop(way).set()

    async def _ask(self, way: str) -> SignedEntry | None:
        text, away = None, self._published is None
        if self._published is not None:
            try:
                text = await self._published.entry_of(way)
            except RedisUnreachable:
                away = True
        entry = None if text is None else await self.take(text)
        if entry is None or way not in entry.ways:
            # Redis has lost it, or hides it. What this node has seen counts as long as nothing newer is there.
            text = await in_thread(self._seen.entry_by, way)
            entry = None if text is None else await self.take(text)
        if entry is None or way not in entry.ways:
            if away:
                raise RegistryAway
            self._note_absent(way)
            return None
        return entry if self._counts(entry) else None

    async def take(self, text: bytes) -> SignedEntry | None:
        """Take note of a text, which may be anybody's. Returns what counts about its tunnel; None if it is forged."""
        entry = self._read(text)
        return None if entry is None else await self._note(entry)

    async def _note(self, entry: SignedEntry) -> SignedEntry:
        known = self._known.get(entry.id)
        if known is not None and known.serial >= entry.serial:
            return known
        counting = await in_thread(self._seen.note, entry)
        if counting is not None and counting != entry.text:
            entry = self._read(counting) or entry
        return self._install(entry)

    async def follow(self, published: Published) -> NoReturn:
        """Use this connection to Redis, and compare all that is known with it, at once and regularly.

        Raises:
            RedisUnreachable: it is lost.
        """
        self._published = published
        try:
            await self._compare_regularly(published)
        finally:
            self._published = None

    async def look_for_ends(self) -> NoReturn:
        """Tell of entries that end, or that have not been confirmed for too long."""
        self._confirmed = max(self._confirmed, await in_thread(self._seen.confirmed) or 0.0)
        told = False
        while True:
            too_long = self._too_long_unconfirmed and self.ever_confirmed.is_set()
            now = self._wall_clock()
            ended = [name for name, entry in self._known.items() if entry.tunnel is not None and entry.not_after < now]
            for name in ended:
                self._drop(name)
            if too_long and not told:
                line = f"Redis could not be asked for {self._unconfirmed:g} seconds: its tunnels are served no more"
                _log.error(line, extra=about("registry_unconfirmed"))
                ended += self._known
            told = too_long
            if ended:
                self._on_change(ended)
            await trio.sleep(LOOK_INTERVAL)

    async def hear(self, text: bytes) -> None:
        """Take note of a text that was written to Redis now, if this node has to know it."""
        entry = self._read(text)
        if entry is None:
            return
        for way in entry.ways:
            self._absent.pop(way, None)
        if entry.tunnel is not None and entry.id not in self._known:
            seen = await in_thread(self._seen.entry, entry.id)
            if seen is None:
                return  # of the tunnels of a fleet, each node knows those that it serves; and all tombstones
        await self._note(entry)

    async def _compare_regularly(self, published: Published) -> NoReturn:
        while True:
            await self._compare(published)
            await in_thread(self._seen.forget_old, self._wall_clock())
            self._up_to_date = True
            try:
                with trio.move_on_after(COMPARE_INTERVAL):
                    while True:  # the connection is alive: it is pinged, and everything that is written arrives
                        self._confirmed = self._wall_clock()
                        self.ever_confirmed.set()
                        await in_thread(self._seen.note_confirmed, self._confirmed)
                        await trio.sleep(CONFIRM_INTERVAL)
            finally:
                self._up_to_date = False

    async def _compare(self, published: Published) -> None:
        """Compare all that this node has seen with Redis; write back what Redis has lost."""
        page: Sequence[tuple[str, bytes]] = [("", b"")]
        while page:
            page = await in_thread(self._seen.entries, page[-1][0], _PAGE) or []
            found = await published.entries([name for name, _ in page])
            for (_, ours), theirs in zip(page, found, strict=True):
                if theirs != ours:
                    await self._settle(published, ours, theirs)
            await trio.sleep(_PAUSE)

    async def _settle(self, published: Published, ours: bytes, theirs: bytes | None) -> None:
        """Of two texts about a tunnel, take the one that counts; write ours to Redis if that is it."""
        if theirs is not None:
            await self.take(theirs)
        entry = self._read(ours)
        if entry is None:
            return
        counting = self._known.get(entry.id, entry)
        if counting.text == ours and entry.not_after > self._wall_clock():
            # Another node may be faster, with the same text.
            await published.put(entry, entry.ways, expected=theirs, overrule=False)

    def _read(self, text: bytes) -> SignedEntry | None:
        try:
            return read_entry(text, self._operator)
        except Forged as error:
            line = f"an entry in Redis is not used: {error}"
            _log_limiter.log("forged", line, about=about("entry_refused", reason=error))
            return None

    def _install(self, entry: SignedEntry) -> SignedEntry:
        before = self._drop(entry.id)
        if before is not None and before.serial >= entry.serial:  # another task was faster
            entry = before
        self._known[entry.id] = entry
        for way in entry.ways:
            self._absent.pop(way, None)
            rival = self._known.get(self._by_way.get(way, ""))
            if rival is None or rival.serial < entry.serial:
                self._by_way[way] = entry.id
        for way in () if before is None else before.ways:
            if way not in self._by_way:
                self._note_absent(way)
        if len(self._known) > MOST_KNOWN:
            self._drop(next(iter(self._known)))
        if entry is not before:
            self._on_change([entry.id])
        return entry

    def _note_absent(self, way: str) -> None:
        self._absent[way] = trio.current_time() + ABSENT_SECONDS
        self._absent.move_to_end(way)
        if len(self._absent) > MOST_ABSENT:
            self._absent.popitem(last=False)

    def _drop(self, tunnel_id: str) -> SignedEntry | None:
        entry = self._known.pop(tunnel_id, None)
        for way in () if entry is None else entry.ways:
            if self._by_way.get(way) == tunnel_id:
                del self._by_way[way]
        return entry

    def _counts(self, entry: SignedEntry) -> bool:
        if entry.id in self._ours():
            line = f"the signed tunnel {entry.id!r} is not used: the node's file has one of this id"
            _log_limiter.log("ours", line, about=about("entry_refused", tunnel=entry.id))
            return False
        return entry.tunnel is not None and entry.not_after > self._wall_clock()

    @property
    def _too_long_unconfirmed(self) -> bool:
        return self.unconfirmed_for > self._unconfirmed
