"""Visitors that reach the wrong worker are passed to the right one, as they are."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias, final

import pytest
import trio
import trio.testing
import trustme
from node_rig import PASSED, holding
from rig import (
    AT_ONCE,
    HANG,
    HOST,
    KEY,
    RELAY_NAME,
    ask,
    connect,
    eventually,
    no_hang,
    read_all,
    read_exactly,
    relay_config,
    request,
    tunnel_entry,
    upload,
)

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._wire.handshake import SUBPROTOCOL
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.relay import Relay, RelayAddresses
from pioneer_tunnel.relay.fleet.passing import MOST_TOGETHER, SocketPassing
from pioneer_tunnel.relay.fleet.records import Holding
from pioneer_tunnel.relay.fleet.unix_network import WorkerNetwork
from pioneer_tunnel.relay.gateways.registry import LocalDirectory
from pioneer_tunnel.relay.inherited import Inherited
from pioneer_tunnel.relay.visitors.passing import Passed, Passing, Stage
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import open_tunnel

CA: Final = trustme.CA()
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
Handler: TypeAlias = Callable[[TunnelStream], Awaitable[None]]
PROCESSES: Final = ("a" * 16, "b" * 16)


@final
class Worker:
    """A relay that is a worker, in this process. Its visitors belong to the other one unless it has the session."""

    def __init__(self, number: int, folder: Path, **changes: Any) -> None:
        other = 1 - number
        self.directory: Final = LocalDirectory()
        network = WorkerNetwork(f"m/{number}", PROCESSES[number], folder, lambda pid: f"m/{other}", workers=2)
        self._there: Final = holding(f"m/{other}", process=PROCESSES[other])
        self.asked: Final[list[str]] = []  # where visitors of these tunnels go
        self.passing: Final = SocketPassing(network, self._where, random.Random(1))
        self.relay: Final = Relay(relay_config(**changes), directory=self.directory, passing=self.passing)
        self.addresses: RelayAddresses

    def _where(self, tunnel_id: str) -> Holding | None:
        self.asked.append(tunnel_id)
        return None if tunnel_id in self.directory.tunnels else self._there

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            self.addresses = await nursery.start(self.relay.serve)
            task_status.started()


async def open_channel(worker: Worker) -> None:
    """The first visitor opens the channel to the other worker, and is not passed on."""
    async with await connect(worker.addresses.ingress) as visitor:
        stream: trio.abc.Stream = visitor
        if worker.relay._config.ingress_tls or worker.relay._config.tunnels[0].routes[0].passes_tls:
            with suppress(trio.BrokenResourceError):
                stream = await in_tls(visitor)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_all(request("Connection: close"))
            await read_all(stream)


@asynccontextmanager
async def workers(
    folder: Path, handler: Handler, *, first: bool = True, **changes: Any
) -> AsyncIterator[tuple[Worker, Worker]]:
    """Two workers: the first one has the gateway."""
    private = folder / "workers"
    private.mkdir(mode=0o700)
    near, far = Worker(0, private, **changes), Worker(1, private, **changes)
    with no_hang():
        async with trio.open_nursery() as nursery:
            await nursery.start(near.run)
            await nursery.start(far.run)

            async def dial(host: str, port: int) -> trio.SocketStream:
                return await connect(near.addresses.control)

            async with open_tunnel(
                f"ws://{RELAY_NAME}", key=KEY, dial=dial, restart=AT_ONCE, connect_timeout=HANG
            ) as tunnel:
                nursery.start_soon(trio.serve_listeners, handler, [tunnel])
                await eventually(lambda: near.directory.find_nowait("office") is not None)
                if first:
                    await open_channel(far)
                await trio.testing.wait_all_tasks_blocked(0.01)
                yield near, far
            nursery.cancel_scope.cancel()


async def tell(stream: TunnelStream) -> None:
    with suppress(trio.BrokenResourceError):
        digest = hashlib.sha256()
        async for data in stream:
            digest.update(data)
        await stream.send_all(f"{stream.visitor} {digest.hexdigest()}".encode())
        await stream.aclose()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("relay")
    issued = CA.issue_cert(HOST)
    issued.private_key_pem.write_to_path(str(folder / "relay.key"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "relay.crt"))
    return {"tls_certificate": "relay.crt", "tls_private_key": "relay.key", "base_dir": folder, "control_tls": False}


async def in_tls(stream: trio.abc.Stream) -> trio.SSLStream[trio.abc.Stream]:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    secured = trio.SSLStream(stream, context, server_hostname=HOST, https_compatible=True)
    await secured.do_handshake()
    return secured


def told(visitor: object, sent: bytes) -> str:
    return f"{visitor} {hashlib.sha256(sent).hexdigest()}"


async def test_a_request_is_passed_on(tmp_path: Path) -> None:
    async with workers(tmp_path, tell) as (near, far):
        sent = request(body=os.urandom(1024 * 1024))
        async with await connect(far.addresses.ingress) as visitor:
            own = Address.of_socket(visitor.socket.getsockname())
            assert (await ask(visitor, sent)).decode() == told(own, sent)
        assert far.passing.passed == 1
        await eventually(lambda: far.relay.stats().connections.open == 0)
        await eventually(lambda: near.relay.stats().connections.visitors_open == 0)
        # One of them has accepted the gateway and the visitor that opened the channel, too.
        accepted = [each.relay.stats().connections.accepted_total for each in (near, far)]
        assert accepted == [1, 2]


@pytest.mark.parametrize("first", ["a part of its head", "its head and a part of its body"])
async def test_a_request_that_comes_in_pieces_is_passed_on(tmp_path: Path, first: str) -> None:
    async with workers(tmp_path, tell) as (_, far):
        sent = request(body=b"body")
        begun = 20 if first == "a part of its head" else len(sent) - 2
        async with await connect(far.addresses.ingress) as visitor:
            own = Address.of_socket(visitor.socket.getsockname())
            await visitor.send_all(sent[:begun])
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert (await ask(visitor, sent[begun:])).decode() == told(own, sent)
        assert far.passing.passed == 1


async def test_a_request_that_makes_no_sense_is_refused_by_the_worker_that_gets_it(tmp_path: Path) -> None:
    async with workers(tmp_path, tell) as (near, far), await connect(far.addresses.ingress) as visitor:
        assert (await ask(visitor, request("no header"))).startswith(b"HTTP/1.1 400")
        assert far.passing.passed == 1
        assert near.relay.stats().refusals_total == {"bad_request": 1}


async def test_a_gateway_stays_where_a_tunnel_has_the_name_of_the_relay(tmp_path: Path) -> None:
    both: dict[str, Any] = {"control_addr": "localhost:0", "ingress_addr": "localhost:0"}
    shared: dict[str, Any] = {"tunnels": [tunnel_entry(url=f"http://{RELAY_NAME}")]}
    gateway = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        f"Sec-WebSocket-Protocol: {SUBPROTOCOL}",
    )
    async with workers(tmp_path, tell, first=False, **both, **shared) as (_, far):
        async with await connect(far.addresses.ingress) as first:  # opens the channel
            await ask(first, request(host=RELAY_NAME))
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with await connect(far.addresses.ingress) as comer:
            await comer.send_all(request(*gateway, host=RELAY_NAME))
            assert (await read_exactly(comer, 12)) == b"HTTP/1.1 101"
        assert far.passing.passed == 0
        async with await connect(far.addresses.ingress) as visitor:
            own = Address.of_socket(visitor.socket.getsockname())
            sent = request(host=RELAY_NAME)
            assert (await ask(visitor, sent)).decode() == told(own, sent)
        assert far.passing.passed == 1


async def test_an_address_that_gateways_share_with_visitors_passes_visitors_on(tmp_path: Path) -> None:
    both: dict[str, Any] = {"control_addr": "localhost:0", "ingress_addr": "localhost:0"}
    async with workers(tmp_path, tell, **both) as (_, far), await connect(far.addresses.ingress) as visitor:
        own = Address.of_socket(visitor.socket.getsockname())
        assert (await ask(visitor, request())).decode() == told(own, request())
        assert far.passing.passed == 1


async def answer_ok(stream: TunnelStream) -> None:
    """A handler that answers each request, and keeps the connection."""
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            await stream.send_all(OK * data.count(b"\r\n\r\n"))
        await stream.aclose()


async def test_a_visitor_is_passed_on_before_tls_begins(tmp_path: Path, certificate: dict[str, Any]) -> None:
    url: dict[str, Any] = {"tunnels": [tunnel_entry(url=f"https://{HOST}")]}
    async with workers(tmp_path, answer_ok, **url, **certificate) as (near, far):
        visitor = await in_tls(await connect(far.addresses.ingress))
        for _ in range(3):
            await visitor.send_all(request())
            assert await read_exactly(visitor, len(OK)) == OK
        assert far.passing.passed == 1
        assert near.relay.stats().connections.visitors_open == 1
        await trio.aclose_forcefully(visitor)


async def end_tls(stream: TunnelStream) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert(HOST).configure_cert(context)
    async with trio.SSLStream(stream, context, server_side=True, https_compatible=True) as secured:
        with suppress(trio.BrokenResourceError):
            async for data in secured:
                await secured.send_all(data)


async def test_a_visitor_whose_tls_passes_through_is_passed_on(tmp_path: Path) -> None:
    blind: dict[str, Any] = {"tunnels": [tunnel_entry(url=f"https://{HOST}", tls="passthrough")]}
    async with workers(tmp_path, end_tls, **blind) as (_, far):
        visitor = await in_tls(await connect(far.addresses.ingress))
        sent = os.urandom(256 * 1024)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(visitor.send_all, sent)
            assert await read_exactly(visitor, len(sent)) == sent
        assert far.passing.passed == 1
        await trio.aclose_forcefully(visitor)


async def test_a_visitor_of_an_address_of_its_own_is_passed_on(tmp_path: Path) -> None:
    bound: dict[str, Any] = {"tunnels": [tunnel_entry(bind_addr="127.0.0.1:0")]}
    async with workers(tmp_path, tell, first=False, **bound) as (_, far):
        [address] = far.addresses.all_tunnels["office"]
        for count in (0, 1):  # the first one opens the channel
            async with await connect(address) as visitor:
                own = Address.of_socket(visitor.socket.getsockname())
                with suppress(trio.BrokenResourceError):
                    assert (await ask(visitor, b"anything")).decode() == told(own, b"anything")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert far.passing.passed == count


BALANCER: Final = ProxyHeader(visitor=Address("203.0.113.7", 4711), local=Address("198.51.100.1", 443), tls=True)


@pytest.mark.parametrize("pieces", ["together", "apart"])
async def test_a_visitor_behind_a_balancer_is_passed_on(tmp_path: Path, pieces: str) -> None:
    behind: dict[str, Any] = {"accept_proxy_from": ["127.0.0.0/8"]}
    async with workers(tmp_path, tell, first=False, **behind) as (_, far):
        for count in (0, 1):
            async with await connect(far.addresses.ingress) as visitor:
                if pieces == "together":
                    await visitor.send_all(BALANCER.encode() + request())
                else:
                    await visitor.send_all(BALANCER.encode())
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    await visitor.send_all(request())
                await visitor.send_eof()
                received = await read_all(visitor)
            assert far.passing.passed == count
        assert received.decode() == told(BALANCER.visitor, request())


async def test_a_visitor_whom_a_trusted_proxy_names_is_passed_on(tmp_path: Path) -> None:
    async with workers(tmp_path, tell, trust_forwarded_from=["127.0.0.0/8"]) as (_, far):
        sent = request("X-Forwarded-For: 203.0.113.7")
        async with await connect(far.addresses.ingress) as visitor:
            assert (await ask(visitor, sent)).decode() == told("203.0.113.7:0", sent)
        assert far.passing.passed == 1


async def test_what_was_passed_on_once_stays(tmp_path: Path) -> None:
    """Both workers believe that the other one has the session. The second one answers by itself."""
    async with workers(tmp_path, tell) as (near, far):
        session = near.directory.find_nowait("office")
        assert session is not None
        await near.directory.leave("office", session)
        async with await connect(near.addresses.ingress) as first:  # opens the channel back
            await ask(first, request())
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with await connect(far.addresses.ingress) as visitor:
            assert (await ask(visitor, request())).startswith(b"HTTP/1.1 503")
        assert (far.passing.passed, near.passing.passed) == (1, 0)
        async with await connect(near.addresses.ingress) as visitor:
            assert (await ask(visitor, request())).startswith(b"HTTP/1.1 503")
        assert (far.passing.passed, near.passing.passed) == (1, 1)


async def test_a_later_request_of_a_connection_is_not_passed_on(tmp_path: Path) -> None:
    async with workers(tmp_path, answer_ok) as (_, far), await connect(far.addresses.ingress) as visitor:
        await visitor.send_all(request(host="nobody.test"))
        assert (await read_all(visitor)).startswith(b"HTTP/1.1 404")
        assert far.passing.passed == 0


async def test_a_worker_that_stops_serves_what_is_on_the_way(tmp_path: Path) -> None:
    async with workers(tmp_path, tell) as (near, far):
        visitors = [await connect(far.addresses.ingress) for _ in range(20)]
        for visitor in visitors:
            await visitor.send_all(request())
            await visitor.send_eof()
        async with trio.open_nursery() as nursery:
            # They wait in the channel when the other one begins to drain.
            await eventually(lambda: far.passing.passed)
            nursery.start_soon(near.relay.drain)
            for number, visitor in enumerate(visitors):
                own = Address.of_socket(visitor.socket.getsockname())
                answer = await read_all(visitor)
                assert answer.startswith(b"HTTP/1.1 503") or answer.decode() == told(own, request()), number
                await visitor.aclose()
            nursery.cancel_scope.cancel()
        async with await connect(far.addresses.ingress) as visitor:  # nobody takes it now
            assert (await ask(visitor, request())).startswith(b"HTTP/1.1 503")


@final
class PassedEarly(Passing):
    """Passes a visitor of a tunnel's own address as soon as the relay takes visitors of others."""

    def way(self, tunnel_id: str) -> None:
        """There is none."""

    def pass_visitor(self, *_: object, **__: object) -> bool:
        return False

    def pass_gateway(self, *_: object) -> bool:
        return False

    async def serve(
        self, take: Callable[[Passed], object], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        stream, accepted = await tcp_pair()
        async with stream:
            take(PASSED._replace(descriptor=accepted.detach(), stage=Stage.BOUND, tunnel="office"))
            task_status.started()
            await trio.sleep_forever()
        raise AssertionError


async def test_a_visitor_who_is_passed_to_a_worker_that_begins_reaches_its_tunnel() -> None:
    """The worker may have the session already: another one has passed the gateway, too."""
    relay = Relay(relay_config(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0")]), passing=PassedEarly())
    with no_hang():
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.serve)
            await eventually(lambda: relay.stats().refusals_total == {"gateway_away": 1})
            nursery.cancel_scope.cancel()


async def test_a_visitor_who_comes_before_the_relay_listens_everywhere_waits_for_a_gateway_that_comes_again() -> None:
    bound: dict[str, Any] = {"tunnels": [tunnel_entry(bind_addr="127.0.0.1:0")]}
    relay = Relay(relay_config(**bound), inherited=Inherited(connected=["office"]), passing=PassedEarly())
    with no_hang():
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.serve)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not relay.stats().refusals_total
            nursery.cancel_scope.cancel()


async def test_a_visitor_over_a_limit_of_the_other_worker_is_turned_away(tmp_path: Path) -> None:
    limits = {"connects_per_second_per_address": 0, "connections_per_address": 2, "exempt": []}  # one is the gateway
    async with workers(tmp_path, tell, limits=limits) as (near, far):
        async with await connect(far.addresses.ingress) as first:
            await first.send_all(upload())
            await eventually(lambda: near.relay.stats().connections.visitors_open)
            await eventually(lambda: not far.relay.stats().connections.open)
            async with await connect(far.addresses.ingress) as second:
                await second.send_all(request())
                with pytest.raises(trio.BrokenResourceError):
                    await read_all(second)
        assert near.relay.stats().refusals_total == {"connections_per_address": 1}


def come_at_once(worker: Worker, amount: int) -> list[socket.socket]:
    """Visitors that have sent their request before the worker accepts the first of them."""
    address = worker.addresses.ingress
    visitors = [socket.create_connection((address.host, address.port)) for _ in range(amount)]
    for visitor in visitors:
        visitor.sendall(request())
        visitor.shutdown(socket.SHUT_WR)
        visitor.setblocking(False)
    return visitors


async def answers_to(visitors: list[socket.socket]) -> list[str]:
    answers = []
    for visitor in visitors:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(visitor)) as stream:
            answers.append((await read_all(stream)).decode())
    return answers


