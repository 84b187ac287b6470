"""Fair sharing of the event loop among visitors, so that one tenant or address does not delay the others.

Following HTTP costs CPU time, and one address may have hundreds of connections with work. Each connection waits for a
turn before it works, and reports the cost afterwards. While little work was done recently, a turn is granted at once.
Otherwise connections queue. In each pass of the event loop at most one connection of a tenant, and one of an address,
gets a turn.
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
"""Units of work. One takes about 2 µs on a machine of 2020."""

TURN_COST: Final = 64
"""Units that each turn costs in addition to the items in it: for reading and forwarding."""

TURNS_PER_PASS: Final = 8
"""Turns that the queue grants in one pass of the event loop."""

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
        """Grant the turns of this pass of the event loop."""
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
                if woken:  # else all that waited here were cancelled
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
    """Requests turns for one connection.

    Attributes:
        tenant: the tunnel's id.
        address: the visitor's, as limits count it; None when it is exempt from limits per address.
    """

    turns: Turns
    tenant: str
    address: str | None

    async def wait(self) -> None:
        """Wait for a turn. A checkpoint only if others wait, or if the budget is spent."""
        await self.turns.wait(self.tenant, self.address)

    def spend(self, items: int) -> None:
        """Report the cost of the turn in units, without its fixed cost."""
        self.turns.spend(items)
