"""Links between nodes: a visitor of one node reaches the gateway at another one, and nobody else does."""

from __future__ import annotations

import hashlib
import math
import os
import random
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import attrs
import pytest
import trio
import trustme
from cutting_proxy import CuttingProxy
from node_rig import Machines, Sessions, holding, make_certificate
from rig import (
    AT_ONCE,
    HANG,
    KEY,
    RELAY_NAME,
    connect,
    eventually,
    no_hang,
    read_all,
    read_exactly,
    relay_config,
    request,
    upload,
)

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import InvalidSettingsError, StorageError
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel.relay import Relay, RelayAddresses
from pioneer_tunnel.relay.fleet.networks import MachineNetwork
from pioneer_tunnel.relay.fleet.node_links import NodeLinks
from pioneer_tunnel.relay.fleet.node_tls import NodeTls
from pioneer_tunnel.relay.fleet.peers import Order, OrderKind, Peers
from pioneer_tunnel.relay.fleet.records import Holding
from pioneer_tunnel.relay.fleet.unix_network import WorkerNetwork
from pioneer_tunnel.relay.gateways.other_nodes import PassedGateway
from pioneer_tunnel.relay.gateways.registry import Directory, GatewayAway, LiveSession, LocalDirectory
from pioneer_tunnel.relay.gateways.takeover import NEWEST_WINS, TakeoverRules
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel

SEVERAL_WINDOWS: Final = 3 * 1024 * 1024


@attrs.define(eq=False)
class FarSession(LiveSession):
    """A session of another node, as a directory shows it."""

    peers: Peers
    held: Holding
    known: Any = None

    id = instance = key_id = ""
    since = 0.0

    @property
    def services(self) -> Any:
        return self.known

    async def answers(self, within: float) -> bool:
        return True

    def replace(self, by: str) -> None:
        raise NotImplementedError

    def retire(self, by: str) -> None:
        raise NotImplementedError

    def abandon(self) -> None:
        raise NotImplementedError

    async def open_stream(self) -> ByteStream:
        hop = await self.peers.open_stream("office", self.held)
        self.known = hop.services
        return hop.stream


