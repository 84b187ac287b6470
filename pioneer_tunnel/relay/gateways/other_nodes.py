"""The other nodes of a fleet, as far as gateways need them: a session is resumed at the node that has it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias, final

import attrs

from ..._http.head import RequestHead
from ..._model.addresses import Address
from ..._net.streams import ByteStream
from ..._wire.node import NODE_HEADER, is_node_name

__all__ = ["OtherNodes", "PassedGateway", "ServeGateway", "named_node"]

_HEADER: Final = NODE_HEADER.lower().encode()


@final
@attrs.frozen(kw_only=True)
class PassedGateway:
    """What a node says of a gateway's connection that it passes on.

    Attributes:
        peer: the gateway's address; None if it is unknown.
        certificate: the SHA-256 of the certificate that the gateway has to see; None if it cannot be compared.
    """

    peer: Address | None = None
    certificate: bytes | None = None


ServeGateway: TypeAlias = Callable[[ByteStream, PassedGateway], Awaitable[object]]
"""Serves a connection from its WebSocket request until it ends."""


class OtherNodes(Protocol):
    """The other nodes.

    Attributes:
        name: of this node.
        serve_gateway: serves what others pass on to this node. The relay sets it.
    """

    name: str
    serve_gateway: ServeGateway | None

    def reaches(self, node: str) -> bool:
        """Whether there is a way to a node."""

    async def pass_gateway(self, node: str, passed: PassedGateway) -> ByteStream:
        """Open a stream for a gateway's connection to another node. The caller sets the deadline.

        Raises:
            trio.BrokenResourceError: the node is not reached, or takes no gateways of others.
        """


def named_node(head: RequestHead) -> str | None:
    """The node that a gateway's request names; None if it names none."""
    values = head.values(_HEADER)
    if len(values) != 1:
        return None
    name = values[0].decode("latin-1")
    return name if is_node_name(name) else None
