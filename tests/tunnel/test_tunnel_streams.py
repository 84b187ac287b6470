"""How the stream of a visitor ends: in order, half by half, or with a reset."""

from __future__ import annotations

import functools
import hashlib
import random
from contextlib import suppress

import pytest
import trio
import trio.testing
from rig import (
    ask,
    eventually,
    in_background,
    no_hang,
    read_all,
    read_exactly,
    relay_rig,
    request,
)
from tunnel_rig import bound, connected, pair

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.forward import forward
from pioneer_tunnel.websocket import EngineName


async def test_a_visitor_that_ends_its_half_gets_the_whole_reply(engine: EngineName) -> None:
    """The visitor's FIN comes first, the large reply after: where other tunnels lose data."""
    reply = random.Random(1).randbytes(8 * 1024 * 1024)

    async def answer(stream: TunnelStream) -> None:
        async with stream:
            question = await read_all(stream)
            await trio.sleep(0.05)
            await stream.send_all(hashlib.sha256(question).digest() + reply)

    async with (
        bound(engine) as (come, tunnel),
        in_background(lambda: trio.serve_listeners(answer, [tunnel])),
        await come() as visitor,
    ):
        question = bytes(1024 * 1024)
        with no_hang():
            assert await ask(visitor, question) == hashlib.sha256(question).digest() + reply


async def test_an_answer_to_a_request_that_was_not_read_to_its_end_arrives(engine: EngineName) -> None:
    """Found by an attack: the server's reset overtook its answer, and the visitor was told 502."""
    refused = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 60000\r\n\r\n" + b"x" * 60_000

    async def refuse(local: trio.SocketStream) -> None:
        async with local:  # with most of the request unread, so the system resets
            await local.receive_some(1000)
            await local.send_all(refused)

    async with trio.open_nursery() as nursery, connected(engine) as (rig, tunnel):
        (listener,) = await nursery.start(functools.partial(trio.serve_tcp, refuse, 0, host="127.0.0.1"))
        handler = functools.partial(forward, local=Address(*listener.socket.getsockname()))
        nursery.start_soon(trio.serve_listeners, handler, [tunnel])
        for _ in range(5):
            async with await rig.visit() as visitor:
                with suppress(trio.BrokenResourceError):
                    await visitor.send_all(request(body=bytes(200_000)))
                with no_hang():
                    assert await read_exactly(visitor, len(refused)) == refused
        nursery.cancel_scope.cancel()


async def test_a_local_server_that_thinks_is_told_that_its_half_closed_visitor_has_left(engine: EngineName) -> None:
    """Found by an attack: the local connection stayed for as long as the server had nothing to say."""
    thinks, told = trio.Event(), trio.Event()

    async def think(local: trio.SocketStream) -> None:
        async with local:
            with suppress(trio.BrokenResourceError):
                await read_all(local)
                thinks.set()
                while True:  # once it has read the end, only a send would tell; the system's view of it will do
                    await trio.sleep(0.01)
                    if local.getsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_ERROR):
                        told.set()
                        return

    async with trio.open_nursery() as nursery, relay_rig(engine) as rig, rig.tunnel() as tunnel:
        (listener,) = await nursery.start(functools.partial(trio.serve_tcp, think, 0, host="127.0.0.1"))
        handler = functools.partial(forward, local=Address(*listener.socket.getsockname()))
        nursery.start_soon(trio.serve_listeners, handler, [tunnel])
        with no_hang():
            await tunnel.wait_connected()
        async with await rig.visit() as visitor:
            await visitor.send_all(request())
            await visitor.send_eof()
            with no_hang():
                await thinks.wait()
            await rig.stop()  # the link is lost
            with no_hang():
                await told.wait()
        nursery.cancel_scope.cancel()


async def test_the_gateway_may_end_its_half_first_and_go_on_receiving(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        upload = random.Random(2).randbytes(2 * 1024 * 1024)
        visitor, stream = await pair(rig, tunnel, request(f"Content-Length: {len(upload)}"))
        async with visitor, stream:
            await stream.send_all(b"all that I have")
            await stream.send_eof()
            assert await read_all(visitor) == b"all that I have"
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def send() -> None:
                    await visitor.send_all(upload)
                    await visitor.send_eof()

                with no_hang():
                    assert await read_all(stream) == upload


async def test_aclose_ends_the_visitors_connection_orderly_after_all_data(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with visitor:
            await stream.send_all(bytes(200_000))
            await stream.aclose()
            with no_hang():
                assert await read_all(visitor) == bytes(200_000)


async def test_reset_ends_the_visitors_connection_with_a_reset(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with visitor:
            await stream.send_all(b"half an ans")
            assert await read_exactly(visitor, 11) == b"half an ans"
            stream.reset()
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
            assert not stream.usable


async def test_a_cancelled_aclose_is_a_reset(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with visitor:
            await stream.send_all(b"half an ans")
            assert await read_exactly(visitor, 11) == b"half an ans"
            await trio.aclose_forcefully(stream)
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)


async def test_a_visitor_that_resets_breaks_the_stream(engine: EngineName) -> None:
    async with connected(engine) as (rig, tunnel):
        visitor, stream = await pair(rig, tunnel)
        async with stream:
            await abandon(visitor)
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(stream)
            assert not stream.usable


async def test_what_a_handler_leaves_open_is_reset(engine: EngineName) -> None:
    async def forget(stream: TunnelStream) -> None:
        await stream.send_all(b"I may have")

    async with (
        connected(engine) as (rig, tunnel),
        in_background(lambda: trio.serve_listeners(forget, [tunnel])),
        await rig.visit() as visitor,
    ):
        await visitor.send_all(request())
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await read_all(visitor)


async def test_a_visitor_of_a_full_backlog_is_reset(engine: EngineName, delivered: list[TunnelStream]) -> None:
    async with connected(engine, backlog=2) as (rig, tunnel):
        waiting = []
        for _ in range(2):
            waiting.append(await rig.visit())
            await waiting[-1].send_all(request())
        await eventually(lambda: len(delivered) == 2)
        async with await rig.visit() as third:
            await third.send_all(request())
            with no_hang():
                assert b" 502 " in (await read_all(third)).partition(b"\r\n")[0]
        for visitor in waiting:
            stream = await tunnel.accept()
            assert await read_exactly(stream, len(request())) == request()
            await stream.aclose()
            assert await read_all(visitor) == b""
            await visitor.aclose()


async def test_a_visitor_that_left_while_it_waited_is_not_accepted(
    engine: EngineName, delivered: list[TunnelStream]
) -> None:
    async with bound(engine) as (come, tunnel):
        gone = await come()
        await eventually(lambda: delivered)
        await abandon(gone)
        await eventually(lambda: not delivered[0].usable)
        async with await come() as visitor:
            with no_hang():
                stream = await tunnel.accept()
            async with stream:
                assert stream.visitor == Address(*visitor.socket.getsockname())


async def test_tunnel_streams_keep_trios_contract(engine: EngineName) -> None:
    """Both ends are ours: a yamux stream at the gateway, and the visitor's socket behind a real relay."""

    async with bound(engine) as (come, tunnel):

        async def make_pair() -> tuple[trio.SocketStream, TunnelStream]:
            visitor = await come()
            return visitor, await tunnel.accept()

        with no_hang():
            await trio.testing.check_half_closeable_stream(make_pair, None)
