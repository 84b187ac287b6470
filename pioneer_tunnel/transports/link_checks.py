"""Asks the running transport to check its link now.

The supervisor asks, and each transport that runs for its generation listens; there may be two. A check costs little
while the link lives. What it does depends on the transport:

    websocket    a ping. Without a sign of life within 2 seconds the link is restored, or ends
    tcp, tls     TCP's keepalive, since the protocol has nothing that a relay answers
    process      nothing
"""

from __future__ import annotations

import math
from typing import Final, final

import trio

__all__ = ["LinkChecks"]


@final
class LinkChecks:
    """The checks of one generation.

    Attributes:
        asked_at: `trio.current_time()` when the last one was asked for.
    """

    def __init__(self) -> None:
        self.asked_at: float = -math.inf
        self._listeners: Final = trio.lowlevel.ParkingLot()
        self._openers: Final = trio.lowlevel.ParkingLot()

    def ask(self, *, moved: bool = False) -> None:
        """Ask for a check. It changes nothing for a transport that is not up, or that checks its link already.

        Args:
            moved: the network has changed.
        """
        self.asked_at = trio.current_time()
        self._listeners.unpark_all()
        if moved:
            self._openers.unpark_all()

    async def asked(self) -> None:
        """Wait until a check is asked for. No deadline: most links are never checked."""
        await self._listeners.park()

    async def moved(self) -> None:
        """Wait until the network has changed. No deadline: a network may stay as it is for ever."""
        await self._openers.park()