async def test_visitors_that_come_at_once_are_passed_on_together(tmp_path: Path) -> None:
    """More of them than a message takes."""
    async with workers(tmp_path, tell) as (near, far):
        visitors = come_at_once(far, 2 * MOST_TOGETHER + 3)
        owns = [Address.of_socket(visitor.getsockname()) for visitor in visitors]
        assert await answers_to(visitors) == [told(own, request()) for own in owns]
        assert far.passing.passed == len(visitors)
        assert far.relay.stats().connections.accepted_total == 1 + len(visitors)
        assert near.relay.stats().connections.accepted_total == 1


async def test_visitors_whom_the_channel_does_not_take_arrive_where_they_are(tmp_path: Path) -> None:
    async with workers(tmp_path, tell) as (_, far):
        [channel] = far.passing._channels.values()
        assert channel.socket is not None
        channel.socket.shutdown(socket.SHUT_WR)
        for answer in await answers_to(come_at_once(far, 3)):
            assert answer.startswith("HTTP/1.1 503")
        stats = far.relay.stats()
        assert (far.passing.passed, stats.connections.accepted_total) == (0, 4)
        assert stats.refusals_total == {"gateway_away": 4}
        await eventually(lambda: far.relay.stats().connections.open == 0)


async def test_it_is_decided_once_where_a_visitor_goes(tmp_path: Path) -> None:
    async with workers(tmp_path, tell) as (near, far):
        for worker in (near, far):
            worker.asked.clear()
            [answer] = await answers_to(come_at_once(worker, 1))
            assert answer.startswith("127.0.0.1:")
            assert worker.asked == ["office"]
        assert (near.passing.passed, far.passing.passed) == (0, 1)


