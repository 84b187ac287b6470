"""Fair sharing of the event loop among visitors, so that one tenant or address does not delay the others.

Following HTTP costs CPU time, and one address may have hundreds of connections with work. Each connection asks for a
turn before it works, and reports the cost afterwards. While little work was done recently, a turn is granted at once.
Otherwise connections queue. In each pass of the event loop turns are granted in rounds, until as much work is done as a
long turn has. In a round at most one connection of a tenant, and one of an address, gets a turn.

Short turns share a pass, because a pass itself costs as much as several requests. With one turn in each, the queue of
100 visitors of one address would never be empty again.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, TypeAlias, final

import trio

from ..._net.turn import Turn as CallbackTurn

__all__ = ["Turn", "Turns"]

WINDOW: Final = 0.01
"""Seconds in which `BUDGET` may be spent without a queue."""

BUDGET: Final = 4096
"""Units of work. One takes about 2 µs on a machine of 2020."""

TURN_COST: Final = 16
"""Units that each turn costs in addition to the items in it: for reading and forwarding."""

TURNS_PER_ROUND: Final = 8
"""Turns that the queue grants before it looks how much work they were."""

WORK_PER_PASS: Final = 512
"""Units of work after which the queue grants no other round in this pass. One long turn has as much."""


@final
class _Waiting:
    """One connection in the queue."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], object]) -> None:
        self.call: Callable[[], object] | None = call  # None when it has had its turn, or has left


_Lots: TypeAlias = OrderedDict[str | None, deque[_Waiting]]


@final
class Turns:
    """Grants turns to all connections of one relay."""

    def __init__(self) -> None:
        self._window_ends = -math.inf
        self._left = 0
        self._spent = 0
        self._queue: Final[OrderedDict[str, _Lots]] = OrderedDict()
        self._granting = False

    @property
    def waiting(self) -> bool:
        """True while connections queue."""
        return bool(self._queue)

    def ask(self, tenant: str, address: str | None, call: Callable[[], object], now: float) -> _Waiting | None:
        """See `Turn.ask`. None if the turn is granted at once."""
        if now >= self._window_ends:
            self._window_ends, self._left = now + WINDOW, BUDGET
        if self._left > 0 and not self._queue:
            return None
        waiting = _Waiting(call)
        self._queue.setdefault(tenant, OrderedDict()).setdefault(address, deque()).append(waiting)
        self._grant_soon()
        return waiting

    def spend(self, items: int) -> None:
        """See `Turn.spend`."""
        cost = TURN_COST + items
        self._left -= cost
        self._spent += cost

    def _grant_soon(self) -> None:
        if not self._granting:
            self._granting = True
            trio.lowlevel.current_trio_token().run_sync_soon(self._grant)

    def _grant(self) -> None:
        """Grant the turns of this pass of the event loop."""
        self._granting = False
        CallbackTurn.current().run(self._grant_rounds)
        if self._queue:
            self._grant_soon()

    def _grant_rounds(self) -> None:
        until = self._spent + WORK_PER_PASS
        while self._queue and self._spent < until:
            for waiting in self._next_round():
                call, waiting.call = waiting.call, None
                if call is not None:  # else it has left meanwhile
                    call()

    def _next_round(self) -> list[_Waiting]:
        """Take those out of the queue who get a turn next."""
        granted: list[_Waiting] = []
        served: set[str] = set()
        for tenant, lots in [*self._queue.items()]:
            for address, lot in [*lots.items()]:
                if address in served:
                    continue
                first = lot.popleft()
                while lot and first.call is None:
                    first = lot.popleft()
                if lot:
                    lots.move_to_end(address)
                else:
                    del lots[address]
                if first.call is not None:  # else all that waited here have left
                    granted.append(first)
                    if address is not None:
                        served.add(address)
                    self._queue.move_to_end(tenant)
                    break
            if not lots:
                del self._queue[tenant]
            if len(granted) == TURNS_PER_ROUND:
                break
        return granted


@final
class Turn:
    """Asks for turns for one connection.

    Args:
        turns: grants them.
        tenant: the tunnel's id.
        address: the visitor's, as limits count it; None when it is exempt from limits per address.
    """

    __slots__ = ("_address", "_clock", "_tenant", "_turns", "_waiting")

    def __init__(self, turns: Turns, tenant: str, address: str | None) -> None:
        self._turns: Final = turns
        self._tenant: Final = tenant
        self._address: Final = address
        self._clock: Final = CallbackTurn.current()
        self._waiting: _Waiting | None = None

    def another(self) -> Turn:
        """The same for other work of the connection."""
        return Turn(self._turns, self._tenant, self._address)

    def ask(self, call: Callable[[], object]) -> bool:
        """Ask for a turn. True if it is granted at once; otherwise `call` is called when it is.

        While it waits, asking again changes nothing.
        """
        if self._waiting is None or self._waiting.call is None:
            now = self._clock.started
            self._waiting = self._turns.ask(
                self._tenant, self._address, call, self._clock.now() if now is None else now
            )
        return self._waiting is None

    def leave(self) -> None:
        """Leave the queue."""
        if self._waiting is not None:
            self._waiting.call = None

    def spend(self, items: int) -> None:
        """Report the cost of the turn in units, without its fixed cost."""
        self._turns.spend(items)
