"""How nodes reach each other: a network dials and accepts connections, and says who is at the other end.

MachineNetwork   between machines: TLS with the certificates of the configuration, over TCP
WorkerNetwork    between the workers of one machine: Unix sockets, see `unix_network`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, final

import attrs
import trio

from ..._model.addresses import Address
from ..._net.adopted import Watched, watch
from ..._net.socket_options import keep_alive
from ..._net.streams import ByteStream
from .node_names import machine_of
from .node_tls import NodeTls

__all__ = ["MachineNetwork", "Network", "Reached"]


class Reached(NamedTuple):
    """A connection to another node.

    Attributes:
        stream: in clear.
        watched: the same stream, or the one below its TLS.
        name: who is at the other end, as it has proved: a worker of this machine, or another machine. Which worker of
            the other machine it is, it only says.
    """

    stream: ByteStream
    watched: Watched
    name: str


class Network(Protocol):
    """A way to other nodes."""

    def reaches(self, node: str) -> bool:
        """Whether there is a node of this name, and a way to it. The name may come from anybody."""

    async def dial(self, node: str, process: str | None) -> Reached:
        """Connect to a node that it `reaches`. The caller sets the deadline.

        Args:
            node: its name.
            process: which process of the node, if the network can tell; None for the one that began last.

        Raises:
            trio.BrokenResourceError, OSError: it cannot be reached, or it is another one.
        """

    async def accept(self, stream: trio.SocketStream) -> Reached:
        """Find out who has connected. The caller sets the deadline, and closes the stream when this raises.

        Raises:
            trio.BrokenResourceError: a process that may not.
        """


@final
@attrs.frozen
class MachineNetwork(Network):
    """TLS between machines.

    Attributes:
        tls: the certificates.
        addresses: of the nodes of the other machines, by their names.
    """

    tls: NodeTls
    addresses: Mapping[str, Address]

    def reaches(self, node: str) -> bool:
        return node in self.addresses

    async def dial(self, node: str, process: str | None) -> Reached:  # noqa: ARG002  # one process of a node has the address
        address = self.addresses[node]
        stream = await trio.open_tcp_stream(address.host, address.port)
        try:
            watched = _prepared(stream)
            return Reached(await self.tls.connect(watched, machine_of(node)), watched, node)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise

    async def accept(self, stream: trio.SocketStream) -> Reached:
        watched = _prepared(stream)
        secured, machine = await self.tls.accept(watched)
        return Reached(secured, watched, machine)


def _prepared(stream: trio.SocketStream) -> Watched:
    keep_alive(stream.socket)
    return watch(stream)
