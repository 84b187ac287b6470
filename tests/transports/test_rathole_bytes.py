"""The transports `tcp` and `tls`: the bytes of visitors, and how their streams end."""

from __future__ import annotations

import functools
import hashlib
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from rathole_rig import connected, every_way
from rig import ask, eventually, fill, in_background, no_hang, read_all, read_exactly, tcp_pair

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel.transports.rathole.channel_stream import ChannelStream
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.forward import forward


@pytest.mark.parametrize("by", ["forward", "handler"])
async def test_64_mib_each_way_at_once_unharmed(secured: tuple[dict[str, Any], dict[str, Any]], by: str) -> None:
    piece = random.Random(4).randbytes(1024 * 1024)
    size = 64 if secured[1]["transport"] == "tcp" else 16
    expected = hashlib.sha256(piece * size).hexdigest()

    async def exchange(stream: trio.abc.Stream) -> None:
        """Send it all and end, while reading all that comes."""
        received = hashlib.sha256()

        async def send() -> None:
            for _ in range(size):
                await stream.send_all(piece)
            assert isinstance(stream, trio.abc.HalfCloseableStream)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while data := await stream.receive_some(1024 * 1024):
                received.update(data)
        await stream.aclose()
        digests.append(received.hexdigest())

    digests: list[str] = []
    async with connected(secured) as (relay, tunnel), trio.open_nursery() as nursery:
        handler: Callable[[Any], Any] = exchange
        if by == "forward":
            (listener,) = await nursery.start(functools.partial(trio.serve_tcp, host="127.0.0.1"), exchange, 0)
            local = Address("127.0.0.1", listener.socket.getsockname()[1])
            handler = functools.partial(forward, local=local)
        nursery.start_soon(trio.serve_listeners, handler, [tunnel])
        with no_hang():
            async with await relay.visit() as visitor:
                await exchange(visitor)
            await eventually(lambda: len(digests) == 2)
        nursery.cancel_scope.cancel()
    assert digests == [expected, expected]


async def test_the_answer_to_a_visitor_that_has_ended_arrives(secured: tuple[dict[str, Any], dict[str, Any]]) -> None:
    async def handler(stream: TunnelStream) -> None:
        async with stream:
            request = await read_all(stream)
            await stream.send_all(b"answer to " + request)

    async with connected(secured) as (relay, tunnel), in_background(lambda: trio.serve_listeners(handler, [tunnel])):
        with no_hang():
            async with await relay.visit() as visitor:
                assert await ask(visitor, b"request") == b"answer to request"


async def test_a_gateway_that_ends_first_still_hears_the_visitor() -> None:
    async with connected() as (relay, tunnel), await relay.visit() as visitor:
        await visitor.send_all(b"request")
        async with await tunnel.accept() as stream:
            await stream.send_all(b"whole answer")
            await stream.send_eof()
            assert await read_all(visitor) == b"whole answer"
            await visitor.send_all(b" and more")
            await visitor.send_eof()
            assert await read_all(stream) == b"request and more"


async def test_a_last_word_arrives_although_the_visitor_is_still_talking() -> None:
    """A plain close with something unread would be a RST, which takes the last word back."""
    answer = os.urandom(300_000)

    async def handler(stream: TunnelStream) -> None:
        async with stream:
            await stream.receive_some(10)
            await stream.send_all(answer)

    async with (
        connected() as (relay, tunnel),
        in_background(lambda: trio.serve_listeners(handler, [tunnel])),
        await relay.visit() as visitor,
    ):
        await visitor.send_all(bytes(200_000))
        with no_hang():
            assert await read_exactly(visitor, len(answer)) == answer


@every_way
@pytest.mark.parametrize("by", ["stream", "forward", "visitor"])
async def test_a_reset_is_a_reset_at_the_other_end(by: str) -> None:
    async with connected() as (relay, tunnel), trio.open_nursery() as nursery:
        visitor = await relay.visit()
        await visitor.send_all(b"x")
        stream = await tunnel.accept()
        if by == "visitor":
            await abandon(visitor)
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(stream)
            stream.reset()
            return
        if by == "stream":
            stream.reset()
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()
        else:

            async def refuse(local: trio.SocketStream) -> None:
                await local.receive_some()
                await abandon(local)

            (listener,) = await nursery.start(functools.partial(trio.serve_tcp, host="127.0.0.1"), refuse, 0)
            await forward(stream, Address("127.0.0.1", listener.socket.getsockname()[1]))
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await read_all(visitor)
        await visitor.aclose()
        nursery.cancel_scope.cancel()


async def test_the_stream_keeps_trios_contract() -> None:
    async with trio.open_nursery() as nursery:
        over: list[ChannelStream] = []

        def channel(end: trio.SocketStream) -> ChannelStream:
            return ChannelStream(watch(end), nursery, on_accepted=lambda: None, on_closed=over.append)

        async def make_pair() -> tuple[ChannelStream, ChannelStream]:
            one, other = map(channel, await tcp_pair())
            return one, other

        async def make_clogged_pair() -> tuple[ChannelStream, ChannelStream]:
            ends = await tcp_pair(buffers=4096)
            for end in ends:
                await fill(end)
            one, other = map(channel, ends)
            return one, other

        await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("how", "broken"), [("abandon", True), ("reset", False), ("aclose", False)])
async def test_who_waits_for_a_break_of_a_stream_hears_of_the_end_of_its_session(how: str, broken: bool) -> None:
    near, far = trio.testing.memory_stream_pair()
    heard: list[bool] = []
    async with trio.open_nursery() as nursery:
        stream = ChannelStream(watch(near), nursery, on_accepted=lambda: None, on_closed=lambda stream: None)

        @nursery.start_soon
        async def wait() -> None:
            heard.append(await stream.wait_broken())

        await far.send_all(b"the visitor talks")
        await trio.testing.wait_all_tasks_blocked()
        assert not heard
        if how == "aclose":
            await stream.aclose()
        else:
            getattr(stream, how)()
    assert heard == [broken]
    assert await stream.wait_broken() == broken
