"""The limits of a relay, in a real relay."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

import pytest
import trio
import trio.testing
from admissions import limits
from hostile import PING, TEXT, GatewayOfBytes, frame
from raw_gateways import accept
from rig import (
    KEY,
    RELAY_NAME,
    RelayRig,
    ask,
    connect,
    echo,
    eventually,
    in_background,
    no_hang,
    nothing_left_behind,
    open_sockets,
    read_all,
    read_exactly,
    read_until,
    relay_rig,
    request,
    tunnel_entry,
    upload,
)

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.exception_groups import leaves
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import State
from pioneer_tunnel._net.descriptor_limit import descriptor_limit
from pioneer_tunnel._net.log_limiter import LINES_IN_FULL
from pioneer_tunnel._wire.handshake import AGENT, SUBPROTOCOL, GatewayHandshake
from pioneer_tunnel.relay import accept_loop as accepting
from pioneer_tunnel.relay.accept_loop import AcceptLoop
from pioneer_tunnel.relay.admission import Admission
from pioneer_tunnel.relay.connection import Connection
from pioneer_tunnel.relay.listeners import open_listeners
from pioneer_tunnel.testing import open_memory_relay
from pioneer_tunnel.tunnel.tunnel import Tunnel
from pioneer_tunnel.websocket import ENGINES, EngineName, Opening, load_engine


@asynccontextmanager
async def limited(**values: Any) -> AsyncIterator[tuple[RelayRig, Tunnel]]:
    """A relay with these limits, and a gateway behind it that echoes, which counts as one connection."""
    async with relay_rig(limits=limits(**values)) as rig, rig.tunnel() as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])):
            yield rig, tunnel


async def visitor_is_served(rig: RelayRig) -> None:
    with no_hang():
        async with await rig.visit() as visitor:
            assert await ask(visitor, request()) == request()


async def is_served(rig: RelayRig) -> bool:
    """Whether a visitor is served now. The relay may have to notice first that another one has left."""
    try:
        async with await rig.visit() as visitor:
            return await ask(visitor, request()) == request()
    except (OSError, trio.BrokenResourceError):
        return False


async def is_reset(stream: trio.SocketStream) -> None:
    with no_hang(), pytest.raises(trio.BrokenResourceError):
        await read_all(stream)


async def is_turned_away(address: Address) -> None:
    """It may be reset before it knows that it is connected."""
    with suppress(OSError):
        async with await connect(address) as visitor:
            await is_reset(visitor)


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\nHost: off"])
async def test_visitors_get_through_while_others_never_come_to_the_point(begin: bytes) -> None:
    """Slowloris at both listeners: there are never more than may pend, and the oldest are evicted."""
    with nothing_left_behind():
        async with limited(pending=20, pending_per_address=0, connects_per_second_per_address=0) as (rig, _):
            before = len(open_sockets())
            with ExitStack() as stack:
                for number in range(300):
                    address = rig.addresses.ingress if number % 2 else rig.addresses.control
                    slow = await connect(address)
                    stack.callback(slow.socket.close)
                    if begin:
                        await slow.send_all(begin)
                    if number == 0:
                        first = slow
                    if not number % 50:
                        await visitor_is_served(rig)
                await is_reset(first)
                await eventually(lambda: len(open_sockets()) <= before + 300 + 20)
                await visitor_is_served(rig)


OPENING: Final = request(
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    f"Sec-WebSocket-Protocol: {SUBPROTOCOL}",
    host=RELAY_NAME,
)


async def test_a_gateway_that_was_challenged_pends_until_it_has_proved_itself() -> None:
    async with limited(pending=3, pending_per_address=0) as (rig, tunnel):
        challenged = []
        for _ in range(6):
            challenged.append(await connect(rig.addresses.control))
            await challenged[-1].send_all(OPENING)
            received = b""
            while b"challenge" not in received:
                received += await challenged[-1].receive_some()
        for gateway in challenged[:3]:
            await is_reset(gateway)
        await visitor_is_served(rig)
        assert tunnel.status.state is State.CONNECTED
        for gateway in challenged:
            await gateway.aclose()


async def test_a_stranger_makes_the_relay_hold_little(engine: EngineName) -> None:
    """A message may have 1 MiB, but only after the gateway's proof."""
    async with relay_rig(engine) as rig, await connect(rig.addresses.control) as stranger:
        await stranger.send_all(OPENING)
        await stranger.send_all(b"\x82\xff" + (1024 * 1024).to_bytes(8, "big") + bytes(4))  # its length and its mask

        async def go_on() -> None:
            await stranger.send_all(bytes(512 * 1024))
            await read_all(stranger)

        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await go_on()


