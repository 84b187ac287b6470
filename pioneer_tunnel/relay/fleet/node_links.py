"""The links of a node to all others: those that it dials, to ask, and those that it accepts, to be asked."""

from __future__ import annotations

import functools
import logging
import math
import random
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final, NoReturn, final

import trio

from ..._model.errors import RemoteProtocolError
from ..._model.log_fields import about
from ..._net.log_limiter import LogLimiter
from ..._net.stream_link import StreamLink
from ..._wire.messages import Message
from ...exchange.carrier import Carrier
from ...yamux import Role, SendBudget, YamuxConnection, YamuxStream
from ..connection import contain_errors, log_unforeseen
from ..gateways.other_nodes import OtherNodes, PassedGateway, ServeGateway
from ..gateways.registry import GatewayAway
from .hops import Hops
from .networks import MachineNetwork, Network, Reached
from .node_link import HEARTBEAT, LIMITS, NodeLink, greet
from .node_messages import (
    AWAY,
    DONE,
    OPENED,
    gateway_fields,
    order_fields,
    parse_services,
    visit_fields,
)
from .node_names import machine_of
from .peers import Asked, Hop, Order, Peers
from .records import Holding
from .unix_network import LINKS, WorkerNetwork

__all__ = ["NodeLinks"]

GREETING_TIMEOUT: Final = 5.0
"""Seconds for TLS and the greeting of a node that connects."""

MOST_GREETING: Final = 32
"""Connections that may be in their greeting. Anyone can reach the address; one more is closed at once."""

MOST_LINKS: Final = 4
"""Links that one node may have to this one. It has two while it restarts; one more ends the oldest."""

