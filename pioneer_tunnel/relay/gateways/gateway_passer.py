"""Passes the connection of a gateway that wants to resume a session to the node that has it.

In clear, a worker of this machine gets the connection itself. Otherwise its bytes go over the link to the other node.
If that node cannot be reached, this one serves the gateway: it gets a new session.
"""

from __future__ import annotations

from typing import Final, final

import trio

from ..._http.head import RequestHead
from ..._net.prefixed_stream import PrefixedStream
from ...exchange.pump import pump
from ..connection import Connection
from ..visitors.passing import Passing
from ..visitors.visit import Visit
from .opening import OPENING_TIMEOUT
from .other_nodes import OtherNodes, PassedGateway, named_node

__all__ = ["GatewayPasser"]

PASS_TIMEOUT: Final = 3.0
"""Seconds for reaching the other node. Meanwhile the gateway waits."""

SETTLE_AFTER: Final = 2 * OPENING_TIMEOUT
"""Seconds after which the gateway has a session there, or is gone. Until then its connection can be evicted here."""


@final
class GatewayPasser:
    """Passes gateways to other nodes.

    Args:
        nodes: the other nodes.
        passing: passes connections to other workers of this machine; None if there are none.
    """

    def __init__(self, nodes: OtherNodes, passing: Passing | None) -> None:
        self._nodes: Final = nodes
        self._passing: Final = passing
        self._carried: Final[set[trio.CancelScope]] = set()
        self._drains = False

    def drain(self) -> None:
        """End the connections that are carried to other nodes, now and from now on."""
        self._drains = True
        for scope in self._carried:
            scope.cancel()

    async def passes(
        self,
        connection: Connection,
        visit: Visit,
        head: RequestHead,
        received: bytes,
        *,
        certificate: bytes | None,
    ) -> bool:
        """Pass a connection on if its request names another node, and carry it to its end.

        Args:
            connection: the connection.
            visit: the same, in clear, and whose it is: limits of the other node count it for that address.
            head: of its request.
            received: all that was read.
            certificate: as of `PassedGateway`.

        Returns:
            Whether it was passed on. If not, nothing has happened to it.
        """
        node = named_node(head)
        if node is None or node == self._nodes.name or self._drains:
            return False
        if not connection.may_pass or not self._nodes.reaches(node):
            return False
        stream = visit.stream
        if (
            self._passing is not None
            and stream is connection.stream
            and self._passing.pass_gateway(visit, node, received)
        ):
            return True
        with trio.CancelScope() as scope:
            self._carried.add(scope)
            try:
                try:
                    with trio.fail_after(PASS_TIMEOUT):
                        onward = await self._nodes.pass_gateway(
                            node, PassedGateway(peer=visit.visitor, certificate=certificate)
                        )
                except (trio.BrokenResourceError, trio.TooSlowError):
                    return False
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._settle, connection)
                    await pump(onward, PrefixedStream(stream, received))
                    nursery.cancel_scope.cancel()
            finally:
                self._carried.discard(scope)
        return True

    @staticmethod
    async def _settle(connection: Connection) -> None:
        await trio.sleep(SETTLE_AFTER)
        connection.arrival.settle()
