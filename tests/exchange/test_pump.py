"""`pump`: every way in which two streams can end, and what the other one then sees."""

from __future__ import annotations

import errno
import random
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, final

import attrs
import pytest
import trio
import trio.testing
import trustme
from fast_path import fast_path  # noqa: F401  # runs each test twice
from rig import carried, no_hang, nothing_left_behind, read_all, read_exactly, until_it_raises

from pioneer_tunnel._net.adopted import adopt, watch
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._net.tls.stream import TlsServerStream
from pioneer_tunnel.exchange.carrier import Carrier
from pioneer_tunnel.exchange.pump import HandedOver, Pump, pump
from pioneer_tunnel.testing.memory_stream import MemoryConnection

APOLOGY: Final = b"sorry"
TLS_OVERHEAD: Final = 22
"""Bytes of a record of TLS 1.3 beside its content."""


@final
@attrs.define
class Ends:
    """The outer ends of what is pumped: `left` is at the pump's first stream, `right` at its second."""

    left: trio.SocketStream
    right: trio.SocketStream
    over: trio.Event
    scope: trio.CancelScope


_by_carrier = False


@pytest.fixture(autouse=True, params=["in a task", "without a task"])
def by_carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs twice: a carrier makes no difference."""
    monkeypatch.setattr(sys.modules[__name__], "_by_carrier", request.param == "without a task")


async def carry(carried: Pump) -> None:
    """Let a carrier run it, if it takes it."""
    over = trio.Event()
    carrier = Carrier(on_bug=lambda error: pytest.fail(repr(error)))
    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        if _by_carrier and carrier.takes(carried):
            carrier.carry(carried, over.set)
            await over.wait()
        else:
            await carried.run()
        nursery.cancel_scope.cancel()


async def sockets() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        ours = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return ours, await listener.accept()


@asynccontextmanager
async def pumped(apology: bytes = b"") -> AsyncIterator[Ends]:
    left, first = await sockets()
    second, right = await sockets()
    ends = Ends(left, right, trio.Event(), trio.CancelScope())

    async def run() -> None:
        with ends.scope:
            await carry(Pump(watch(first), watch(second), apology=apology))
        assert first.socket.fileno() == second.socket.fileno() == -1
        ends.over.set()

    with nothing_left_behind(), no_hang():
        async with trio.open_nursery() as nursery, left, right:
            nursery.start_soon(run)
            yield ends
            await ends.over.wait()


async def is_reset(stream: trio.SocketStream) -> None:
    with no_hang(), pytest.raises(trio.BrokenResourceError):
        await read_all(stream)


async def test_bytes_pass_both_ways_until_both_have_ended() -> None:
    data = random.Random(3).randbytes(3_000_000)
    async with pumped() as ends, trio.open_nursery() as nursery:
        for source, sink in ((ends.left, ends.right), (ends.right, ends.left)):

            @nursery.start_soon
            async def send(source: trio.SocketStream = source) -> None:
                await source.send_all(data)
                await source.send_eof()

            @nursery.start_soon
            async def receive(sink: trio.SocketStream = sink) -> None:
                assert await read_all(sink) == data


@pytest.mark.parametrize("left_first", [True, False])
async def test_an_end_of_one_side_is_an_end_for_the_other_which_may_go_on(left_first: bool) -> None:
    async with pumped(APOLOGY) as ends:
        one, other = (ends.left, ends.right) if left_first else (ends.right, ends.left)
        await one.send_all(b"question")
        await one.send_eof()
        assert await read_all(other) == b"question"
        assert not ends.over.is_set()
        assert await carried(other, one, bytes(500_000)) == bytes(500_000)


@pytest.mark.parametrize("left_breaks", [True, False])
async def test_a_break_of_one_side_is_a_reset_for_the_other(left_breaks: bool) -> None:
    async with pumped() as ends:
        one, other = (ends.left, ends.right) if left_breaks else (ends.right, ends.left)
        await one.send_all(b"a part")
        await read_exactly(other, 6)
        await abandon(one)
        await is_reset(other)


async def test_a_break_before_a_word_is_apologised_for() -> None:
    async with pumped(APOLOGY) as ends:
        await ends.right.send_all(b"question")
        await read_exactly(ends.left, 8)
        await abandon(ends.left)
        assert await read_all(ends.right) == APOLOGY
        await ends.right.send_eof()  # or it would be waited for, for 2 seconds


@pytest.mark.parametrize("said", [b"", b"half a word"])
async def test_a_stream_that_is_handed_over_stays_open_and_the_other_one_ends(said: bytes) -> None:
    @final
    class Leaving(trio.abc.HalfCloseableStream):
        """Leaves when it has heard something."""

        def __init__(self, stream: trio.SocketStream) -> None:
            self.transport_stream: Final = stream
            self._heard = trio.Event()

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await self._heard.wait()
            raise HandedOver

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            await self.transport_stream.send_all(data)
            self._heard.set()

        async def wait_send_all_might_not_block(self) -> None:
            raise AssertionError

        async def send_eof(self) -> None:
            raise AssertionError

        async def aclose(self) -> None:
            raise AssertionError

    left, first = await sockets()
    second, right = await sockets()
    with no_hang():
        async with left, right, second, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: pump(watch(first), adopt(Leaving(second)), apology=APOLOGY))
            await left.send_all(b"answer" + said)
            assert await read_all(left) == b"", "an end and no reset"
            await second.send_all(b", and more")
            await second.send_eof()
            assert await read_all(right) == b"answer" + said + b", and more"


@final
class Uploader(trio.abc.HalfCloseableStream):
    """Someone who always has more to say, and remembers how the answer ended."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.ending = ""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return bytes(max_bytes or 1)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.heard += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self.ending = self.ending or "end"

    async def aclose(self) -> None:
        self.ending = self.ending or "end"
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        self.ending = self.ending or "reset"