async def test_an_address_has_so_many_connections_and_no_more() -> None:
    async with limited(connections_per_address=4) as (rig, tunnel):  # one of them is the gateway's
        visitors = []
        for _ in range(3):
            visitors.append(await rig.visit())
            await visitors[-1].send_all(request())
            await read_exactly(visitors[-1], len(request()))
        await is_turned_away(rig.addresses.ingress)
        await visitors.pop().aclose()
        await eventually(partial(is_served, rig))
        for visitor in visitors:
            await visitor.aclose()
        assert tunnel.status.state is State.CONNECTED


@pytest.mark.parametrize("listeners", ["two listeners", "one listener"])
async def test_at_a_full_limit_a_gateway_comes_back(listeners: str) -> None:
    other = RelayKey("ptk1_the-key-of-another-tunnel-012345")
    tunnels = [tunnel_entry(), tunnel_entry(id="home", url="http://home.test", key=str(other.identity().public_key))]
    one_address: dict[str, Any] = (
        {} if listeners == "two listeners" else {"control_addr": "localhost:0", "ingress_addr": "localhost:0"}
    )
    full = limits(connections=16, connects_per_second_per_address=0, streams_per_tunnel=0)
    async with relay_rig(tunnels=tunnels, limits=full, **one_address) as rig, rig.tunnel() as office:
        with no_hang():
            await office.wait_connected()
            async with in_background(lambda: trio.serve_listeners(echo, [office])), trio.open_nursery() as nursery:
                visitors = []
                for _ in range(14):
                    visitors.append(await rig.visit())
                    await visitors[-1].send_all(upload())
                    await read_exactly(visitors[-1], len(upload()))
                if listeners == "two listeners":
                    await is_turned_away(rig.addresses.ingress)
                else:
                    async with await rig.visit() as visitor:
                        assert (await ask(visitor, request())).startswith(b"HTTP/1.1 503 ")
                for _ in range(3):
                    async with rig.tunnel(key=other) as home:
                        await home.wait_connected()
                assert office.status.state is State.CONNECTED
                for visitor in visitors:
                    nursery.start_soon(visitor.aclose)


async def test_who_connects_too_often_is_reset(mock_clock: trio.testing.MockClock) -> None:
    """By a clock that stands still, or the machine might take the second that earns another connection."""
    async with limited(connects_per_second_per_address=1) as (rig, _):
        for _ in range(3):  # and the gateway
            await visitor_is_served(rig)
        await is_turned_away(rig.addresses.ingress)


async def test_a_tunnel_with_enough_visitors_is_503() -> None:
    async with limited(streams_per_tunnel=1) as (rig, _), await rig.visit() as first:
        await first.send_all(request())
        await read_exactly(first, len(request()))
        async with await rig.visit() as second:
            assert (await ask(second, request())).startswith(b"HTTP/1.1 503 ")
        await first.send_eof()
        assert await read_all(first) == b""
        await eventually(partial(is_served, rig))


async def test_a_tunnel_of_its_own_address_with_enough_visitors_resets() -> None:
    tunnels = [tunnel_entry(bind_addr="127.0.0.1:0")]
    async with relay_rig(limits=limits(streams_per_tunnel=1), tunnels=tunnels) as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        async with await connect(rig.addresses.tunnels["office"]), await tunnel.accept():
            await is_turned_away(rig.addresses.tunnels["office"])


def never_comes(_connection: Connection) -> None:
    raise AssertionError("nobody has connected")