async def test_a_fault_in_passing_costs_the_visitor_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tunnel_id: str) -> NoReturn:
        raise LookupError("a bug")

    async with workers(tmp_path, tell) as (near, _):
        monkeypatch.setattr(near.passing, "_where", fail)
        visitors = come_at_once(near, 2)
        owns = [Address.of_socket(visitor.getsockname()) for visitor in visitors]
        assert await answers_to(visitors) == [told(own, request()) for own in owns]
    assert "a connection failed in an unforeseen way" in caplog.text


async def test_a_channel_that_broke_is_opened_again(tmp_path: Path) -> None:
    async with workers(tmp_path, tell) as (_, far):
        [broken] = far.passing._channels.values()
        assert broken.socket is not None
        broken.socket.shutdown(socket.SHUT_RDWR)
        await eventually(lambda: broken.is_over)
        await open_channel(far)
        await trio.testing.wait_all_tasks_blocked(0.01)
        [visitor] = come_at_once(far, 1)
        own = Address.of_socket(visitor.getsockname())
        assert await answers_to([visitor]) == [told(own, request())]
        assert far.passing.passed == 1


async def test_the_wrong_worker_is_no_way_around_the_rate_of_an_address(tmp_path: Path) -> None:
    limits = {"connects_per_second_per_address": 1, "exempt": []}  # a burst of 4
    async with workers(tmp_path, tell, limits=limits) as (near, far):
        visitors = come_at_once(far, 5)
        with pytest.raises(trio.BrokenResourceError):
            await answers_to(visitors[3:4])
        assert len(await answers_to(visitors[:3])) == far.passing.passed == 3
        with pytest.raises(trio.BrokenResourceError):
            await answers_to(visitors[4:])
        assert far.relay.stats().refusals_total["connects_per_second_per_address"] == 2
        assert "connects_per_second_per_address" not in near.relay.stats().refusals_total