async def test_a_reset_that_the_sender_hears_of_first_is_no_end_for_the_receiver() -> None:
    """The system tells of a reset once. When it was told to a send, the receive after it got an orderly end."""
    for _ in range(20):
        left, first = await sockets()
        uploader = Uploader()
        with no_hang():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump, watch(first), adopt(uploader))
                await left.send_all(b"half an answer")
                await read_exactly(left, 300_000)
                await abandon(left)
        assert bytes(uploader.heard) == b"half an answer"
        assert uploader.ending == "reset"


async def test_an_apology_reaches_who_is_still_talking() -> None:
    """To close over what nobody has read would be a reset, and that can take the apology back."""
    async with pumped(APOLOGY) as ends, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def talk() -> None:
            await ends.right.send_all(bytes(3_000_000))
            await ends.right.send_eof()

        await read_exactly(ends.left, 8)
        await abandon(ends.left)
        assert await read_all(ends.right) == APOLOGY


async def test_a_break_after_a_word_is_not_apologised_for() -> None:
    async with pumped(APOLOGY) as ends:
        await ends.left.send_all(b"half an ans")
        await read_exactly(ends.right, 11)
        await abandon(ends.left)
        await is_reset(ends.right)


async def test_nobody_apologises_to_the_first() -> None:
    async with pumped(APOLOGY) as ends:
        await abandon(ends.right)
        await is_reset(ends.left)


async def test_an_answer_to_a_request_that_is_not_read_to_its_end_still_arrives() -> None:
    """The gateway says no and closes its half while the upload is on its way."""
    async with pumped() as ends, trio.open_nursery() as nursery:
        nursery.start_soon(upload_as_long_as_it_goes, ends.right)
        await read_exactly(ends.left, 1000)
        await ends.left.send_all(b"too large")
        await ends.left.send_eof()
        assert await read_all(ends.right) == b"too large"
        await abandon(ends.right)
        await is_reset(ends.left)


async def upload_as_long_as_it_goes(stream: trio.SocketStream) -> None:
    with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
        await until_it_raises(lambda: stream.send_all(bytes(100_000)))


async def test_cancelled_it_resets_both_sides() -> None:
    """One of them was left open, since abandoning the first let the cancellation out."""
    async with pumped(APOLOGY) as ends:
        await ends.left.send_all(b"half")
        await read_exactly(ends.right, 4)
        ends.scope.cancel()
        await is_reset(ends.left)
        await is_reset(ends.right)


