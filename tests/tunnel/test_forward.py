"""`forward`: a visitor's stream meets the local gateway, and neither takes a part for the whole."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, final

import pytest
import trio
import trio.testing
from fast_path import fast_path  # noqa: F401  # runs each test twice
from rig import carried, no_hang, nothing_left_behind, read_all, read_exactly, run_until_it_waits

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.transports.interface import Event, LocalDialFailed, LocalDialOk
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.forward import forward

HEADER: Final = ProxyHeader(visitor=Address("203.0.113.7", 4711), local=Address("192.0.2.1", 443), tls=True)


@final
class Carried(trio.abc.HalfCloseableStream):
    """What a transport would carry a visitor by: a socket that can be reset."""

    usable = True

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = watch(stream)
        self._socket = stream
        self.resets = 0

    def acknowledge(self) -> None:
        pass

    def reset(self) -> None:
        self.resets += 1
        if self._socket.socket.fileno() != -1:
            self._socket.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
            self._socket.socket.close()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def make_visitor(prefix: bytes = b"") -> tuple[trio.SocketStream, TunnelStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        visitor = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return visitor, TunnelStream(Carried(await listener.accept()), HEADER, prefix)


@asynccontextmanager
async def forwarding(
    prefix: bytes = b"", **changes: Any
) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream, trio.CancelScope]]:
    """A visitor, the connection that the local gateway gets, and what cancels the forwarding."""
    visitor, stream = await make_visitor(prefix)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    local = Address("127.0.0.1", listener.socket.getsockname()[1])
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            await forward(stream, local, **changes)

    with nothing_left_behind(), no_hang():
        async with listener, visitor, trio.open_nursery() as nursery:
            nursery.start_soon(run)
            async with await listener.accept() as gateway:
                yield visitor, gateway, scope


async def test_bytes_and_half_closes_pass_both_ways() -> None:
    events: list[Event] = []
    async with forwarding(report=events.append) as (visitor, gateway, _):
        await visitor.send_all(b"question")
        await visitor.send_eof()
        assert await read_all(gateway) == b"question"
        assert await carried(gateway, visitor, bytes(1_000_000)) == bytes(1_000_000)
    assert events == [LocalDialOk()]


async def test_the_header_is_stripped_unless_it_is_asked_for() -> None:
    async with forwarding(b"first ") as (visitor, gateway, _):
        await visitor.send_all(b"then")
        await visitor.send_eof()
        assert await read_all(gateway) == b"first then"


async def test_the_header_is_passed_on_when_it_is_asked_for() -> None:
    async with forwarding(b"first ", proxy_protocol="v2") as (visitor, gateway, _):
        await visitor.send_all(b"then")
        await visitor.send_eof()
        assert await read_all(gateway) == HEADER.encode() + b"first then"


async def test_a_reset_on_either_side_is_a_reset_on_the_other() -> None:
    for visitor_resets in (True, False):
        async with forwarding() as (visitor, gateway, _):
            one, other = (visitor, gateway) if visitor_resets else (gateway, visitor)
            await one.send_all(b"part")
            await read_exactly(other, 4)
            await abandon(one)
            with pytest.raises(trio.BrokenResourceError):
                await read_all(other)


async def test_cancelled_it_resets_both() -> None:
    """Of the two the local connection was left open, and its socket behind."""
    async with forwarding() as (visitor, gateway, scope):
        await gateway.send_all(b"half")
        await read_exactly(visitor, 4)
        scope.cancel()
        for stream in (visitor, gateway):
            with pytest.raises(trio.BrokenResourceError):
                await read_all(stream)


async def test_a_gateway_that_is_down_resets_the_visitor_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def dial(host: str, port: int) -> trio.abc.Stream:
        raise ConnectionRefusedError(111, "Connection refused")

    events: list[Event] = []
    visitor, stream = await make_visitor()
    with caplog.at_level(logging.WARNING):
        await forward(stream, Address("127.0.0.1", 17878), report=events.append, dial=dial)
    async with visitor:
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
    (event,) = events
    assert isinstance(event, LocalDialFailed)
    assert "127.0.0.1:17878" in event.message
    assert "Connection refused" in caplog.text


async def test_a_gateway_that_does_not_answer_is_given_ten_seconds(autojump_clock: trio.testing.MockClock) -> None:
    async def dial(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    visitor, stream = await make_visitor()
    await forward(stream, Address("127.0.0.1", 1), dial=dial)
    assert trio.current_time() == pytest.approx(10)
    async with visitor:
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()


async def test_cancelled_while_it_dials_it_resets_the_visitor() -> None:
    async def dial(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    visitor, stream = await make_visitor()
    await run_until_it_waits(lambda: forward(stream, Address("127.0.0.1", 1), dial=dial))
    async with visitor:
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()


async def test_a_gateway_that_breaks_off_at_the_header_is_no_crash() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.aclose()

    async def dial(host: str, port: int) -> trio.abc.Stream:
        return ours

    visitor, stream = await make_visitor()
    async with visitor:
        await visitor.send_eof()
        await forward(stream, Address("127.0.0.1", 1), proxy_protocol="v2", dial=dial)


async def test_cancelled_while_it_sends_the_header_it_resets_both() -> None:
    visitor, stream = await make_visitor()
    ours, gateway = trio.testing.memory_stream_pair()
    ours.send_stream.send_all_hook = trio.sleep_forever

    async def dial(host: str, port: int) -> trio.abc.Stream:
        return ours

    async with visitor:
        await run_until_it_waits(
            functools.partial(forward, stream, Address("127.0.0.1", 1), proxy_protocol="v2", dial=dial)
        )
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
    with pytest.raises(trio.ClosedResourceError):
        await ours.receive_some()
    assert await gateway.receive_some() == HEADER.encode()


async def test_it_is_a_handler_for_serve_listeners() -> None:
    handler = functools.partial(forward, local=Address("127.0.0.1", 1))
    visitor, stream = await make_visitor()
    async with visitor:
        await handler(stream)
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
