"""`streams`: Trio's contract over a socket, a watch over what moves, and the ways to end a connection."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Any, final

import pytest
import trio
import trio.testing
from rig import eventually, fill, no_hang, read_all, tcp_pair

from pioneer_tunnel._net import adopted as streams_module
from pioneer_tunnel._net.adopted import Watched, watch
from pioneer_tunnel._net.closing import abandon, close_after_answer, send_eof
from pioneer_tunnel._net.prefixed_stream import PrefixedStream
from pioneer_tunnel._net.socket_options import reset_on_close
from pioneer_tunnel._net.tcp import TcpStream


async def watched_sockets() -> tuple[Watched, Watched]:
    ours, theirs = await tcp_pair()
    return streams_module.watch(ours), streams_module.watch(theirs)


async def full_sockets() -> tuple[Watched, Watched]:
    """A pair of which neither end can send any more."""
    ends = await tcp_pair(buffers=4096)
    for end in ends:
        await fill(end)
    ours, theirs = ends
    return streams_module.watch(ours), streams_module.watch(theirs)


# TcpStream and WatchedStream


@pytest.fixture(params=["trio", "standard library"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose sockets are below."""
    if request.param != "trio":
        monkeypatch.setattr(streams_module, "watch", bare)


def bare(stream: trio.SocketStream) -> TcpStream:
    return TcpStream(socket.socket(fileno=stream.socket.detach()))


@pytest.mark.usefixtures("kind")
async def test_over_a_socket_it_keeps_trios_contract() -> None:
    with no_hang():
        await trio.testing.check_half_closeable_stream(watched_sockets, full_sockets)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("closes", ["aclose", "reset"])
