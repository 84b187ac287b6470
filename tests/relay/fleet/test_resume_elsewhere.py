"""A gateway comes back through another node: its session goes on at the node that has it, with every byte."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any, Final, final

import attrs
import pytest
import trio
import trio.testing
import trustme
from cutting_proxy import CuttingProxy
from node_rig import Machines, Sessions
from rig import (
    AT_ONCE,
    HANG,
    KEY,
    RELAY_NAME,
    connect,
    echo,
    eventually,
    no_hang,
    read_exactly,
    read_until,
    relay_config,
    talk,
    tcp_pair,
    upload,
)

from pioneer_tunnel import Tunnel, open_tunnel
from pioneer_tunnel._http.head import HeadReader
from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._net.adopted import adopt, watch
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._wire.handshake import SUBPROTOCOL
from pioneer_tunnel._wire.node import NODE, is_node_name
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.relay import Relay, RelayAddresses
from pioneer_tunnel.relay.admission import Admission
from pioneer_tunnel.relay.connection import Connection
from pioneer_tunnel.relay.fleet.node_links import NodeLinks
from pioneer_tunnel.relay.fleet.passing import SocketPassing
from pioneer_tunnel.relay.fleet.unix_network import WorkerNetwork
from pioneer_tunnel.relay.gateways import gateway_passer
from pioneer_tunnel.relay.gateways.other_nodes import OtherNodes, PassedGateway, named_node
from pioneer_tunnel.relay.limits import RelayLimits
from pioneer_tunnel.relay.visitors.visit import Visit
from pioneer_tunnel.websocket import ENGINES, EngineName, Opening, load_engine

CA: Final = trustme.CA()
PROCESSES: Final = ("a" * 16, "b" * 16)


@final
@attrs.define
class Node:
    relay: Relay
    links: NodeLinks
    passing: SocketPassing | None
    addresses: RelayAddresses


@final
@attrs.define
class Fleet:
    """Two nodes, and a gateway whose connections go to the node that the test chooses."""

    nodes: tuple[Node, ...]
    proxy: CuttingProxy
    tunnel: Tunnel
    goes_to: Callable[[], int]

    async def visit(self) -> trio.SocketStream:
        return await connect(self.nodes[0].addresses.ingress)

    @property
    def resumes(self) -> int:
        return self.nodes[0].relay.stats().tunnels["office"].resumes_total


async def serve_node(
    links: NodeLinks,
    passing: SocketPassing | None,
    changes: dict[str, Any],
    *,
    task_status: trio.TaskStatus[Node],
) -> None:
    relay = Relay(relay_config(**changes), passing=passing, nodes=links)
    async with trio.open_nursery() as nursery:
        await nursery.start(links.run)
        addresses = await nursery.start(relay.serve)
        task_status.started(Node(relay, links, passing, addresses))


async def links_of(kind: str, folder: Path, stack: AsyncExitStack) -> list[tuple[NodeLinks, SocketPassing | None]]:
    """The links of two nodes that do not run yet."""
    made: list[tuple[NodeLinks, SocketPassing | None]] = []
    if kind == "machines":
        machines = Machines(folder, "near", "far")
        for name in ("near", "far"):
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            machines.addresses[name] = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
            network = machines.network(name)
            links = NodeLinks(
                name, PROCESSES[0], Sessions(), machines=network, listeners=listeners, random=random.Random(1)
            )
            made.append((links, None))
        return made
    private = folder / "workers"
    private.mkdir(mode=0o700)
    for number, process in enumerate(PROCESSES):
        workers = WorkerNetwork(f"m/{number}", process, private, lambda pid, other=1 - number: f"m/{other}", workers=2)  # type: ignore[misc]
        passing = SocketPassing(workers, lambda tunnel_id: None, random.Random(1))
        links = NodeLinks(f"m/{number}", process, Sessions(), workers=workers, random=random.Random(1))
        made.append((links, passing))
    return made


@asynccontextmanager
async def fleet(
    kind: str,
    folder: Path,
    *,
    engine: EngineName | None = None,
    goes_to: Callable[[], int] = lambda: 0,
    bytes_until_cut: Callable[[], float] = lambda: float("inf"),
    tls: bool = False,
    **changes: Any,
) -> AsyncIterator[Fleet]:
    scheme, options = "ws", dict[str, Any]()
    if tls:
        issued = CA.issue_cert(RELAY_NAME)
        issued.private_key_and_cert_chain_pem.write_to_path(folder / "relay.pem")
        CA.cert_pem.write_to_path(folder / "ca.pem")
        pem = {"tls_certificate": folder / "relay.pem", "tls_private_key": folder / "relay.pem"}
        changes |= {**pem, "ingress_tls": False}
        scheme, options = "wss", {"ca_file": folder / "ca.pem"}
    with no_hang():
        async with AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            made = await links_of(kind, folder, stack)
            nodes = tuple([await nursery.start(serve_node, *each, changes) for each in made])
            found: Fleet

            async def go() -> trio.SocketStream:
                return await connect(nodes[found.goes_to()].addresses.control)

            proxy = CuttingProxy(go, bytes_until_cut)
            await nursery.start(proxy.run)
            async with open_tunnel(
                f"{scheme}://{RELAY_NAME}",
                key=KEY,
                dial=proxy.dial,
                restart=AT_ONCE,
                connect_timeout=HANG,
                websocket_engine=engine,
                **options,
            ) as tunnel:
                found = Fleet(nodes, proxy, tunnel, lambda: 0)
                nursery.start_soon(trio.serve_listeners, echo, [tunnel])
                await tunnel.wait_connected()
                found.goes_to = goes_to
                yield found
            nursery.cancel_scope.cancel()


WAYS: Final = [("machines", False), ("machines", True), ("workers", False), ("workers", True)]


@pytest.mark.parametrize(("kind", "tls"), WAYS, ids=["machines", "machines, TLS", "workers", "workers, TLS"])
async def test_a_session_goes_on_through_another_node(tmp_path: Path, kind: str, tls: bool) -> None:
    async with fleet(kind, tmp_path, tls=tls, goes_to=lambda: 1) as at, await at.visit() as visitor:
        await visitor.send_all(upload() + b"!")
        await read_until(visitor, b"!")
        for number in range(1, 4):
            at.proxy.cut()
            await visitor.send_all(b"?")
            assert await read_exactly(visitor, 1) == b"?"
            assert at.resumes == number
        assert at.tunnel.status.attempt == 1
        passing = at.nodes[1].passing
        if passing is not None:
            # The first one opens the channel. In TLS there is nothing to pass.
            assert passing.passed == (0 if tls else 2)
        [session] = at.nodes[0].relay.stats().tunnels["office"].sessions
        assert session.peer is not None
        assert session.peer.startswith("127.0.0.1:")
        assert NODE in session.extensions


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["machines", "workers"])
async def test_no_byte_is_lost_while_a_gateway_comes_back_anywhere(
    tmp_path: Path, engine: EngineName, kind: str
) -> None:
    dice = random.Random(7)
    async with fleet(
        kind,
        tmp_path,
        engine=engine,
        goes_to=lambda: dice.randrange(2),
        bytes_until_cut=lambda: dice.randint(10_000, 300_000),
    ) as at:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(talk, at.visit, 400_000)
        assert at.resumes > 3
        assert at.tunnel.status.attempt == 1


async def test_if_the_node_cannot_be_reached_the_gateway_gets_a_new_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_passer, "PASS_TIMEOUT", 0.5)
    async with fleet("machines", tmp_path, goes_to=lambda: 1) as at:
        at.nodes[1].links._machines.addresses["near"] = Address("127.0.0.1", 1)  # type: ignore[union-attr, index]
        at.proxy.cut()
        await eventually(lambda: at.nodes[1].relay.stats().tunnels["office"].sessions)
        assert at.nodes[1].relay.stats().tunnels["office"].resumes_total == 0


async def test_a_node_that_stops_lets_go_of_the_gateways_of_others(tmp_path: Path) -> None:
    where = [1, 0]
    async with fleet("machines", tmp_path, goes_to=lambda: where.pop(0)) as at:
        at.proxy.cut()
        await eventually(lambda: at.resumes == 1)
        await at.nodes[1].relay.drain()
        await eventually(lambda: at.resumes == 2)
        assert at.tunnel.status.attempt == 1


async def test_a_gateway_that_is_being_passed_when_its_node_stops_is_let_go() -> None:
    onward, far = trio.testing.memory_stream_pair()

    class Far(OtherNodes):
        name = "near"
        serve_gateway = None

        def reaches(self, node: str) -> bool:
            return node == "far"

        async def pass_gateway(self, node: str, passed: PassedGateway) -> ByteStream:
            passer.drain()
            return adopt(onward)

    passer = gateway_passer.GatewayPasser(Far(), None)
    left, right = await tcp_pair()
    with no_hang():
        async with trio.open_nursery() as nursery:
            connection = Connection(left.socket, None, None, nursery, copy_context())
            connection.begin(watch(left))
            connection.arrival = Admission(RelayLimits()).arrive(None, 0.0, connection.evict)
            head = HeadReader().feed(b"GET / HTTP/1.1\r\nHost: a\r\nPioneer-Node: far\r\n\r\n")
            assert head is not None
            assert await passer.passes(connection, Visit.of(connection), head, b"", certificate=None)
            connection.close()
    await far.aclose()
    await right.aclose()


async def test_a_gateway_that_was_passed_on_is_not_passed_on_again(tmp_path: Path) -> None:
    async with fleet("machines", tmp_path) as at:
        stream = await at.nodes[1].links.pass_gateway("near", PassedGateway(peer=Address("192.0.2.1", 7)))
        async with load_engine().connect(
            stream,
            Opening(
                subprotocol=SUBPROTOCOL,
                address=RelayAddress.parse(f"ws://{RELAY_NAME}"),
                headers={"Pioneer-Node": "far"},
            ),
        ) as websocket:
            [challenge] = await websocket.receive()
            assert isinstance(challenge, str)
            assert '"challenge"' in challenge


async def test_a_gateway_behind_a_balancer_counts_for_its_own_address(tmp_path: Path) -> None:
    machines = Machines(tmp_path, "near", "far")
    came: list[PassedGateway] = []

    async def serve(stream: ByteStream, passed: PassedGateway) -> None:
        came.append(passed)
        await stream.aclose()

    config = relay_config(ingress_addr="127.0.0.1:0", control_addr="127.0.0.1:0", accept_proxy_from=["127.0.0.0/8"])
    balancer = ProxyHeader(visitor=Address("203.0.113.7", 4711), local=Address("198.51.100.1", 443), tls=None)
    async with (
        machines.node("near", serve_gateway=serve),
        machines.node("far") as links,
        trio.open_nursery() as nursery,
    ):
        addresses = await nursery.start(Relay(config, nodes=links).serve)
        gateway = await connect(addresses.ingress)
        await gateway.send_all(
            balancer.encode()
            + f"GET / HTTP/1.1\r\nHost: {RELAY_NAME}\r\nUpgrade: websocket\r\n".encode()
            + b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            + f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\nPioneer-Node: near\r\n\r\n".encode()
        )
        await eventually(lambda: bool(came))
        await gateway.aclose()
        nursery.cancel_scope.cancel()
    assert [passed.peer for passed in came] == [balancer.visitor]


@pytest.mark.parametrize(
    ("kind", "names"),
    [("machines", ["far/0", "far/1" + 30 * "0", "far/x", "other"]), ("workers", ["m/2", "m/00", "m/1/1", "m/", "far"])],
)
async def test_a_name_that_no_node_has_leads_nowhere(kind: str, names: list[str], tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        both = [links for links, _ in await links_of(kind, tmp_path, stack)]
        async with trio.open_nursery() as nursery:
            for links in both:
                await nursery.start(links.run)
            links = both[0]
            for name in names:  # anybody may send it in a header
                assert not links.reaches(name)
                with pytest.raises(trio.BrokenResourceError, match="none that this one knows"):
                    await links.pass_gateway(name, PassedGateway())
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", [None, "Büro/0"], ids=["no fleet", "a name that no header can have"])
async def test_a_relay_that_cannot_name_its_node_does_not_and_ignores_the_header(name: str | None) -> None:
    nodes = None if name is None else NodeLinks(name, PROCESSES[0], Sessions(), random=random.Random(1))
    relay = Relay(relay_config(), nodes=nodes)
    with no_hang():
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(relay.serve)
            stream = await connect(addresses.control)
            opening = Opening(
                subprotocol=SUBPROTOCOL,
                address=RelayAddress.parse(f"ws://{RELAY_NAME}"),
                headers={"Pioneer-Node": "far"},
            )
            async with load_engine().connect(stream, opening) as websocket:
                [challenge] = await websocket.receive()
                assert isinstance(challenge, str)
                assert '"node"' not in challenge
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("engine", ENGINES)
async def test_the_header_is_in_the_request_if_there_is_one(engine: EngineName) -> None:
    address = RelayAddress.parse(f"ws://{RELAY_NAME}")
    for headers, wanted in (({}, None), ({"Pioneer-Node": "fra1/0"}, "fra1/0")):
        gateway, relay = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def ask() -> None:
                opening = Opening(subprotocol=SUBPROTOCOL, address=address, headers=headers)  # noqa: B023  # at once
                async with load_engine(engine).connect(gateway, opening):  # noqa: B023
                    pass

            head = HeadReader().feed(await read_until(relay, b"\r\n\r\n"))
            assert head is not None
            assert named_node(head) == wanted
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("", None),
        ("Pioneer-Node: fra1\r\n", "fra1"),
        ("pioneer-node: fra1/12\r\n", "fra1/12"),
        ("Pioneer-Node: fra1\r\nPioneer-Node: fra2\r\n", None),
        ("Pioneer-Node:\r\n", None),
        ("Pioneer-Node: fra 1\r\n", None),
        ("Pioneer-Node: fra\u00e4\r\n", None),
        (f"Pioneer-Node: {'a' * 129}\r\n", None),
    ],
)
def test_a_name_that_makes_no_sense_is_none(lines: str, wanted: str | None) -> None:
    head = HeadReader().feed(f"GET / HTTP/1.1\r\nHost: relay.test\r\n{lines}\r\n".encode())
    assert head is not None
    assert named_node(head) == wanted
    assert wanted is None or is_node_name(wanted)
