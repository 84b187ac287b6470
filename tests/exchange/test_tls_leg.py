"""TLS in an exchange, and as a connection that the event loop reads and writes: what is said arrives, whole or cut."""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import pytest
import trio
import trustme
from fast_path import fast_path  # noqa: F401  # runs each test twice
from rig import no_hang, nothing_left_behind, read_all, read_exactly, seeds, tcp_pair
from test_exchange_model import Talker

from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._net.fastpath.stay import Stay
from pioneer_tunnel._net.leg import Bytes
from pioneer_tunnel._net.prefixed_stream import PrefixedStream
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel._net.tls.stream import TlsServerStream, TlsStream
from pioneer_tunnel.exchange.pump import pump

CA: Final = trustme.CA()
NAME: Final = "site.test"


def server_context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert(NAME).configure_cert(context)
    return context


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    return context


async def connected(
    server: type[TlsStream | TlsServerStream] | None, buffers: int | None = None
) -> tuple[ByteStream, ByteStream]:
    """The outer and the inner end of a connection; in clear for None."""
    near, far = await tcp_pair(buffers)
    outer, inner = TcpStream(near.socket), TcpStream(far.socket)
    if server is None:
        return outer, inner
    client = TlsStream(outer, client_context(), server_hostname=NAME, https=server is TlsServerStream)
    if server is TlsStream:
        secured: TlsStream | TlsServerStream = TlsStream(inner, server_context(), server_side=True)
    else:
        secured = TlsServerStream(inner, server_context())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(secured.do_handshake)
    return client, secured


@pytest.mark.parametrize("sides", [(TlsStream, None), (None, TlsStream), (TlsStream, TlsStream)])
@pytest.mark.parametrize("buffers", [None, 8192])
@pytest.mark.parametrize("may_reset", [False, True], ids=["orderly", "resets"])
@seeds(20, quick=2)
async def test_nothing_is_lost_changed_or_cut_and_taken_for_whole(
    seed: int, may_reset: bool, buffers: int | None, sides: tuple[type[TlsStream] | None, type[TlsStream] | None]
) -> None:
    dice = random.Random(seed)
    with nothing_left_behind(), no_hang():
        left, first = await connected(sides[0], buffers)
        right, second = await connected(sides[1], buffers)
        talkers = [Talker(end, dice, may_reset=may_reset) for end in (left, right)]
        async with left, right, trio.open_nursery() as nursery:
            nursery.start_soon(pump, first, second)
            for talker in talkers:
                nursery.start_soon(talker.say)
                nursery.start_soon(talker.hear)
    for talker, other in (talkers, talkers[::-1]):
        assert other.said.startswith(talker.heard)
        if talker.heard_end:
            assert other.said_end
            assert talker.heard == other.said
        if not any(each.resets for each in talkers):
            assert talker.heard_end


@asynccontextmanager
async def pumped(server: type[TlsStream | TlsServerStream]) -> AsyncIterator[tuple[ByteStream, ByteStream]]:
    left, first = await connected(server)
    right, second = await connected(None)
    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(pump, second, first)
        yield left, right


async def test_an_end_without_close_notify_is_a_reset_of_the_other_side() -> None:
    with nothing_left_behind(), no_hang():
        async with pumped(TlsStream) as (left, right):
            await left.send_all(b"a half")
            assert await read_exactly(right, 6) == b"a half"
            assert isinstance(left, TlsStream)
            await left.transport_stream.send_eof()
            with pytest.raises(trio.BrokenResourceError):
                await read_all(right)


async def test_without_half_close_the_end_of_the_answer_closes_the_connection() -> None:
    with nothing_left_behind(), no_hang():
        async with pumped(TlsServerStream) as (left, right):
            await left.send_all(b"a request")
            assert await read_exactly(right, 9) == b"a request"
            await right.send_all(b"the answer")
            await right.send_eof()
            assert await read_all(left) == b"the answer"
            assert isinstance(left, TlsStream)
            assert left.end_received
            assert await read_all(right) == b""


async def test_a_reset_behind_tls_is_a_reset_of_the_other_side() -> None:
    with nothing_left_behind(), no_hang():
        for one in (0, 1):
            async with pumped(TlsStream) as ends:
                await ends[one].send_all(b"hello")
                assert await read_exactly(ends[1 - one], 5) == b"hello"
                await abandon(ends[one])
                with pytest.raises(trio.BrokenResourceError):
                    await ends[1 - one].receive_some()


class Echo:
    """Answers what it gets, by callbacks; what does not leave at once is sent by a task, as a link does it."""

    def __init__(self, stream: TlsStream, nursery: trio.Nursery) -> None:
        self.ended = False
        self.waits = 0
        self._nursery = nursery
        self._buffer = memoryview(bytearray(10_000))
        self._rest: list[Bytes] = []
        self._sending = False
        watched = stream.watch(self.read)
        if watched is None:
            pytest.skip("there is no event loop")
        assert watched is stream
        self._stream = stream
        self.read()

    def read(self) -> None:
        while not self._sending and not self.ended:
            amount = self._stream.receive_into_nowait(self._buffer)
            if amount is None:
                return
            self.ended = not amount
            if self.ended:
                self._nursery.start_soon(self._stream.send_eof)
                return
            data = bytes(self._buffer[:amount])
            self._rest = self._stream.send_nowait([data[:7], data[7:]])
            if self._rest:
                self.waits += 1
                self._sending = True
                self._nursery.start_soon(self._send)

    async def _send(self) -> None:
        await self._stream.send_pieces(self._rest)
        self._sending = False
        self.read()


@pytest.mark.parametrize("buffers", [None, 8192])
@seeds(20, quick=4)
async def test_a_watched_stream_loses_nothing(seed: int, buffers: int | None) -> None:
    dice = random.Random(seed)
    with nothing_left_behind(), no_hang():
        client, server = await connected(TlsStream, buffers)
        said, heard = bytearray(), bytearray()

        async def say() -> None:
            for _ in range(dice.randint(1, 12)):
                piece = dice.randbytes(dice.choice([1, 100, 5000, 70_000, 400_000]))
                said.extend(piece)
                await client.send_all(piece)
            await client.send_eof()

        async def hear() -> None:
            while piece := await client.receive_some(dice.choice([1000, 65536])):
                heard.extend(piece)

        async with client, server:
            with Stay() as stay:
                async with trio.open_nursery() as nursery:
                    assert isinstance(server, TlsStream)
                    nursery.start_soon(stay.wait)
                    echo = Echo(server, nursery)
                    async with trio.open_nursery() as talk:
                        talk.start_soon(say)
                        talk.start_soon(hear)
                    server.unwatch()
                    nursery.cancel_scope.cancel()
        assert heard == said
        assert buffers is None or len(said) < 100_000 or echo.waits


async def test_what_was_read_ahead_stays_while_a_task_sends_a_reply() -> None:
    with nothing_left_behind(), no_hang():
        near, far = await tcp_pair()
        client = TlsStream(TcpStream(near.socket), client_context(), server_hostname=NAME)
        server = TlsStream(PrefixedStream(TcpStream(far.socket), b""), server_context(), server_side=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.do_handshake)
            nursery.start_soon(server.do_handshake)
        async with client, server:
            await client.send_all(b"hello")
            ahead = await server.transport_stream.receive_some()
            server.transport_stream = PrefixedStream(server.transport_stream, bytes(ahead))
            async with server._to_wire:
                assert server.leg() is None
            assert await read_exactly(server, 5) == b"hello"