async def test_a_bug_in_a_stream_comes_out_with_both_abandoned() -> None:
    @final
    class Buggy(trio.abc.Stream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            raise ZeroDivisionError

        async def send_all(self, data: Any) -> None:
            raise AssertionError

        async def wait_send_all_might_not_block(self) -> None:
            raise AssertionError

        async def aclose(self) -> None:
            closed.append(self)

    closed: list[Buggy] = []
    left, first = await sockets()
    async with left:
        with pytest.raises(ExceptionGroup) as raised:
            await pump(watch(first), adopt(Buggy()))
        assert isinstance(raised.value.exceptions[0], ZeroDivisionError)
        assert len(closed) == 1
        await is_reset(left)


async def test_an_end_that_is_told_of_while_a_send_finds_the_reset_is_none() -> None:
    """Trio's socket streams take one more step to tell of a failed send; meanwhile the end was passed on."""

    @final
    class Reset(trio.abc.HalfCloseableStream):
        """The system tells the one who sends of the reset, and the one who receives of an end."""

        def __init__(self) -> None:
            self._was_reset = trio.Event()

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await self._was_reset.wait()
            return b""

        async def send_all(self, data: Any) -> None:
            await trio.sleep(0.01)
            try:
                raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
            except OSError as error:
                self._was_reset.set()
                await trio.lowlevel.cancel_shielded_checkpoint()
                raise trio.BrokenResourceError from error

        async def wait_send_all_might_not_block(self) -> None:
            raise AssertionError

        async def send_eof(self) -> None:
            await trio.lowlevel.checkpoint()

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    for _ in range(20):  # which of two tasks goes first is up to chance
        left, first = await sockets()
        async with left:
            await left.send_all(b"x")
            with no_hang():
                assert not await pump(watch(first), adopt(Reset()))
            await is_reset(left)


# TLS, which has no half-close


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's, for office.test."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("office.test").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


@asynccontextmanager
async def pumped_to_tls(apology: bytes = b"") -> AsyncIterator[tuple[trio.SocketStream, trio.SSLStream[Any]]]:
    server, client = tls_contexts()
    left, first = await sockets()
    second, right = await sockets()
    secured = TlsServerStream(watch(second), server)
    visitor = trio.SSLStream(right, client, server_hostname="office.test")
    with no_hang():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(secured.do_handshake)
            await visitor.do_handshake()
        async with trio.open_nursery() as pumping, left:
            pumping.start_soon(lambda: pump(watch(first), secured, apology=apology))
            yield left, visitor
        await trio.aclose_forcefully(visitor)


async def test_towards_tls_a_whole_answer_ends_with_a_goodbye() -> None:
    async with pumped_to_tls() as (left, visitor):
        await visitor.send_all(b"question")
        await read_exactly(left, 8)
        assert await carried(left, visitor, bytes(1_000_000)) == bytes(1_000_000)
        assert await read_all(left) == b"", "when the answer is complete, so is the exchange"


async def test_a_goodbye_of_tls_waits_for_a_slow_reader(autojump_clock: trio.testing.MockClock) -> None:
    server, client = tls_contexts()
    connection = MemoryConnection(buffer=4096)
    secured = TlsServerStream(connection.server, server)
    visitor = trio.SSLStream(connection.client, client, server_hostname="office.test")
    answer = bytes(4096 - TLS_OVERHEAD)  # it fills the buffer
    async with trio.open_nursery() as nursery:
        nursery.start_soon(secured.do_handshake)
        await visitor.do_handshake()
    async with trio.open_nursery() as nursery:
        await visitor.send_all(b"question")
        assert await secured.receive_some() == b"question"

        @nursery.start_soon
        async def answer_and_close() -> None:
            await secured.send_all(b"!")
            await secured.send_all(answer)
            await secured.aclose()

        assert await read_exactly(visitor, 1) == b"!"
        await trio.sleep(20)
        assert await read_all(visitor) == answer, "an end without a close_notify raises here"


async def test_towards_tls_a_break_is_no_goodbye() -> None:
    async with pumped_to_tls() as (left, visitor):
        await left.send_all(b"half")
        await read_exactly(visitor, 4)
        await abandon(left)
        with pytest.raises(trio.BrokenResourceError):
            await read_all(visitor)


async def test_towards_tls_an_apology_is_a_whole_answer() -> None:
    async with pumped_to_tls(APOLOGY) as (left, visitor):
        await abandon(left)
        assert await read_all(visitor) == APOLOGY


async def test_a_goodbye_of_tls_is_an_end_and_the_answer_may_follow() -> None:
    async with pumped_to_tls() as (left, visitor):
        await visitor.send_all(b"question")
        await visitor.aclose()
        assert await read_all(left) == b"question"
