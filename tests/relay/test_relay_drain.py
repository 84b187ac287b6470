"""A relay that stops in order, and one that hands over to its successor."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from raw_gateways import raw_gateway, status_of
from rig import (
    RelayRig,
    ask,
    connect,
    eventually,
    in_background,
    no_hang,
    read_all,
    read_exactly,
    read_until,
    relay_config,
    relay_rig,
    request,
    tunnel_entry,
)
from trio.testing import MockClock

from pioneer_tunnel import State, Tunnel, TunnelStream
from pioneer_tunnel._wire.messages import DRAINING
from pioneer_tunnel.relay import Relay
from pioneer_tunnel.relay.gateways.expected import HOLD, PATIENCE, Expected
from pioneer_tunnel.relay.inherited import Inherited
from pioneer_tunnel.websocket import WebSocket, WebSocketClosed
from pioneer_tunnel.yamux.frames import FrameType, GoAwayCode, encode_header

GO_AWAY = encode_header(FrameType.GO_AWAY, 0, 0, GoAwayCode.NORMAL)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


async def answer_all(stream: TunnelStream) -> None:
    """A server that answers each request, and keeps the connection."""
    async with stream:
        received = b""
        async for data in stream:
            received += data
            while b"\r\n\r\n" in received:
                _, _, received = received.partition(b"\r\n\r\n")
                await stream.send_all(ANSWER)


@asynccontextmanager
async def serving(tunnel: Tunnel, handler: Any = answer_all) -> AsyncIterator[None]:
    async def serve() -> None:
        await trio.serve_listeners(handler, [tunnel])

    await tunnel.wait_connected()
    async with in_background(serve):
        yield


@asynccontextmanager
async def a_rig(**changes: Any) -> AsyncIterator[RelayRig]:
    """A relay whose visitors are closed at the end."""
    visitors: list[trio.SocketStream] = []
    async with relay_rig(**changes) as rig:
        visit = rig.visit

        async def visit_and_note() -> trio.SocketStream:
            visitors.append(await visit())
            return visitors[-1]

        rig.visit = visit_and_note  # type: ignore[method-assign]
        try:
            yield rig
        finally:
            for visitor in visitors:
                await trio.aclose_forcefully(visitor)


async def heard(websocket: WebSocket) -> tuple[list[str | bytes], WebSocketClosed]:
    """All messages up to the close."""
    messages: list[str | bytes] = []
    with no_hang():
        while True:
            try:
                messages += [
                    message if isinstance(message, str) else bytes(message) for message in await websocket.receive()
                ]
            except WebSocketClosed as closed:
                return messages, closed


async def visited(rig: RelayRig, tunnel: Tunnel) -> tuple[trio.SocketStream, TunnelStream]:
    visitor = await rig.visit()
    await visitor.send_all(request())
    stream = await tunnel.accept()
    await read_exactly(stream, len(request()))
    return visitor, stream


# A relay that stops


async def test_without_visitors_it_ends_at_once() -> None:
    async with a_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        with no_hang():
            await rig.relay.drain()
        with no_hang():
            await eventually(lambda: tunnel.status.state is State.RECONNECTING)
        with pytest.raises(ConnectionRefusedError):
            await rig.visit()
        await rig.relay.drain()  # once more changes nothing


async def test_visitors_finish() -> None:
    async with a_rig() as rig, rig.tunnel() as tunnel, trio.open_nursery() as nursery:
        await tunnel.wait_connected()
        visitor, stream = await visited(rig, tunnel)
        nursery.start_soon(rig.relay.drain)
        await eventually(lambda: (tunnel.status.attempt or 0) > 1)  # it was asked for another session
        with no_hang():
            await stream.send_all(ANSWER[:-2])
            await read_exactly(visitor, len(ANSWER) - 2)
            await stream.send_all(ANSWER[-2:])
            assert await read_all(visitor) == b"hi"
            await stream.aclose()


async def test_visitors_who_are_left_are_reset() -> None:
    async with a_rig(drain_timeout_ms=100) as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        visitor, stream = await visited(rig, tunnel)
        await stream.send_all(ANSWER[:-1])
        with no_hang():
            await rig.relay.drain()
            with pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)


async def test_idle_connections_are_closed_and_requests_are_answered() -> None:
    async with a_rig() as rig, rig.tunnel() as tunnel, serving(tunnel):
        idle, early, silent = await rig.visit(), await rig.visit(), await rig.visit()
        await idle.send_all(request())
        assert await read_exactly(idle, len(ANSWER)) == ANSWER
        await early.send_all(request()[:20])  # connected, and nobody knows what for
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with in_background(rig.relay.drain):
            with no_hang():
                assert await read_all(idle) == b""
                with pytest.raises(ConnectionRefusedError):
                    await rig.visit()
                await early.send_all(request()[20:])
                assert await read_all(early) == ANSWER
                assert await ask(silent, request()) == ANSWER
        with no_hang():
            await rig.relay.drain()


async def test_a_connection_is_closed_after_the_response_under_way() -> None:
    async with a_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        visitor, stream = await visited(rig, tunnel)
        async with in_background(rig.relay.drain):
            await eventually(lambda: (tunnel.status.attempt or 0) > 1)
            await stream.send_all(ANSWER)
            with no_hang():
                assert await read_all(visitor) == ANSWER


async def test_a_gateway_is_asked_for_another_session_and_then_told_to_go_away() -> None:
    async with a_rig() as rig, raw_gateway(rig, choices={DRAINING: lambda _: {}}) as (websocket, _):
        silent = await rig.visit()
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with in_background(rig.relay.drain):
            with no_hang():
                assert await websocket.receive() == ['{"type":"draining","reconnect_within_ms":5}']
            await silent.aclose()  # nobody is left who may want a stream
            messages, closed = await heard(websocket)
            assert any(GO_AWAY in message for message in messages if not isinstance(message, str))
            assert (closed.code, closed.reason) == (1001, "the relay is stopping")


async def test_a_gateway_that_cannot_drain_gets_two_seconds() -> None:
    """It redials when its link is closed. The successor holds its visitors for five seconds."""
    async with a_rig() as rig, raw_gateway(rig) as (websocket, _):
        visitor = await rig.visit()
        await visitor.send_all(request())
        began = trio.current_time()
        async with in_background(rig.relay.drain):
            messages, closed = await heard(websocket)
            assert not any(isinstance(message, str) for message in messages)
            assert closed.code == 1001
            assert trio.current_time() - began >= 1.9


async def test_a_gateway_that_connects_while_the_relay_drains_is_asked_too() -> None:
    async with a_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        _, stream = await visited(rig, tunnel)
        connecting = await connect(rig.addresses.control)
        await trio.testing.wait_all_tasks_blocked(0.01)

        async def dial(host: str, port: int) -> trio.SocketStream:
            return connecting

        async with in_background(rig.relay.drain), rig.tunnel(dial=dial) as late:
            await eventually(lambda: (late.status.attempt or 0) > 1)
        await stream.aclose()


async def test_a_gateway_that_resumes_while_the_relay_drains_is_asked_again() -> None:
    """It was asked while it had no connection, and could not hear it."""
    connecting = trio.Event()
    links: list[trio.SocketStream] = []

    async def dial(host: str, port: int) -> trio.SocketStream:
        if links:
            await connecting.wait()
        return links.pop() if links else await connect(rig.addresses.control)

    async with a_rig() as rig, rig.tunnel(dial=dial) as tunnel:
        await tunnel.wait_connected()
        visitor, stream = await visited(rig, tunnel)
        links.append(await connect(rig.addresses.control))
        await trio.testing.wait_all_tasks_blocked(0.01)
        [session] = rig.relay._gateways._sessions
        session._link.lose_connection(trio.BrokenResourceError("cut by the test"))
        await eventually(lambda: tunnel.status.state is State.RECONNECTING)
        async with in_background(rig.relay.drain):
            await eventually(lambda: session.draining)
            await trio.testing.wait_all_tasks_blocked(0.01)
            connecting.set()
            await eventually(lambda: (tunnel.status.attempt or 0) > 1)
            await stream.send_all(ANSWER)
            assert await read_until(visitor, b"hi") == ANSWER
            await stream.aclose()


async def test_a_relay_that_drains_does_not_wait_for_a_gateway_that_cannot_come_back() -> None:
    async with a_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        visitor, _ = await visited(rig, tunnel)
        [session] = rig.relay._gateways._sessions
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.relay.drain)
            await eventually(session._finishing.is_set)
            session._link.lose_connection(trio.BrokenResourceError("cut by the test"))
            with trio.fail_after(20):  # `resume_timeout_ms` and `drain_timeout_ms` are longer
                assert status_of(await read_all(visitor)) == 502


async def test_a_key_that_is_removed_while_the_relay_drains_ends_its_session() -> None:
    async with a_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        visitor, _ = await visited(rig, tunnel)
        async with in_background(rig.relay.drain):
            await eventually(lambda: (tunnel.status.attempt or 0) > 1)
            entry = tunnel_entry(id="another", url="http://another.test", bind_addr="127.0.0.1:0")
            await rig.apply(tunnels=relay_config(tunnels=[entry]).tunnels)
            assert rig.addresses.tunnels == {}  # it does not listen any more
            with no_hang():
                assert status_of(await read_all(visitor)) == 502


# A successor


def passed_on(relay: Relay) -> Inherited:
    """What a successor gets, in the same process."""
    handover = relay.handover()
    return Inherited(
        {
            name: [socket.socket(fileno=os.dup(descriptor)) for descriptor in descriptors]
            for name, descriptors in handover.descriptors.items()
        },
        connected=handover.connected,
    )


async def test_a_successor_takes_over_and_the_tunnel_stays_connected() -> None:
    async with a_rig() as rig, rig.tunnel() as tunnel, serving(tunnel), trio.open_nursery() as nursery:
        kept = await rig.visit()
        await kept.send_all(request(f"Content-Length: {2}"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        waiting = await rig.visit()  # connected, perhaps not accepted
        successor = Relay(rig.config, inherited=passed_on(rig.relay))
        addresses = await nursery.start(successor.serve)
        assert addresses == rig.addresses
        nursery.start_soon(rig.relay.drain)
        with no_hang():
            for _ in range(20):
                assert await ask(await rig.visit(), request("Connection: close")) == ANSWER
            assert await ask(waiting, request()) == ANSWER
            await kept.send_all(b"ab")
            assert await read_until(kept, b"hi") == ANSWER
            assert await read_all(kept) == b""  # the old process closes what is idle
        await eventually(lambda: (tunnel.status.attempt or 0) > 1)
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}
        await rig.relay.drain()
        await successor.drain()


async def test_a_visitor_of_a_successor_waits_for_the_gateway() -> None:
    inherited = Inherited(connected=["office"])
    relay = Relay(relay_config(), inherited=inherited)
    async with trio.open_nursery() as nursery:
        rig = RelayRig(nursery, relay_config(), None)
        rig.addresses = await nursery.start(relay.serve)
        visitor = await rig.visit()
        await visitor.send_all(request())
        await trio.sleep(0.1)
        async with rig.tunnel() as tunnel, serving(tunnel):
            with no_hang():
                assert await read_exactly(visitor, len(ANSWER)) == ANSWER
        await visitor.aclose()
        nursery.cancel_scope.cancel()


async def test_other_tunnels_are_not_waited_for() -> None:
    relay = Relay(relay_config(), inherited=Inherited(connected=["another"]))
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(relay.serve)
        with trio.fail_after(HOLD - 1):
            async with await connect(addresses.ingress) as visitor:
                assert status_of(await ask(visitor, request())) == 503
        nursery.cancel_scope.cancel()


async def test_a_gateway_is_expected_for_some_seconds(autojump_clock: MockClock) -> None:
    expected = Expected(["office", "lab"])
    expected.begin()
    began = trio.current_time()
    await expected.wait("another")
    assert trio.current_time() == began
    await expected.wait("office")
    assert trio.current_time() == began + HOLD
    assert {*expected.missing} == {"office", "lab"}
    expected.has_come("lab")
    expected.has_come("another")
    await expected.wait("lab")
    assert {*expected.missing} == {"office"}
    await trio.sleep_until(began + PATIENCE - 1)
    await expected.wait("office")
    assert trio.current_time() == began + PATIENCE
    await expected.wait("office")
    assert trio.current_time() == began + PATIENCE
    assert {*expected.missing} == set()


async def test_sockets_that_the_configuration_does_not_name_are_closed(caplog: pytest.LogCaptureFixture) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    name = f"127.0.0.1:{listening.getsockname()[1]}"
    relay = Relay(relay_config(), inherited=Inherited({name: [listening]}))
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.serve)
        assert f"nothing listens at {name} any more" in caplog.text
        assert listening.fileno() == -1
        nursery.cancel_scope.cancel()


async def test_a_socket_that_does_not_listen_is_refused() -> None:
    with socket.socket() as useless:
        useless.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{useless.getsockname()[1]}"
        relay = Relay(relay_config(control_addr=address), inherited=Inherited({address: [useless]}))
        with pytest.raises(OSError, match="the socket that was passed"):
            await relay.serve()