async def test_a_visitor_who_is_passed_on_takes_no_place_from_others(tmp_path: Path) -> None:
    async with (
        workers(tmp_path, tell, limits={"pending": 1}) as (_, far),
        await connect(far.addresses.ingress) as silent,
    ):
        await eventually(lambda: far.relay.stats().connections.pending == 1)
        [answer] = await answers_to(come_at_once(far, 1))
        assert answer.startswith("127.0.0.1:")
        assert far.relay.stats().connections.evicted_total == 0
        assert (await ask(silent, request())).startswith(b"127.0.0.1:")


async def test_a_descriptor_that_is_no_socket_costs_the_others_of_its_message_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with workers(tmp_path, tell) as (near, far):
        [channel] = far.passing._channels.values()
        pairs = [await tcp_pair() for _ in range(2)]
        reading, writing = os.pipe()
        descriptors = [pairs[0][1].fileno(), reading, pairs[1][1].fileno()]
        passed = [PASSED._replace(descriptor=each, received=request()) for each in descriptors]
        assert channel._send(passed)
        os.close(reading)
        for visitor, accepted in pairs:
            accepted.close()
            assert (await read_all(visitor)).decode() == told(PASSED.peer, request())
            await visitor.aclose()
        with pytest.raises(BrokenPipeError):  # nobody has its other end
            os.write(writing, b"x")
        os.close(writing)
        assert "visitors that were passed on are lost: no connection: Socket operation on non-socket" in caplog.text
        await eventually(lambda: near.relay.stats().connections.visitors_open == 0)


async def tcp_pair() -> tuple[trio.SocketStream, socket.socket]:
    """A connection, whose first end has sent its end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stream = await trio.open_tcp_stream(*listening.getsockname())
        accepted, _ = listening.accept()
    await stream.send_eof()
    return stream, accepted
