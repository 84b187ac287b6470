"""A relay as one of several processes that listen at the same addresses: what the others tell it, and leave to it."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from typing import Any, Final, final

import trio

from .addresses import Listening
from .gateways.expected import Expected
from .sharing import Sharing

__all__ = ["Beside"]


@final
class Beside:
    """What other processes of the same relay do with this one.

    Args:
        expected: visitors of these tunnels wait.
        listening: accepts connections.
        sharing: hears what others announce; None if they announce nothing.
        drain_asked: set when this process accepts no more connections.

    Attributes:
        has_successor: whether another process has the place of this one, which drains. The owner sets it.
    """

    def __init__(
        self, expected: Expected, listening: Listening, sharing: Sharing | None, drain_asked: trio.Event
    ) -> None:
        self._expected: Final = expected
        self._listening: Final = listening
        self._sharing: Final = sharing
        self._drain_asked: Final = drain_asked
        self.has_successor = False

    def expect(self, tunnels: Iterable[str]) -> None:
        """Let visitors of these tunnels wait for the gateway, as after a restart: for 5 seconds at most.

        A session of the tunnel ends the wait, and so does `gateway_has_come`.
        """
        self._expected.add(tunnels)

    def gateway_has_come(self, tunnel_id: str) -> None:
        """The gateway of this tunnel has a session at another process."""
        self._expected.has_come(tunnel_id)

    async def accept_at(self, name: str, sockets: Sequence[socket.socket]) -> None:
        """Accept at further sockets of one of the relay's addresses, until cancelled, or drained. Then close them.

        Args:
            name: of the address, as in `relay.inherited`.
            sockets: they listen there.
        """
        try:
            async with trio.open_nursery() as nursery:

                async def accept() -> None:
                    await self._listening.accept_at(name, sockets)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(accept)
                await self._drain_asked.wait()  # no deadline: it accepts until it shall not
                nursery.cancel_scope.cancel()
        finally:
            for one in sockets:
                one.close()

    async def hear(self, message: Any) -> None:
        """Another process has passed this to its `announce`."""
        if self._sharing is not None:
            await self._sharing.hear(message)
