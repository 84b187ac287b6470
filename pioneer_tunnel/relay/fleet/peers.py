"""What nodes want of each other: two interfaces.

`Peers` is what a node's directory uses. It reaches the other nodes. `Asked` is what the other nodes reach: the same
directory, at its node. A node answers for its own sessions only. It never asks a third one.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import NamedTuple, Protocol, final

import attrs

from ..._net.streams import ByteStream
from ..gateways.registry import LiveSession
from .records import Holding

__all__ = ["Asked", "AskedLater", "Hop", "Order", "OrderKind", "Peers"]


@final
class OrderKind(enum.StrEnum):
    """What a node may order of a session of another one. See `LiveSession`."""

    ANSWERS = "answers"
    REPLACE = "replace"
    RETIRE = "retire"
    ABANDON = "abandon"


@final
@attrs.frozen
class Order:
    """What a session of another node has to do.

    Attributes:
        kind: what.
        by: the instance that has the tunnel now (replace, retire). It may be empty.
        within: seconds that the gateway has to answer (answers).
    """

    kind: OrderKind
    by: str = ""
    within: float = 0.0


class Hop(NamedTuple):
    """A stream that another node carries to its session.

    Attributes:
        stream: leads to the gateway.
        services: `LiveSession.services` of the session, when the stream was opened.
    """

    stream: ByteStream
    services: Collection[str] | None


class Peers(Protocol):
    """The other nodes, as this one reaches them."""

    async def open_stream(self, tunnel_id: str, holding: Holding) -> Hop:
        """Open a stream to a session of another node. The caller sets the deadline.

        Raises:
            trio.BrokenResourceError: the node cannot be reached, or does not have the session any more.
            GatewayAway: the session's connection is lost, and was not restored in time.
        """

    async def order(self, tunnel_id: str, holding: Holding, order: Order) -> bool:
        """Have an order carried out. It has a deadline of its own, and raises nothing.

        Returns:
            Whether it was carried out; for `ANSWERS`, whether the gateway answers. False if the node cannot be reached
            or does not have the session.
        """

    def distance(self, node: str) -> float:
        """The round trip to another node in seconds: 0 for a worker of this machine, inf if it is not known to work."""


class Asked(Protocol):
    """This node, as the others reach it."""

    def local(self, tunnel_id: str, session_id: str) -> LiveSession | None:
        """The session of this node that has a tunnel, for visitors; None if it does not have the tunnel any more."""

    async def carry_out(self, tunnel_id: str, session_id: str, order: Order) -> bool:
        """Carry out the order of another node.

        Returns:
            As `Peers.order`.
        """


@final
class AskedLater(Asked):
    """Passes on what is asked to the directory, which is made after what needs it.

    Attributes:
        directory: set it before the first call.
    """

    directory: Asked

    def local(self, tunnel_id: str, session_id: str) -> LiveSession | None:
        return self.directory.local(tunnel_id, session_id)

    async def carry_out(self, tunnel_id: str, session_id: str, order: Order) -> bool:
        return await self.directory.carry_out(tunnel_id, session_id, order)
