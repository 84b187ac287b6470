"""Finds the session for a visitor: at this node, or the nearest one at another.

A route that is known is used without asking the store. It may be out of date: then the other node says that it does not
have the session, the record is read, and the visitor tries again. However many visitors wait for a tunnel, its record
is read once.

Visitors wait in two cases, and the record is read now and then. The tunnel's session has left with its process, which
drains or was killed: the gateway comes again, to the successor or to another node. Or the session is gone and still in
the record: it may have left just now. If its node is dead instead, the wait is short.

The sessions of the other workers of this machine are known without the store. They are as near as those of this node.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias, final

import attrs
import trio

from ..gateways.expected import HOLD, Expected
from ..gateways.registry import Holder, LiveSession, LocalDirectory
from .peers import Peers
from .records import NOTHING_KNOWN, Holding, Record
from .remote import RemoteSession
from .store import Store, StoreUnreachable

__all__ = ["Beside", "Finder"]

Beside: TypeAlias = Callable[[str], Sequence[Holding]]
"""Returns the sessions of the other workers of this machine that have a tunnel. Does not wait."""

LOOK_AGAIN: Final = 0.25
"""Seconds before the record of a tunnel is read again, if the last read did not help its visitors."""

MOST_LOOKS: Final = 4096
"""Reads, of as many tunnels, that are remembered for that."""

MOST_GONE: Final = 4096
"""Sessions that are remembered because a visitor could not reach them."""

GONE_FOR: Final = 2.0
"""Seconds for which such a session is the last choice."""

SETTLING: Final = 1.0
"""Seconds after which a session that has left is not in its record any more."""


@final
@attrs.define(eq=False)
class _Look:
    """A read for visitors.

    Attributes:
        done: set at its end.
        record: what was read; None if that failed.
        began, ended: when. `ended` is inf while it runs.
    """

    done: trio.Event = attrs.field(factory=trio.Event)
    record: Record | None = None
    began: float = attrs.field(factory=trio.current_time)
    ended: float = math.inf


@final
class Finder:
    """Finds sessions for visitors of one node.

    Args:
        store: has the records.
        peers: say how far other nodes are, and open streams at them.
        local: the sessions of this node.
        beside: the sessions of the other workers of this machine that have a tunnel.
        expected: visitors of these tunnels wait, too.
    """

    def __init__(self, store: Store, peers: Peers, local: LocalDirectory, beside: Beside, expected: Expected) -> None:
        self._store: Final = store
        self._peers: Final = peers
        self._local: Final = local
        self._beside: Final = beside
        self._expected: Final = expected
        self._looks: Final[OrderedDict[str, _Look]] = OrderedDict()
        self._gone: Final[OrderedDict[str, float]] = OrderedDict()
        self._turn = 0

    def find_nowait(self, tunnel_id: str) -> Holder | None:
        """See `Directory.find_nowait`."""
        local = self._local.find_nowait(tunnel_id)
        if local is not None and local.sound and not local.draining:
            return local
        record = self._store.known(tunnel_id)
        if record is None:
            if not self._beside(tunnel_id):
                raise trio.WouldBlock
            record = NOTHING_KNOWN
        found, is_gone = self._choose(tunnel_id, local, record)
        if is_gone or (found is None and record.holdings):  # it is out of date
            raise trio.WouldBlock
        return found

    async def find(self, tunnel_id: str) -> Holder | None:
        """See `Directory.find`."""
        try:
            return self.find_nowait(tunnel_id)
        except trio.WouldBlock:
            since = trio.current_time()
        while True:
            known = self._store.known(tunnel_id) or NOTHING_KNOWN
            record = await self.look(tunnel_id, after=self._failed_at(known)) or NOTHING_KNOWN
            found, is_gone = self._choose(tunnel_id, self._local.find_nowait(tunnel_id), record)
            is_expected = found is None and tunnel_id in self._expected.missing
            until = -math.inf
            if is_gone:
                until = self._failed_at(record) + SETTLING
            elif is_expected or (found is None and record.leaving):
                until = since + HOLD
            if trio.current_time() >= until or not (is_expected or self._store.reachable):
                return found
            await trio.sleep(LOOK_AGAIN)

    def _choose(self, tunnel_id: str, local: LiveSession | None, record: Record) -> tuple[Holder | None, bool]:
        """The best holder, and whether a visitor could not reach it a moment ago.

        First a session of this node that is sound; then the nearest node that is known to work, such as another worker
        of this machine; then a session here that drains; then a node that may work; then a session here whose
        connection is lost or in doubt.
        """
        chosen: Holder | None = local
        best = (4.0 if local is None or not local.sound else 2.0 if local.draining else 0.0, 0.0)
        is_gone = False
        found: Iterable[Holding] = record.holdings
        beside = self._beside(tunnel_id)
        if beside:
            found = {holding.session: holding for holding in (*found, *beside)}.values()
        elsewhere = [holding for holding in found if holding.process != self._store.process]
        if len(elsewhere) > 1:  # links of one gateway at the same distance take turns
            self._turn = (self._turn + 1) % len(elsewhere)
            elsewhere = elsewhere[self._turn :] + elsewhere[: self._turn]
        for holding in elsewhere:
            failed_at = self._gone.get(holding.session)
            gone = failed_at is not None and trio.current_time() - failed_at < GONE_FOR
            distance = self._peers.distance(holding.node)
            rank = (5.0 if gone else 1.0 if distance < math.inf else 3.0, distance)
            if chosen is None or rank < best:
                chosen = RemoteSession(tunnel_id, holding, self._peers, self._is_gone)
                best, is_gone = rank, gone
        return chosen, is_gone

    def _is_gone(self, holding: Holding) -> None:
        now = trio.current_time()
        if now - self._gone.get(holding.session, -math.inf) < GONE_FOR:
            return  # the first time counts: records that were read after it need not be read again
        self._gone.pop(holding.session, None)
        self._gone[holding.session] = now
        if len(self._gone) > MOST_GONE:
            self._gone.popitem(last=False)

    def _failed_at(self, record: Record) -> float:
        """When a session of a record could not be reached; -inf if that did not happen."""
        return max((self._gone.get(holding.session, -math.inf) for holding in record.holdings), default=-math.inf)

    async def look(self, tunnel_id: str, *, after: float = -math.inf) -> Record | None:
        """Read a record for a visitor: once for all that wait, and not again at once.

        Args:
            tunnel_id: the tunnel.
            after: what was read at this time or before is out of date.

        Returns:
            The record. If the store is unreachable, what was known; None if that is nothing.
        """
        while (
            (look := self._looks.get(tunnel_id)) is not None
            and look.began > after
            and trio.current_time() - look.ended < LOOK_AGAIN
        ):
            # The deadline is the visitor's. Who reads may be cancelled; then the next one reads.
            await look.done.wait()
            if look.record is not None or not self._store.reachable:
                return look.record or self._store.known(tunnel_id)
            if self._looks.get(tunnel_id) is look:
                del self._looks[tunnel_id]
        look = self._looks[tunnel_id] = _Look()
        self._looks.move_to_end(tunnel_id)
        if len(self._looks) > MOST_LOOKS:
            self._looks.popitem(last=False)
        try:
            look.record = await self._store.read(tunnel_id)
        except StoreUnreachable:
            return self._store.known(tunnel_id)
        finally:
            look.ended = trio.current_time()
            look.done.set()
        return look.record
