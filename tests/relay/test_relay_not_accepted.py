"""Visitors whose stream the gateway does not accept: on a dead link, behind a gateway that hangs, on a slow link."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, final

import pytest
import trio
import trio.testing
from raw_gateways import Overwhelmed, status_of
from rig import ask, request, tunnel_entry
from yamux_rig import Running, pipe

from pioneer_tunnel.relay import TunnelEntry
from pioneer_tunnel.relay.gateways.registry import LocalDirectory, LocalRegistry
from pioneer_tunnel.relay.visitors.ingress import Ingress
from pioneer_tunnel.relay.visitors.visit import Visit
from pioneer_tunnel.testing.memory_stream import MemoryConnection
from pioneer_tunnel.yamux import Role, YamuxConnection, YamuxStream
from pioneer_tunnel.yamux.frames import ACK, SYN, FrameDecoder, FrameType, Header, encode_header


@final
class Silent(Overwhelmed):
    """A gateway at the other end of a link, which accepts no stream; the link is the test's."""

    def __init__(self, connection: YamuxConnection) -> None:
        self._connection: Final = connection

    async def open_stream(self) -> YamuxStream:
        return await self._connection.open_stream()


@asynccontextmanager
async def silent_gateway(**options: Any) -> AsyncIterator[tuple[Ingress, trio.abc.Stream, Running]]:
    """The visitors' side of a relay, and the gateway's end of a link in memory."""
    near, far = pipe()
    running = Running(near, Role.CLIENT, on_stream=None, **options)
    directory = LocalDirectory()
    await directory.enter("office", Silent(running.connection))
    ingress = Ingress(LocalRegistry([TunnelEntry(**tunnel_entry())]), directory)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.run)
        yield ingress, far, running
        nursery.cancel_scope.cancel()


async def pong(gateway: trio.abc.Stream) -> None:
    """Answer pings, and nothing else."""
    decoder = FrameDecoder()
    while data := await gateway.receive_some():
        for item in decoder.receive_data(data):
            if isinstance(item, Header) and item.type == FrameType.PING and item.flags == SYN:
                await gateway.send_all(encode_header(FrameType.PING, ACK, 0, item.length))


@pytest.mark.parametrize("answers_pings", [True, False])
@pytest.mark.parametrize("upload", [b"", bytes(1024 * 1024)], ids=["no body", "a body that fills the queues"])
async def test_a_gateway_that_does_not_accept_the_stream_is_504(
    answers_pings: bool, upload: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    """The link may be dead, which the heartbeat notices much later; or the gateway may hang."""
    async with silent_gateway(heartbeat=60.0) as (ingress, gateway, running), trio.open_nursery() as nursery:
        if answers_pings:
            nursery.start_soon(pong, gateway)
        visitor, stream = trio.testing.memory_stream_pair()
        visit = Visit(stream=stream, visitor=None, local=None, tls=False)
        nursery.start_soon(ingress.serve, visit)
        head = request(f"Content-Length: {len(upload)}") if upload else request()
        answer = await ask(visitor, head + upload)
        assert status_of(answer) == 504
        assert 10 <= trio.current_time() <= 12
        assert not running.ended.is_set()
        nursery.cancel_scope.cancel()


async def test_a_slow_link_on_which_bytes_move_is_no_504(autojump_clock: trio.testing.MockClock) -> None:
    """Another stream's bytes come all the time; the pong and the answer are behind them."""
    async with silent_gateway(heartbeat=15.0) as (ingress, gateway, _), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def trickle() -> None:
            decoder, begun = FrameDecoder(), trio.current_time()
            while True:
                await gateway.send_all(encode_header(FrameType.PING, SYN, 0, 1))
                with trio.move_on_after(1.0):
                    for _ in decoder.receive_data(await gateway.receive_some()):
                        pass
                    await trio.sleep_forever()
                if trio.current_time() - begun > 40:
                    response = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
                    await gateway.send_all(encode_header(FrameType.DATA, ACK, 1, len(response)) + response)
                    return

        visitor, stream = trio.testing.memory_stream_pair()
        nursery.start_soon(ingress.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        await visitor.send_all(request())
        assert (await visitor.receive_some()).startswith(b"HTTP/1.1 200")
        assert trio.current_time() > 40
        nursery.cancel_scope.cancel()


async def test_where_it_is_not_http_a_stream_that_is_not_accepted_is_a_reset(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with silent_gateway(heartbeat=60.0) as (ingress, _, _), trio.open_nursery() as nursery:
        connection = MemoryConnection()
        visitor, stream = connection.client, connection.server
        entry = TunnelEntry(**tunnel_entry(bind_addr="127.0.0.1:2222"))
        nursery.start_soon(
            ingress.serve_bound, Visit(stream=stream, visitor=None, local=None, tls=False), entry.routes[0]
        )
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
        assert 10 <= trio.current_time() <= 12
        nursery.cancel_scope.cancel()