@final
class FarDirectory(Directory):
    """Knows one session, of another node."""

    def __init__(self, peers: Peers, held: Holding) -> None:
        self.session: Final = FarSession(peers, held)

    async def admit(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        raise NotImplementedError

    async def enter(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        raise NotImplementedError

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        raise NotImplementedError

    async def find(self, tunnel_id: str) -> LiveSession | None:
        return self.session

    def find_nowait(self, tunnel_id: str) -> LiveSession | None:
        return self.session


@final
class Scene:
    """A gateway at the node `near`, whose visitors come to the node `far`."""

    def __init__(self, near: NodeLinks, far: NodeLinks, sessions: Sessions, tunnel: Tunnel, visitors: Address) -> None:
        self.near: Final = near
        self.far: Final = far
        self.sessions: Final = sessions
        self.tunnel: Final = tunnel
        self.visitors: Final = visitors

    async def visit(self) -> trio.SocketStream:
        return await connect(self.visitors)


async def serve_relay(directory: Directory, *, task_status: trio.TaskStatus[RelayAddresses], **changes: Any) -> None:
    await Relay(relay_config(**changes), directory=directory).serve(task_status=task_status)


Handler: TypeAlias = Callable[[TunnelStream], Awaitable[None]]


@asynccontextmanager
async def gateway_behind(
    near: NodeLinks,
    far: NodeLinks,
    sessions: Sessions,
    handler: Handler,
    *,
    held: Holding | None = None,
    **changes: Any,
) -> AsyncIterator[Scene]:
    directory = LocalDirectory()
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(partial(serve_relay, directory, **changes))

        async def dial(host: str, port: int) -> trio.SocketStream:
            return await connect(addresses.control)

        async with open_tunnel(
            f"ws://{RELAY_NAME}", key=KEY, dial=dial, restart=AT_ONCE, connect_timeout=HANG
        ) as tunnel:
            await tunnel.wait_connected()
            await eventually(lambda: directory.find_nowait("office") is not None)
            session = directory.find_nowait("office")
            assert session is not None
            sessions.held["s"] = session
            nursery.start_soon(trio.serve_listeners, handler, [tunnel])
            far_directory = FarDirectory(far, held or holding("near"))
            visitors = await nursery.start(partial(serve_relay, far_directory, **changes))
            yield Scene(near, far, sessions, tunnel, visitors.ingress)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def scene(folder: Path, handler: Handler, **changes: Any) -> AsyncIterator[Scene]:
    """Two machines, which reach each other over TLS."""
    machines, sessions = Machines(folder, "near", "far"), Sessions()
    with no_hang():
        async with (
            machines.node("near", sessions) as near,
            machines.node("far") as far,
            gateway_behind(near, far, sessions, handler, **changes) as made,
        ):
            yield made


async def tell_visitor(stream: TunnelStream) -> None:
    """A handler that answers with the visitor's address and the hash of what came, and then sends a lot."""
    with suppress(trio.BrokenResourceError):
        digest = hashlib.sha256()
        async for data in stream:
            digest.update(data)
        await stream.send_all(f"{stream.visitor} {digest.hexdigest()} ".encode() + bytes(SEVERAL_WINDOWS))
        await stream.aclose()


ANSWER: Final = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"


async def answer_at_once(stream: TunnelStream) -> None:
    """A handler that answers before it has read anything, and ends when the visitor does."""
    with suppress(trio.BrokenResourceError):
        await stream.send_all(ANSWER)
        await read_all(stream)
        await stream.aclose()


async def test_a_visitor_of_another_node_reaches_the_gateway_with_its_address(tmp_path: Path) -> None:
    async with scene(tmp_path, tell_visitor) as at:
        sent = request(body=os.urandom(SEVERAL_WINDOWS))
        async with await at.visit() as visitor:
            own = Address.of_socket(visitor.socket.getsockname())
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def send() -> None:
                    await visitor.send_all(sent)
                    await visitor.send_eof()

                received = await read_all(visitor)
        seen, digest, rest = received.split(b" ", 2)
        assert seen.decode() == str(own)
        assert digest.decode() == hashlib.sha256(sent).hexdigest()
        assert rest == bytes(SEVERAL_WINDOWS)


async def test_visitors_take_no_task_at_either_node(tmp_path: Path) -> None:
    async def talk(stream: TunnelStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send_all(data[-1:])

    async with scene(tmp_path, talk) as at, AsyncExitStack() as stack:

        async def come() -> trio.SocketStream:
            visitor = await stack.enter_async_context(await at.visit())
            await visitor.send_all(upload() + b"!")
            assert await read_exactly(visitor, 1) == b"!"
            return visitor

        first = await come()
        tasks = trio.lowlevel.current_statistics().tasks_living
        visitors = [first, *[await come() for _ in range(20)]]
        # One for each handler of the gateway, which is in this process too.
        await eventually(lambda: trio.lowlevel.current_statistics().tasks_living == tasks + 20)
        for number, visitor in enumerate(visitors):
            await visitor.send_all(bytes([number]))
            assert await read_exactly(visitor, 1) == bytes([number])


async def test_a_break_at_either_end_is_a_break_at_the_other(tmp_path: Path) -> None:
    broken = trio.Event()

    async def handle(stream: TunnelStream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\npart")
        received = await read_exactly(stream, 1)
        if received:
            try:
                await read_all(stream)
            except trio.BrokenResourceError:
                broken.set()
            finally:
                stream.reset()

    async with scene(tmp_path, handle) as at:
        visitor = await at.visit()
        await visitor.send_all(upload())
        await read_exactly(visitor, 10)
        visitor.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        visitor.socket.close()
        await broken.wait()


async def test_a_suspended_session_and_a_gone_one_are_told_apart(tmp_path: Path) -> None:
    machines, sessions = Machines(tmp_path, "near", "far"), Sessions()

    @final
    class Suspended(FarSession):
        async def open_stream(self) -> ByteStream:
            raise GatewayAway

    with no_hang():
        async with machines.node("near", sessions) as near, machines.node("far") as far:
            sessions.held["suspended"] = Suspended(near, holding("near"))
            with pytest.raises(GatewayAway):
                await far.open_stream("office", holding("near", "suspended"))
            with pytest.raises(trio.BrokenResourceError, match="node near does not have it any more"):
                await far.open_stream("office", holding("near", "gone"))
            with pytest.raises(trio.BrokenResourceError, match="node else is none that this one knows"):
                await far.open_stream("office", holding("else"))


async def test_orders_are_carried_out(tmp_path: Path) -> None:
    async with scene(tmp_path, tell_visitor) as at:
        for order in [Order(OrderKind.REPLACE, by="b"), Order(OrderKind.RETIRE), Order(OrderKind.ABANDON)]:
            assert await at.far.order("office", holding("near"), order)
        answers = Order(OrderKind.ANSWERS, within=HANG)
        assert await at.far.order("office", holding("near"), answers)  # its gateway does
        assert not await at.far.order("office", holding("near", "gone"), answers)
        assert not await at.far.order("office", holding("else"), answers)
        assert [order for _, order in at.sessions.orders[:3]] == [
            Order(OrderKind.REPLACE, by="b"),
            Order(OrderKind.RETIRE),
            Order(OrderKind.ABANDON),
        ]


async def test_the_distance_is_known_once_the_link_is_measured(tmp_path: Path) -> None:
    machines = Machines(tmp_path, "near", "far")
    with no_hang():
        async with machines.node("near"), machines.node("far") as far:
            assert far.distance("near") == math.inf  # asking for it dials
            assert far.distance("else") == math.inf
            await eventually(lambda: far.distance("near") < 1)


async def test_only_certificates_of_the_configuration_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machines = Machines(tmp_path, "near", "far")
    (tmp_path / "stolen").mkdir()
    other = make_certificate(tmp_path / "stolen", "far")
    stranger = MachineNetwork(NodeTls(*other, {"near": machines.files["near"][0]}), machines.addresses)
    mistaken = machines.network("far", near=other[0])
    with no_hang():
        async with machines.node("near"):
            for network in (stranger, mistaken):
                async with machines.node("far", network=network) as far:
                    with pytest.raises(trio.BrokenResourceError, match="node near cannot be reached"):
                        await far.open_stream("office", holding("near"))
    assert "a connection to the address for other nodes is refused" in caplog.text


async def test_a_certificate_that_may_sign_others_adds_nobody(tmp_path: Path) -> None:
    """A node's certificate is trusted, so OpenSSL accepts what it has signed; only itself is meant."""
    authority = trustme.CA()
    certificate, private_key = tmp_path / "ca.pem", tmp_path / "ca.key"
    authority.cert_pem.write_to_path(certificate)
    authority.private_key_pem.write_to_path(private_key)
    machines = Machines(tmp_path, "near", "far")
    issued = authority.issue_cert("far")
    signed, key = tmp_path / "signed.pem", tmp_path / "signed.key"
    issued.cert_chain_pems[0].write_to_path(signed)
    issued.private_key_pem.write_to_path(key)
    near = MachineNetwork(NodeTls(*machines.files["near"], {"far": certificate}), machines.addresses)
    impostor = MachineNetwork(NodeTls(signed, key, {"near": machines.files["near"][0]}), machines.addresses)
    with no_hang():
        async with machines.node("near", network=near), machines.node("far", network=impostor) as far:
            with pytest.raises(trio.BrokenResourceError, match="node near cannot be reached"):
                await far.open_stream("office", holding("near"))


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    own, other = make_certificate(tmp_path, "own"), make_certificate(tmp_path, "other")
    with pytest.raises(InvalidSettingsError, match=r"missing\.pem.*there is no such file"):
        NodeTls(*own, {"fra2": tmp_path / "missing.pem"})
    with pytest.raises(InvalidSettingsError, match=r"other\.key.*it holds no certificate"):
        NodeTls(*own, {"fra2": other[1]})
    with pytest.raises(InvalidSettingsError, match="'fra2' is that of this node too"):
        NodeTls(*own, {"fra2": own[0]})
    with pytest.raises(InvalidSettingsError, match="'fra3' is that of fra2 too"):
        NodeTls(*own, {"fra2": other[0], "fra3": other[0]})
    with pytest.raises(InvalidSettingsError, match=r"own\.pem.*other\.key.*cannot be used"):
        NodeTls(own[0], other[1], {})


async def test_a_lost_link_breaks_its_streams_and_the_next_visitor_gets_another_one(tmp_path: Path) -> None:
    machines, sessions = Machines(tmp_path, "near", "far"), Sessions()
    with no_hang():
        async with (
            machines.node("near", sessions) as near,
            trio.open_nursery() as nursery,
        ):
            direct = machines.addresses["near"]
            line = CuttingProxy(partial(connect, direct), lambda: math.inf)
            await nursery.start(line.run)
            machines.addresses["near"] = line.address
            async with machines.node("far") as far, gateway_behind(near, far, sessions, answer_at_once) as at:
                async with await at.visit() as visitor:
                    await visitor.send_all(upload())
                    assert await read_exactly(visitor, len(ANSWER)) == ANSWER
                    line.cut()
                    with pytest.raises(trio.BrokenResourceError):
                        await read_all(visitor)
                async with await at.visit() as visitor:
                    await visitor.send_all(request())
                    await visitor.send_eof()
                    assert await read_all(visitor) == ANSWER
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def worker(
    folder: Path, number: int, sessions: Sessions | None = None, *, process: str = "", who: str | None = "m/0"
) -> AsyncIterator[NodeLinks]:
    """A worker of the machine `m`. `who` is what it takes this process for, which is at both ends."""
    process = process or f"{number:016x}"
    network = WorkerNetwork(f"m/{number}", process, folder, lambda pid: who if pid == os.getpid() else None, workers=2)
    links = NodeLinks(f"m/{number}", process, sessions or Sessions(), workers=network, random=random.Random(1))
    async with trio.open_nursery() as nursery:
        await nursery.start(links.run)
        yield links
        nursery.cancel_scope.cancel()


def private(folder: Path) -> Path:
    (folder / "workers").mkdir(mode=0o700)
    return folder / "workers"


async def test_workers_of_one_machine_reach_each_other_over_unix_sockets(tmp_path: Path) -> None:
    sessions, folder = Sessions(), private(tmp_path)
    with no_hang():
        async with (
            worker(folder, 0, sessions, who="m/1") as near,
            worker(folder, 1) as far,
            gateway_behind(near, far, sessions, tell_visitor, held=holding("m/0", process=f"{0:016x}")) as at,
        ):
            async with await at.visit() as visitor:
                own = Address.of_socket(visitor.socket.getsockname())
                await visitor.send_all(request(body=bytes(SEVERAL_WINDOWS)))
                await visitor.send_eof()
                assert (await read_all(visitor)).decode().startswith(f"{own} ")
            assert far.distance("m/0") == 0
            assert stat.S_IMODE((folder / "links-0").stat().st_mode) == 0o600
    # The next process of a worker replaces what is left.
    assert {path.name for path in folder.iterdir()} == {"links-0", "links-1"}


async def test_while_a_worker_is_restarted_both_of_its_processes_are_reached(tmp_path: Path) -> None:
    folder, old, new = private(tmp_path), Sessions(), Sessions()
    with no_hang():
        async with (
            worker(folder, 0, old, process="a" * 16, who="m/1"),
            worker(folder, 0, new, process="b" * 16, who="m/1"),
            worker(folder, 1) as far,
        ):
            for order in (Order(OrderKind.REPLACE), Order(OrderKind.RETIRE)):
                await far.order("office", holding("m/0", process="a" * 16), order)
                await far.order("office", holding("m/0", process="b" * 16), order)
            assert len(old.orders) == len(new.orders) == 2
            assert not await far.order("office", holding("m/0", process="c" * 16), Order(OrderKind.REPLACE))
            assert not await far.order("office", holding("m/0", process="../links-0"), Order(OrderKind.REPLACE))
            with pytest.raises(trio.BrokenResourceError, match="node m/0 does not take this from other nodes"):
                await far.pass_gateway("m/0", PassedGateway())  # the number leads to the newer process


@pytest.mark.parametrize("wrong", [None, "m/2"], ids=["no worker", "another worker"])
@pytest.mark.parametrize("dials", [True, False], ids=["dials", "listens"])
async def test_a_process_that_the_parent_does_not_name_is_refused(
    tmp_path: Path, wrong: str | None, dials: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder, sessions = private(tmp_path), Sessions()
    seen_by_listener, seen_by_dialler = (wrong, "m/0") if dials else ("m/1", wrong)
    with no_hang():
        async with worker(folder, 0, sessions, who=seen_by_listener), worker(folder, 1, who=seen_by_dialler) as far:
            assert not await far.order("office", holding("m/0", process=f"{0:016x}"), Order(OrderKind.REPLACE))
    assert not sessions.orders
    assert "is refused" in caplog.text or "node m/0 cannot be reached" in caplog.text


async def test_the_folder_of_workers_has_to_be_private(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    with pytest.RaisesGroup(StorageError, flatten_subgroups=True):
        async with worker(folder, 0):
            pass