async def test_whoever_waits_hears_of_the_end_and_the_next_one_with_that_number_is_not_disturbed(closes: str) -> None:
    """A socket of the standard library does not tell Trio that it closes: they waited for ever."""
    one, other = await tcp_pair(buffers=4096)
    await fill(one)
    ours, theirs = streams_module.watch(one), streams_module.watch(other)
    assert isinstance(ours, TcpStream)
    heard: list[str] = []

    async def wait(name: str, what: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await what()
        heard.append(name)

    async with theirs, trio.open_nursery() as nursery:
        nursery.start_soon(wait, "reader", ours.receive_some)
        nursery.start_soon(wait, "writer", lambda: ours.send_all(bytes(8_000_000)))
        await trio.testing.wait_all_tasks_blocked()
        number = ours.socket.fileno()
        if closes == "aclose":
            await ours.aclose()
        else:
            ours.reset()
        near, far = socket.socketpair()
        with near, far:
            assert number in {near.fileno(), far.fileno()}
            for sock in (near, far):
                with trio.move_on_after(0.01):
                    await trio.lowlevel.wait_readable(sock)
            await eventually(lambda: len(heard) == 2)


async def test_over_another_stream_it_keeps_trios_contract() -> None:
    async def make() -> tuple[Watched, Watched]:
        ours, theirs = trio.testing.memory_stream_pair()
        return watch(ours), watch(theirs)

    await trio.testing.check_half_closeable_stream(make, None)


@pytest.mark.parametrize("over", ["socket", "memory"])
async def test_it_remembers_when_bytes_came_and_since_when_none_leave(over: str) -> None:
    if over == "socket":
        ours, theirs = await watched_sockets()
    else:
        one, other = trio.testing.lockstep_stream_pair()
        ours, theirs = watch(one), watch(other)

    def since() -> float | None:
        return ours.sending_since

    async with ours, theirs, trio.open_nursery() as nursery:
        began = theirs.last_received
        assert since() is None
        nursery.start_soon(ours.send_all, bytes(32_000_000))
        await eventually(lambda: since() is not None)
        stalled = since()
        assert stalled is not None
        assert theirs.last_received == began
        await theirs.receive_some()
        assert theirs.last_received > began
        received = 0
        while received < 16_000_000:
            received += len(await theirs.receive_some(1_000_000))
        # It measures the lack of progress, not the time to finish.
        await eventually(lambda: (since() or 0) > stalled)
        nursery.cancel_scope.cancel()
    assert since() is None


async def test_a_socket_that_was_closed_meanwhile_is_not_read_by_its_old_number() -> None:
    ours, theirs = await watched_sockets()
    async with theirs:
        await ours.aclose()
        await theirs.send_all(b"for somebody else")
        with pytest.raises(trio.ClosedResourceError):
            await ours.receive_some()
        with pytest.raises(trio.ClosedResourceError):
            await ours.send_all(b"x")


async def test_a_reset_is_broken_and_says_why() -> None:
    ours, theirs = await watched_sockets()
    await abandon(theirs)
    async with ours:
        with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
            await ours.receive_some()


async def test_reading_and_writing_let_other_tasks_run() -> None:
    ours, theirs = await watched_sockets()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(count)
        for _ in range(100):
            await ours.send_all(b"x")
            await theirs.receive_some(1)
        assert turns > 150
        nursery.cancel_scope.cancel()


# PrefixedStream


async def test_a_prefix_comes_first_and_then_the_rest() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    stream = PrefixedStream(ours, b"already read ")
    await theirs.send_all(b"and the rest")
    await theirs.send_eof()
    assert await stream.receive_some(7) == b"already"
    assert await read_all(stream) == b" read and the rest"
    await stream.send_all(b"answer")
    await stream.send_eof()
    assert await read_all(theirs) == b"answer"


async def test_a_closed_prefixed_stream_gives_nothing_more() -> None:
    stream = PrefixedStream(trio.testing.memory_stream_pair()[0], b"already read")
    await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()


@pytest.mark.parametrize("max_bytes", [0, -1])
async def test_a_prefixed_stream_wants_a_positive_amount(max_bytes: int) -> None:
    """It used to return b"" for 0, which reads as the end, and all but the last byte for -1."""
    stream = PrefixedStream(trio.testing.memory_stream_pair()[0], b"already read")
    with pytest.raises(ValueError, match="max_bytes"):
        await stream.receive_some(max_bytes)


async def test_a_prefixed_stream_keeps_trios_contract() -> None:
    async def make() -> tuple[PrefixedStream, PrefixedStream]:
        ours, theirs = trio.testing.memory_stream_pair()
        return PrefixedStream(ours, b""), PrefixedStream(theirs, b"")

    await trio.testing.check_half_closeable_stream(make, None)


# Ending a connection


async def test_abandon_is_a_reset_however_deep_the_socket_is() -> None:
    for wrapped in (False, True):
        ours, theirs = await tcp_pair()
        async with theirs:
            await abandon(PrefixedStream(watch(ours), b"x") if wrapped else ours)
            assert ours.socket.fileno() == -1
            with pytest.raises(trio.BrokenResourceError):
                await theirs.receive_some()


@final
class CountingSocket(socket.socket):
    """Counts how often its SO_LINGER is set."""

    lingers = 0

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        self.lingers += option == socket.SO_LINGER
        super().setsockopt(level, option, *value)


async def resetting() -> tuple[TcpStream, CountingSocket, trio.SocketStream]:
    """A stream that `resets`, its socket, and the other end. Its socket was accepted, so that it inherits that."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        reset_on_close(listener.socket)
        theirs = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        sock = CountingSocket(fileno=(await listener.accept()).socket.detach())
    return TcpStream(sock, resets=True), sock, theirs


async def test_what_resets_ends_with_a_fin_when_it_is_closed() -> None:
    ours, sock, theirs = await resetting()
    async with theirs:
        await ours.send_all(b"all of it")
        await ours.aclose()
        assert await read_all(theirs) == b"all of it"
        assert sock.lingers == 1


@pytest.mark.parametrize("how", ["cancelled", "reset", "lost"])
async def test_what_resets_ends_with_a_reset_when_it_is_not_closed(how: str) -> None:
    ours, sock, theirs = await resetting()
    async with theirs:
        await ours.send_all(b"a part of it")
        if how == "cancelled":
            await trio.aclose_forcefully(ours)
        elif how == "reset":
            ours.reset()
        else:
            ours.socket.close()  # as the kernel does after the death of a process
        with pytest.raises(trio.BrokenResourceError):
            await read_all(theirs)
        assert sock.lingers == 0


async def test_what_does_not_reset_ends_with_a_fin_also_when_it_is_cancelled() -> None:
    ours, theirs = await tcp_pair()
    async with theirs:
        await trio.aclose_forcefully(watch(ours))
        assert await read_all(theirs) == b""


async def test_abandon_takes_a_stream_by_its_reset() -> None:
    class Resettable(trio.abc.AsyncResource):
        def __init__(self) -> None:
            self.calls: list[str] = []

        def reset(self) -> None:
            self.calls.append("reset")

        async def aclose(self) -> None:
            self.calls.append("aclose")

    stream = Resettable()
    await abandon(stream)
    assert stream.calls == ["reset", "aclose"]


async def test_abandon_closes_also_what_was_closed_or_is_no_socket() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await abandon(ours)
    await abandon(ours)
    assert await theirs.receive_some() == b""
    one, other = await tcp_pair()
    await one.aclose()
    await abandon(one)
    await other.aclose()


async def test_abandon_under_a_cancellation_still_lets_the_next_be_abandoned() -> None:
    one, other = await tcp_pair()
    with trio.CancelScope() as scope:
        scope.cancel()
        await abandon(one)
        await abandon(other)
        assert one.socket.fileno() == other.socket.fileno() == -1


async def test_the_last_word_arrives_at_who_is_still_talking() -> None:
    ours, theirs = await tcp_pair()
    async with theirs, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def talk() -> None:
            await theirs.send_all(bytes(2_000_000))
            await theirs.send_eof()

        @nursery.start_soon
        async def answer() -> None:
            await ours.receive_some(100)
            await ours.send_all(b"too much")
            await close_after_answer(ours)

        assert await read_all(theirs) == b"too much"
    assert ours.socket.fileno() == -1


async def test_who_never_stops_talking_is_left_after_two_seconds(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    started = trio.current_time()
    await close_after_answer(ours)
    assert trio.current_time() - started == pytest.approx(2)
    assert await theirs.receive_some() == b""


async def test_send_eof_closes_what_has_no_halves() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await send_eof(ours)
    assert await theirs.receive_some() == b""

    class Whole(trio.abc.Stream):
        closed = False

        async def aclose(self) -> None:
            self.closed = True

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            raise AssertionError

        async def send_all(self, data: object) -> None:
            raise AssertionError

        async def wait_send_all_might_not_block(self) -> None:
            raise AssertionError

    whole = Whole()
    await send_eof(whole)
    assert whole.closed
