"""Shares the event loop among visitors, so that no tenant and no address holds up the others.

Following what a visitor sends costs CPU time, and one address may have hundreds of connections with work at once. Each
connection asks for a turn before it works, and tells afterwards what the turn cost. While little was spent lately,
every turn is granted at once. Otherwise connections queue, and in each pass of the event loop at most one connection of
a tenant, and one of an address, gets a turn.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final, TypeAlias, final

import attrs
import trio

__all__ = ["Turn", "Turns"]

WINDOW: Final = 0.01
"""Seconds in which `BUDGET` may be spent without a queue."""

BUDGET: Final = 4096
"""Units, of about 2 µs each on a machine of 2020."""

TURN_COST: Final = 64
"""Units that a turn costs beside the items it found: a read, and passing on what came."""

TURNS_PER_PASS: Final = 8
"""Turns that are granted from the queue in one pass of the event loop."""

_Lots: TypeAlias = OrderedDict[str | None, trio.lowlevel.ParkingLot]


@final
class Turns:
    """Grants turns to all connections of one relay."""

    def __init__(self) -> None:
        self._window_ends = -math.inf
        self._left = 0
        self._queue: Final[OrderedDict[str, _Lots]] = OrderedDict()
        self._granting = False

    @property
    def waiting(self) -> bool:
        """True while connections queue."""
        return bool(self._queue)

    async def wait(self, tenant: str, address: str | None) -> None:
        """See `Turn.wait`."""
        now = trio.current_time()
        if now >= self._window_ends:
            self._window_ends, self._left = now + WINDOW, BUDGET
        if self._left > 0 and not self._queue:
            return
        lot = self._queue.setdefault(tenant, OrderedDict()).setdefault(address, trio.lowlevel.ParkingLot())
        self._grant_soon()
        # No deadline: the queue moves in every pass of the event loop.
        await lot.park()

    def spend(self, items: int) -> None:
        """See `Turn.spend`."""
        self._left -= TURN_COST + items

    def _grant_soon(self) -> None:
        if not self._granting:
            self._granting = True
            trio.lowlevel.current_trio_token().run_sync_soon(self._grant)

    def _grant(self) -> None:
        """Wake those whose turn it is in this pass of the event loop."""
        self._granting = False
        granted = 0
        served: set[str] = set()
        for tenant, lots in [*self._queue.items()]:
            for address, lot in [*lots.items()]:
                if address in served:
                    continue
                woken = lot.unpark()
                if lot:
                    lots.move_to_end(address)
                else:
                    del lots[address]
                if woken:  # or all who waited here were cancelled
                    granted += 1
                    if address is not None:
                        served.add(address)
                    self._queue.move_to_end(tenant)
                    break
            if not lots:
                del self._queue[tenant]
            if granted == TURNS_PER_PASS:
                break
        if self._queue:
            self._grant_soon()


@final
@attrs.frozen
class Turn:
    """What one connection asks for its turns with.

    Attributes:
        tenant: the tunnel's id.
        address: the visitor's, as limits count it; None for one that no limit per address holds for.
    """

    turns: Turns
    tenant: str
    address: str | None

    async def wait(self) -> None:
        """Wait for a turn. This is a checkpoint only when others wait, or much was spent lately."""
        await self.turns.wait(self.tenant, self.address)

    def spend(self, items: int) -> None:
        """Tell what the turn cost beside its fixed cost, in units."""
        self.turns.spend(items)
