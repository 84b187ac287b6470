"""Tunnels whose gateway was connected to a relay process that drains or is gone, and redials now.

Their visitors wait for it. Visitors of other tunnels that are not connected get their answer at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Final, final

import trio

__all__ = ["Expected"]

HOLD: Final = 5.0
"""Seconds that a visitor waits."""

PATIENCE: Final = 10.0
"""Seconds that a gateway is expected: it redials within 3 seconds, or within 4 if it does not know how to drain."""


@final
class Expected:
    """The tunnels that are expected.

    Args:
        tunnels: their ids.
    """

    def __init__(self, tunnels: Collection[str] = ()) -> None:
        self._arrivals: Final = {tunnel_id: trio.Event() for tunnel_id in tunnels}
        self._until = -math.inf

    def begin(self) -> None:
        """Expect them from now on."""
        self._until = trio.current_time() + PATIENCE

    def add(self, tunnels: Iterable[str]) -> None:
        """Expect these, too, from now on."""
        now = trio.current_time()
        if -math.inf < self._until <= now:
            self._arrivals.clear()  # no visitor waits for these any more
        for tunnel_id in tunnels:
            self._arrivals.setdefault(tunnel_id, trio.Event())
        self._until = now + PATIENCE

    @property
    def missing(self) -> Collection[str]:
        """The ids of those that have not come yet."""
        return self._arrivals.keys() if trio.current_time() < self._until else ()

    def has_come(self, tunnel_id: str) -> None:
        """The gateway of this tunnel has a session."""
        arrival = self._arrivals.pop(tunnel_id, None)
        if arrival is not None:
            arrival.set()

    async def wait(self, tunnel_id: str) -> bool:
        """Wait until the gateway of this tunnel has come, for `HOLD` at most. False, at once, if it is not expected."""
        arrival = self._arrivals.get(tunnel_id)
        if arrival is None:
            return False
        with trio.move_on_at(min(self._until, trio.current_time() + HOLD)):
            await arrival.wait()
        return True