UNSENT_LIMIT: Final = 256 * 1024 * 1024
"""Bytes that all links together hold to be sent."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.fleet"))


@final
class NodeLinks(Peers, OtherNodes):
    """Reaches the other nodes, and answers them.

    Args:
        node: the name of this node.
        process: the id of this process, see `Holding`.
        asked: what the others may ask.
        machines: the way to other machines; None if there are none.
        workers: the way to the other workers of this machine; None if there are none.
        listeners: where other machines connect. They are closed when `run` ends.
        random: spreads attempts to reach a node.

    Attributes:
        name: of this node.
        serve_gateway: see `OtherNodes`. Set it before `run`.
    """

    def __init__(
        self,
        node: str,
        process: str,
        asked: Asked,
        *,
        machines: MachineNetwork | None = None,
        workers: WorkerNetwork | None = None,
        listeners: Sequence[trio.SocketListener] = (),
        random: random.Random,
    ) -> None:
        self.name: Final = node
        self._asked: Final = asked
        self._machines: Final = machines
        self._workers: Final = workers
        self._listeners: Final = listeners
        self.serve_gateway: ServeGateway | None = None
        self._random: Final = random
        self._process: Final = process
        self._sending: Final = SendBudget(UNSENT_LIMIT)
        self._links: Final[dict[tuple[str, str | None], NodeLink]] = {}
        self._accepted: Final[dict[str, list[trio.CancelScope]]] = {}
        self._greeting = 0
        self._tasks: trio.Nursery | None = None
        self._hops: Hops | None = None
        self._listening: Final = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Answer the other nodes, and keep links to them, until cancelled. Streams that are open then are reset.

        Starts when this node can be reached.

        Raises:
            OSError: the system refused the socket for the other workers.
            StorageError: the folder of the sockets cannot be used.
        """
        with ExitStack() as stack:
            for listener in self._listeners:
                stack.callback(listener.socket.close)
            beside: list[trio.SocketListener] = []
            if self._workers is not None:
                listening = stack.enter_context(self._workers.listening(LINKS, socket.SOCK_STREAM))
                beside.append(trio.SocketListener(trio.socket.from_stdlib_socket(listening)))
            async with trio.open_nursery() as nursery:
                self._tasks = nursery
                carrier = Carrier(log_unforeseen)
                await nursery.start(carrier.run)
                self._hops = Hops(self._asked, carrier, nursery, self.serve_gateway)
                try:
                    if self._machines is not None and self._listeners:
                        nursery.start_soon(self._listen, self._machines, self._listeners, self._listening)
                    if self._workers is not None:
                        nursery.start_soon(self._listen, self._workers, beside, trio.CancelScope())
                    task_status.started()
                    await trio.sleep_forever()
                finally:
                    self._tasks = None
                    self._links.clear()
        raise AssertionError("it ends only by being cancelled")

    async def _listen(
        self, network: Network, listeners: Sequence[trio.SocketListener], listening: trio.CancelScope
    ) -> None:
        with listening:
            await trio.serve_listeners(
                functools.partial(self._accept, network), [*listeners], handler_nursery=self._tasks
            )

    def stop_listening(self) -> None:
        """Accept no more links of other machines. Those that there are stay. Does not wait."""
        self._listening.cancel()

    # What there is to tell

    def round_trip(self, node: str) -> float | None:
        """The shortest round trip to a machine of late, in seconds; None while there is no link to it."""
        found = [link.round_trip for (name, _), link in self._links.items() if machine_of(name) == node]
        shortest = min(found, default=math.inf)
        return None if shortest == math.inf else shortest

    @property
    def hops_open(self) -> int:
        """Visitors of this node whose streams other nodes carry now."""
        return sum(link.streams_open for link in self._links.values())

    @property
    def hops_served(self) -> int:
        """Visitors of other nodes that this one has carried."""
        return 0 if self._hops is None else self._hops.total

    # What the directory asks

    async def open_stream(self, tunnel_id: str, holding: Holding) -> Hop:
        link = self._link(holding.node, holding.process)
        fields = visit_fields(tunnel_id, holding.session)
        read = functools.partial(_services_opened, holding.node)
        return Hop(*await link.ask(fields, read, process=holding.process))

    async def order(self, tunnel_id: str, holding: Holding, order: Order) -> bool:
        try:
            link = self._link(holding.node, holding.process)
            fields = order_fields(tunnel_id, holding.session, order)
            stream, done = await link.ask(fields, _is_done, process=holding.process)
        except trio.BrokenResourceError:
            return False
        stream.close_soon()
        return done

    def distance(self, node: str) -> float:
        if self._workers is not None and self._workers.reaches(node):
            return 0.0
        try:
            link = self._link(node)
        except trio.BrokenResourceError:
            return math.inf
        link.want()  # so that it is known next time
        return link.round_trip

    async def pass_gateway(self, node: str, passed: PassedGateway) -> YamuxStream:
        stream, _ = await self._link(node).ask(gateway_fields(passed), functools.partial(_check_opened, node))
        return stream

    def reaches(self, node: str) -> bool:
        return self._network(node) is not None

    def _network(self, node: str) -> Network | None:
        for network in (self._workers, self._machines):
            if network is not None and network.reaches(node):
                return network
        return None

    def _link(self, node: str, process: str | None = None) -> NodeLink:
        network = self._network(node)
        if network is None:
            raise trio.BrokenResourceError(f"node {node} is none that this one knows")
        # Each process of a worker has a socket of its own.
        key = (node, process if network is self._workers else None)
        link = self._links.get(key)
        if link is None:
            if self._tasks is None:
                raise trio.BrokenResourceError("this node is not linked to others yet, or no more")
            for other in [other for other in self._links if other[0] == node and self._links[other].is_idle]:
                del self._links[other]  # of a process that has ended
            link = self._links[key] = NodeLink(
                node,
                own=self.name,
                process=self._process,
                network=network,
                sending=self._sending,
                tasks=self._tasks,
                random=self._random,
            )
        return link

    # What others ask

    async def _accept(self, network: Network, stream: trio.SocketStream) -> None:
        greeted = await self._greet(network, stream)
        if greeted is not None:
            await contain_errors(stream, self._serve, *greeted)

    async def _greet(self, network: Network, stream: trio.SocketStream) -> tuple[str, Reached] | None:
        """Find out which node has connected. None if it is none; then the connection is closed."""
        if self._greeting >= MOST_GREETING:
            await trio.aclose_forcefully(stream)
            return None
        self._greeting += 1
        try:
            with trio.fail_after(GREETING_TIMEOUT):
                reached = await network.accept(stream)
                said = await greet(reached.stream, self.name, self._process)
            name = said.text("name")
            is_worker = machine_of(name) == reached.name and network.reaches(name)
            if name != reached.name and not is_worker:
                raise RemoteProtocolError("it greets with the name of another node, or of a worker too many")
        except (trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError) as error:
            why = str(error)
        except trio.TooSlowError:
            why = f"no greeting came within {GREETING_TIMEOUT:g} seconds"
        else:
            return name, reached
        finally:
            self._greeting -= 1
        await trio.aclose_forcefully(stream)
        fields = about("node_refused", reason=why)
        _log_limiter.log("refused", f"a connection to the address for other nodes is refused: {why}", about=fields)
        return None

    async def _serve(self, node: str, reached: Reached) -> None:
        """Answer what a node asks over one link, until it ends."""
        assert self._hops is not None
        connection = YamuxConnection(
            StreamLink(reached.stream, reached.watched),
            Role.SERVER,
            heartbeat=HEARTBEAT,
            limits=LIMITS,
            on_stream=functools.partial(self._hops.take, node),
            process_sending=self._sending,
        )
        links = self._accepted.setdefault(node, [])
        with trio.CancelScope() as serving:
            links.append(serving)
            if len(links) > MOST_LINKS:
                links.pop(0).cancel()
            try:
                await connection.run()
            except RemoteProtocolError as error:
                fields = about("node_protocol", peer=node, reason=error)
                _log_limiter.log(("protocol", node), f"node {node} breaks the protocol: {error}", about=fields)
            finally:
                if serving in links:
                    links.remove(serving)


def _services_opened(node: str, answer: Message) -> frozenset[str] | None:
    """The services of a gateway to which `node` has opened a stream.

    Raises:
        GatewayAway, trio.BrokenResourceError, RemoteProtocolError: it was not.
    """
    if answer.type == AWAY:
        raise GatewayAway
    _check_opened(node, answer)
    return parse_services(answer)


def _check_opened(node: str, answer: Message) -> None:
    if answer.type != OPENED:
        raise trio.BrokenResourceError(f"node {node} does not take this from other nodes")


def _is_done(answer: Message) -> bool:
    return answer.type == DONE and answer.fields.get("done") is True