async def test_a_system_without_descriptors_is_asked_again_and_complained_of_seldom(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """`trio.serve_listeners` logs a traceback ten times a second."""
    asked_at: list[float] = []

    class Exhausted(trio.abc.Listener[trio.SocketStream]):
        async def accept(self) -> trio.SocketStream:
            await trio.lowlevel.checkpoint()
            asked_at.append(trio.current_time())
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(150):
            await AcceptLoop(Admission(limits())).serve([Exhausted()], never_comes, nursery)  # type: ignore[list-item]
    assert len(asked_at) == pytest.approx(150 / accepting.ACCEPT_RETRY, abs=10)
    assert len(caplog.records) == LINES_IN_FULL + 2
    assert "599 more" in caplog.text or "600 more" in caplog.text


async def test_an_accept_is_repeated_unless_the_listener_is_broken(autojump_clock: trio.testing.MockClock) -> None:
    failures = [errno.ECONNABORTED, errno.ENFILE, errno.EPROTO]

    async def accept() -> str:
        await trio.lowlevel.checkpoint()
        if failures:
            raise OSError(failures.pop(), "no")
        return "accepted"

    assert await accepting.accept_next(accept) == "accepted"
    failures.append(errno.EBADF)
    with pytest.raises(OSError, match="no"):
        await accepting.accept_next(accept)


async def test_a_listener_that_is_broken_is_an_error() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener.socket.close()
    with pytest.raises(ExceptionGroup) as raised:
        async with trio.open_nursery() as nursery:
            await AcceptLoop(Admission(limits())).serve([listener], never_comes, nursery)
    (error,) = leaves(raised.value)
    assert isinstance(error, trio.ClosedResourceError)


async def test_sockets_that_have_a_timeout_by_default_block_nobody() -> None:
    """A program that has the relay in it may have said so to Python."""
    (listener,) = await open_listeners(Address("127.0.0.1", 0))
    address = Address.of_socket(listener.socket.getsockname())
    connections: list[Connection] = []
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(8)
    try:
        with trio.fail_after(6):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(AcceptLoop(Admission(limits())).serve, [listener], connections.append, nursery)
                async with await connect(address):
                    await eventually(lambda: connections)
                    connections[0].close()
                nursery.cancel_scope.cancel()
    finally:
        socket.setdefaulttimeout(before)


async def test_a_connection_has_the_options_that_it_needs() -> None:
    """Where the event loop accepts, it inherits them from the listener."""
    (listener,) = await open_listeners(Address("127.0.0.1", 0))
    address = Address.of_socket(listener.socket.getsockname())
    connections: list[Connection] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(AcceptLoop(Admission(limits())).serve, [listener], connections.append, nursery)
        async with await connect(address):
            await eventually(lambda: connections)
            (connection,) = connections
            accepted = connection.stream.lowest_socket
            assert accepted is not None
            tcp = socket.IPPROTO_TCP
            assert accepted.socket.getsockopt(tcp, socket.TCP_NODELAY)
            assert accepted.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert accepted.socket.getsockopt(tcp, socket.TCP_KEEPIDLE) == accepting.KEEPALIVE_IDLE
                assert accepted.socket.getsockopt(tcp, socket.TCP_KEEPINTVL) == accepting.KEEPALIVE_INTERVAL
            assert connection.local == address
            connection.close()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_gateway_that_leaves_in_its_opening_is_no_fault_of_the_relay(
    engine: EngineName, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    upgrade = (
        "GET / HTTP/1.1\r\nHost: relay.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
    )
    for steps in range(30):
        async with open_memory_relay(engine=engine) as relay:
            stream = await relay.dial("relay.test", 80)
            await stream.send_all(upgrade.encode())
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            await trio.aclose_forcefully(stream)
            await trio.sleep(1)
    assert "unforeseen" not in caplog.text


async def test_a_handler_that_fails_costs_its_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    (listener,) = await open_listeners(Address("127.0.0.1", 0))
    address = Address.of_socket(listener.socket.getsockname())

    async def fail_at_the_first(connected: trio.abc.Stream) -> None:
        if await connected.receive_some(1) == b"1":
            raise RuntimeError("a bug")
        await connected.send_all(b"served")
        await connected.aclose()

    def serve(connection: Connection) -> None:
        connection.start(fail_at_the_first, connection.stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(AcceptLoop(Admission(limits())).serve, [listener], serve, nursery)
        with no_hang():
            async with await connect(address) as first:
                await first.send_all(b"1")
                with pytest.raises(trio.BrokenResourceError):
                    await read_all(first)
            async with await connect(address) as second:
                await second.send_all(b"2")
                assert await read_all(second) == b"served"
        nursery.cancel_scope.cancel()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "unforeseen" in record.getMessage()


async def test_a_stranger_may_say_little_before_its_proof(engine: EngineName) -> None:
    async with relay_rig(engine) as rig:
        with no_hang():
            async with await connect(rig.addresses.control) as stranger:
                await stranger.send_all(OPENING + frame(PING, masked=True) * 17)
                with suppress(trio.BrokenResourceError):
                    await read_all(stranger)
            async with await connect(rig.addresses.control) as stranger:
                await stranger.send_all(OPENING)
                await read_until(stranger, b"challenge")
                await stranger.send_all(frame(TEXT, b'{"type":"weather"}', masked=True) * 5)
                await read_until(stranger, (1002).to_bytes(2) + b"more than 4 texts")


async def test_what_deployed_gateways_and_proxies_send_before_the_proof_is_taken(engine: EngineName) -> None:
    """A large proof, texts of unknown type before it, and pings of a proxy on the way."""
    async with relay_rig(engine) as rig, await connect(rig.addresses.control) as stream:
        gateway = GatewayOfBytes(stream)
        extra = frame(PING, b"proxy", masked=True) * 6 + frame(TEXT, b'{"type":"weather"}', masked=True) * 3
        with no_hang():
            await gateway.open(b"X-Forwarded-For: " + b"203.0.113.7, " * 200 + b"203.0.113.8\r\n", before_proof=extra)
            for _ in range(100):  # proved: nothing is counted any more
                await gateway.say(frame(PING, b"!", masked=True))


async def test_a_relay_says_when_descriptors_are_few(caplog: pytest.LogCaptureFixture) -> None:
    most = descriptor_limit()
    assert most is not None
    async with relay_rig(limits=limits(connections=most)):
        pass
    assert "ulimit -n" in caplog.text


# The log


async def test_nothing_that_others_say_forges_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    evil = "a\r\n2026-01-01 INFO forged\x1b[31m\u202e\x00\u2028"
    async with relay_rig(limits=limits(failed_auth_delay_ms=0)) as rig:
        for host in (b"no\rbody.test", b"nobody\x1b[31m.test", b"nobody.test\x00", b"xn--\xff.test"):
            async with await rig.visit() as visitor:
                await ask(visitor, b"GET /\x1b HTTP/1.1\r\nHost: %s\r\n\r\n" % host)
        for changes in ({"agent": evil}, {"key_id": evil}, {"service": evil}, {"instance": evil}, {"audience": evil}):
            await open_by_hand(rig, changes)
        for first in (b"\x16\x03\x01forged\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: \x1bforged\r\n\r\n"):
            async with await connect(rig.addresses.control) as stranger:
                await ask(stranger, first)
    assert any("is connected" in record.getMessage() for record in caplog.records)
    assert any("was rejected" in record.getMessage() for record in caplog.records)
    for record in caplog.records:
        if record.name.startswith("pioneer_tunnel"):
            assert record.getMessage().isprintable(), record.getMessage()


async def open_by_hand(rig: RelayRig, changes: dict[str, str]) -> None:
    """An opening that proves KEY, with these changes of its claim."""
    fields: dict[str, Any] = {"audience": RELAY_NAME, "service": "any", "instance": "x"}
    fields |= {name: value for name, value in changes.items() if name in fields}
    opening = GatewayHandshake(KEY.identity(), **fields)
    address = RelayAddress.parse(f"ws://{RELAY_NAME}")
    stream = await connect(rig.addresses.control)
    wanted = Opening(subprotocol=SUBPROTOCOL, address=address, agent=AGENT)
    with no_hang(), suppress(trio.BrokenResourceError):
        async with load_engine().connect(stream, wanted) as websocket:
            (challenge,) = await websocket.receive()
            assert isinstance(challenge, str)
            answer = opening.receive(challenge)
            assert isinstance(answer, str)
            await websocket.send([json.dumps(json.loads(answer) | changes)])
            await websocket.receive()
            await accept(websocket)
