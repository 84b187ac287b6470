"""`yamux.stream`: a yamux stream is a Trio stream, with everything that Trio promises, and a reset beside it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, final

import pytest
import trio
from rig import raise_again_and_again, run_until_it_waits
from trio.testing import MockClock, assert_checkpoints, check_half_closeable_stream, wait_all_tasks_blocked
from yamux_rig import (
    KIB,
    Ends,
    Frame,
    HandmadePeer,
    Two,
    body,
    data,
    echo,
    one,
    ping,
    pipe,
    read_all,
    send_and_end,
    sockets,
    two,
    update,
)

from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH, Reactor
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel.exchange.pump import pump
from pioneer_tunnel.yamux import Limits, Role, SendBudget, YamuxStream
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW, SEND_BOUND, SEND_RESERVE
from pioneer_tunnel.yamux.frames import ACK, FIN, RST, SYN, FrameType
from pioneer_tunnel.yamux.session import ANSWER_TIMEOUT, CLOSE_TIMEOUT

DATA, WINDOW_UPDATE, PING, GO_AWAY = FrameType
NEVER: Final = 1e6
MIB: Final = 1024 * KIB
FULL: Final = INITIAL_WINDOW + SEND_BOUND
"""What a stream takes before a send waits, when the other end reads nothing."""


@asynccontextmanager
async def pair(ends: Ends | None = None) -> AsyncIterator[tuple[YamuxStream, YamuxStream, Two]]:
    """Two ends of a stream, and the connections that carry it."""
    async with two(ends or pipe(), heartbeat=NEVER) as both:
        near, far = await both.stream()
        yield near, far, both


@asynccontextmanager
async def accepted(ends: Ends | None = None) -> AsyncIterator[tuple[YamuxStream, HandmadePeer]]:
    """A stream that a hand-made peer has opened; what it hears next is about this stream."""
    async with one(ends or pipe(), heartbeat=NEVER) as (running, peer):
        await peer.hear_ping()
        await peer.say(update(1, SYN))
        stream = await running.accept()
        assert await peer.hear() == Frame(WINDOW_UPDATE, ACK, 1, 0)
        yield stream, peer


# Trio's own checks


async def check(make_ends: Callable[[], Awaitable[Ends]]) -> None:
    async with trio.open_nursery() as nursery:

        async def make() -> tuple[YamuxStream, YamuxStream]:
            started = trio.Event()
            made: list[YamuxStream] = []

            async def carry() -> None:
                async with pair(await make_ends()) as (near, far, _):
                    made.extend((near, far))
                    started.set()
                    await trio.sleep_forever()

            nursery.start_soon(carry)
            await started.wait()
            return made[0], made[1]

        async def make_clogged() -> tuple[YamuxStream, YamuxStream]:
            ends = await make()
            for stream in ends:
                await run_until_it_waits(partial(stream.send_all, bytes(FULL + 1)))
            return ends

        await check_half_closeable_stream(make, make_clogged)
        nursery.cancel_scope.cancel()


async def test_it_is_a_half_closeable_stream_over_memory(autojump_clock: MockClock) -> None:
    async def make_ends() -> Ends:
        return pipe()

    await check(make_ends)


async def test_it_is_a_half_closeable_stream_over_a_narrow_pipe_that_cuts_anywhere(autojump_clock: MockClock) -> None:
    async def make_ends() -> Ends:
        return pipe(capacity=1000, dice=random.Random(0))

    await check(make_ends)


async def test_it_is_a_half_closeable_stream_over_sockets() -> None:
    await check(sockets)


# Sending


async def test_a_send_returns_while_little_waits_and_waits_while_much_does() -> None:
    async with pair() as (near, far, _), trio.open_nursery() as nursery:
        await near.send_all(bytes(FULL))
        nursery.start_soon(near.send_all, b"x")
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await near.send_all(b"y")
        received = 0
        while received < FULL + 1:
            received += len(await far.receive_some())


async def test_what_is_sent_is_what_the_buffer_held_then() -> None:
    async with pair() as (near, far, _):
        buffer = bytearray(b"before")
        await near.send_all(buffer)
        await near.send_all(memoryview(buffer)[:3])
        buffer[:] = b"later!"
        await near.send_eof()
        assert await read_all(far) == b"beforebef"


async def test_a_cancelled_send_has_queued_all_or_nothing() -> None:
    async with pair() as (near, far, _):
        with trio.CancelScope() as scope:
            scope.cancel()
            await near.send_all(b"nothing")
        await run_until_it_waits(lambda: near.send_all(body(2 * FULL)))
        await near.send_eof()
        assert await read_all(far) == body(2 * FULL)


class Visitor(ByteStream):
    """Sends without end, and counts what was read."""

    def __init__(self) -> None:
        self.read = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        assert max_bytes is not None
        self.read += max_bytes
        return bytes(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        raise AssertionError

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def abort(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("role", Role)
async def test_visitors_wait_while_a_peer_grants_no_credit(role: Role) -> None:
    """Else 200 of them make this end hold 50 MiB. Control frames pass, and so does a stream that gets credit."""
    process = SendBudget(64 * MIB)
    limits = Limits(unsent=8 * MIB)
    ends = pipe()
    async with (
        one(ends, role, heartbeat=NEVER, limits=limits, process_sending=process) as (running, peer),
        trio.open_nursery() as nursery,
    ):
        heard: list[Frame] = []

        @nursery.start_soon
        async def listen() -> None:
            while frame := await peer.hear():
                heard.append(frame)

        visitors = [Visitor() for _ in range(200)]
        for number, visitor in enumerate(visitors):
            if role is Role.CLIENT:
                stream = await running.open()
                stream_id = 1 + 2 * number
                await peer.say(update(stream_id, ACK))
            else:
                stream_id = 1 + 2 * number
                await peer.say(update(stream_id, SYN))
                stream = await running.accept()
            nursery.start_soon(pump, stream, visitor)
        await wait_all_tasks_blocked()
        read = [visitor.read - INITIAL_WINDOW for visitor in visitors]
        assert min(read) >= SEND_RESERVE // 2
        assert max(read) <= SEND_BOUND
        assert sum(read) == running.session.sending.held == process.held <= limits.unsent + 200 * SEND_RESERVE

        heard.clear()
        await peer.say(ping(7), update(1, credit=MIB))
        running.connection.refuse_streams()
        await wait_all_tasks_blocked()
        assert {(frame.type, frame.flags) for frame in heard} == {(PING, ACK), (GO_AWAY, 0), (DATA, 0)}
        assert sum(len(frame.body) for frame in heard if frame.stream_id == 1) == MIB
        nursery.cancel_scope.cancel()
    assert process.held == 0


class Narrow(Visitor):
    """Takes much at a time, then little, then much again."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.sleep_forever()

    @property
    def room(self) -> int:
        return 5 * KIB if MIB <= self.read < MIB + 100 * KIB else MIB

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.read += len(data)


class Asked(Visitor):
    """Always fills what it is asked for, and notes how much that was."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self.sizes.append(max_bytes or 0)
        return await super().receive_some(max_bytes)


async def test_reads_are_as_large_after_there_was_little_room() -> None:
    """Small reads cost more for each byte. A read that the room cut short says nothing of what its source has."""
    source, sink = Asked(), Narrow()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump, source, sink)
        while sink.read < 2 * MIB:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    last_narrow = max(index for index, size in enumerate(source.sizes) if size == 5 * KIB)
    assert set(source.sizes[last_narrow + 1 :]) == {255 * KIB}


async def test_what_was_read_for_visitors_that_take_nothing_is_bounded() -> None:
    """The other direction: each of them had a piece of 255 KiB that its connection did not take."""

    @final
    class Stalled(Visitor):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.sleep_forever()

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            self.read += len(data)
            if self.read > 100_000:  # so much a socket may take
                await trio.sleep_forever()

    process = SendBudget(64 * MIB)
    limits = Limits(unsent=4 * MIB)
    async with (
        one(pipe(), heartbeat=NEVER, limits=limits, process_sending=process) as (running, peer),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(peer.hear_all)
        visitors = [Stalled() for _ in range(100)]
        for number, visitor in enumerate(visitors):
            await peer.say(update(1 + 2 * number, SYN), data(1 + 2 * number, bytes(INITIAL_WINDOW)))
            nursery.start_soon(pump, await running.accept(), visitor)
            await wait_all_tasks_blocked()
        held = sum(stream.lent for stream in running.session.live_streams)
        assert held == running.session.sending.held == process.held <= limits.unsent + 100 * SEND_RESERVE
        assert held > limits.unsent // 2
        nursery.cancel_scope.cancel()
    assert process.held == 0


async def test_what_was_read_counts_until_the_next_read_or_the_close() -> None:
    async with pair() as (near, far, both):
        sending = both.server.session.sending
        await near.send_all(b"first")
        await near.send_all(b"second")
        await wait_all_tasks_blocked()
        assert await far.receive_some(5) == b"first"
        assert sending.held == 5
        assert await far.receive_some(3) == b"sec"
        assert sending.held == 3
        await far.aclose()
        assert sending.held == 0


async def test_after_the_end_nothing_is_sent() -> None:
    async with pair() as (near, _, _):
        await near.send_eof()
        await near.send_eof()
        for send in (near.send_all(b"x"), near.wait_send_all_might_not_block()):
            with pytest.raises(trio.ClosedResourceError):
                await send


@pytest.mark.parametrize("frames", [[update(1, RST)], [update(1, FIN), update(1, RST)]])
async def test_a_send_that_waits_learns_of_a_reset(frames: list[bytes]) -> None:
    async with accepted() as (stream, peer), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError, match="reset"):
                await stream.send_all(bytes(2 * FULL))

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        await peer.say(*frames)
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")
    with pytest.raises(trio.BrokenResourceError):
        await stream.wait_send_all_might_not_block()


async def test_a_send_that_waits_learns_of_a_close_at_its_own_end() -> None:
    async with pair() as (near, _, _), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await near.send_all(bytes(2 * FULL))

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        near.reset()


# Receiving


@pytest.mark.parametrize("size", [1, 5, 100])
async def test_no_more_is_received_than_was_asked_for(size: int) -> None:
    async with pair() as (near, far, _):
        await near.send_all(b"hello world")
        await wait_all_tasks_blocked()
        assert await far.receive_some(size) == b"hello world"[:size]


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError)])
async def test_sizes_that_make_no_sense_are_refused(size: Any, error: type[Exception]) -> None:
    async with pair() as (near, _, _):
        with pytest.raises(error):
            await near.receive_some(size)


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with pair() as (near, far, _):
        for number in range(50):
            with trio.CancelScope() as scope:
                if number % 2:
                    scope.cancel()
                    await far.receive_some()
                else:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(far.receive_some)
                        await wait_all_tasks_blocked()
                        scope.cancel()
            await near.send_all(bytes([number]))
            await wait_all_tasks_blocked()
            assert await far.receive_some() == bytes([number])


async def test_only_one_may_receive_at_a_time() -> None:
    async with pair() as (near, far, _), trio.open_nursery() as nursery:
        nursery.start_soon(far.receive_some)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await far.receive_some()
        with pytest.raises(trio.BusyResourceError):
            far.receive_nowait(1)
        await near.send_all(b"x")


async def test_what_is_there_is_received_without_waiting() -> None:
    async with pair() as (near, far, _):
        assert far.receive_nowait(10) is None
        await send_and_end(near, b"hello world")
        await wait_all_tasks_blocked()
        assert far.receive_nowait(5) == b"hello"
        assert far.receive_nowait(10) == b" world"
        assert far.receive_nowait(10) == b""
        assert await far.receive_some() == b""


async def test_a_receive_that_waits_learns_of_a_reset() -> None:
    async with accepted() as (stream, peer), trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.BrokenResourceError, match="reset"):
                await stream.receive_some()

        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        await peer.say(update(1, RST))
    assert not stream.usable


async def test_a_reset_after_the_end_takes_nothing_from_the_receiver() -> None:
    async with accepted() as (stream, peer):
        await peer.say(data(1, b"all of it"), update(1, FIN), update(1, RST))
        await wait_all_tasks_blocked()
        assert await read_all(stream) == b"all of it"
        assert await stream.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")


async def test_a_reset_without_an_end_is_never_taken_for_the_end() -> None:
    async with accepted() as (stream, peer):
        await peer.say(data(1, b"a part"), update(1, RST))
        await wait_all_tasks_blocked()
        assert await stream.receive_some() == b"a part"
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()


# The end of one direction


async def test_after_an_end_the_whole_reply_comes() -> None:
    """Half-close: the question ends before the answer begins. Others lose the answer here."""
    async with pair() as (near, far, both), trio.open_nursery() as nursery:
        nursery.start_soon(send_and_end, near, body(100_000, 1))
        assert await read_all(far) == body(100_000, 1)
        nursery.start_soon(send_and_end, far, body(2_000_000, 2))
        assert await read_all(near) == body(2_000_000, 2)
        await near.aclose()
        await far.aclose()
        await both.settle()


async def test_an_end_follows_what_waits_for_credit() -> None:
    async with pair() as (near, far, _):
        await run_until_it_waits(lambda: near.send_all(body(2 * FULL)))
        with assert_checkpoints():
            await near.send_eof()
        assert await read_all(far) == body(2 * FULL)


# Closing


@pytest.mark.parametrize("end_first", [False, True])
async def test_closing_sends_what_is_queued_and_the_end(end_first: bool) -> None:
    async with accepted() as (stream, peer):
        await stream.send_all(b"all of it")
        if end_first:
            await stream.send_eof()
        await stream.aclose()
        assert await peer.hear() == Frame(DATA, 0, 1, 9, b"all of it")
        assert await peer.hear() == Frame(WINDOW_UPDATE, FIN, 1, 0)
        assert not stream.usable


async def test_closing_waits_until_all_was_handed_over() -> None:
    async with pair() as (near, far, both), trio.open_nursery() as nursery:
        await near.send_all(bytes(FULL))
        closed = trio.Event()

        async def close() -> None:
            await near.aclose()
            closed.set()

        nursery.start_soon(close)
        await wait_all_tasks_blocked()
        assert not closed.is_set()
        assert len(await read_all(far)) == FULL
        await closed.wait()
        await far.aclose()
        await both.settle()


async def test_closing_takes_over_from_a_send_that_waits(autojump_clock: MockClock) -> None:
    """The send gives up, and what it had queued is still sent; neither takes the other's wake-up."""
    for _ in range(20):  # which of the two runs first is up to Trio
        async with pair() as (near, far, both), trio.open_nursery() as nursery:

            async def send(stream: YamuxStream) -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await stream.send_all(body(2 * FULL))

            nursery.start_soon(send, near)
            await wait_all_tasks_blocked()
            nursery.start_soon(near.aclose)
            await wait_all_tasks_blocked()
            begin = trio.current_time()
            assert await read_all(far) == body(2 * FULL)
            await far.aclose()
            await both.settle()
            assert trio.current_time() - begin < 1


async def test_closing_again_does_nothing() -> None:
    async with pair() as (near, _, _):
        await near.aclose()
        with assert_checkpoints():
            await near.aclose()
        near.reset()
        for what in (near.send_all(b"x"), near.send_eof(), near.receive_some(), near.wait_send_all_might_not_block()):
            with pytest.raises(trio.ClosedResourceError):
                await what
        with pytest.raises(trio.ClosedResourceError):
            near.receive_nowait(1)


async def test_closing_wakes_who_receives() -> None:
    async with pair() as (near, _, _), trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await near.receive_some()

        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        await near.aclose()


async def test_a_cancelled_close_resets() -> None:
    async with accepted() as (stream, peer):
        await trio.aclose_forcefully(stream)
        assert await peer.hear() == Frame(WINDOW_UPDATE, RST, 1, 0)


async def test_a_close_that_is_cancelled_while_it_waits_resets() -> None:
    async with accepted() as (stream, peer):
        await stream.send_all(bytes(FULL))
        await run_until_it_waits(stream.aclose)
        received = 0
        while (frame := await peer.hear()) and frame.type == DATA:
            received += frame.length
        assert received == INITIAL_WINDOW
        assert frame == Frame(WINDOW_UPDATE, RST, 1, 0)


async def test_a_peer_that_gives_no_credit_is_reset_30_seconds_after_the_close(autojump_clock: MockClock) -> None:
    async with accepted() as (stream, peer):
        await stream.send_all(bytes(FULL))
        await trio.sleep(100)
        begin = trio.current_time()
        await stream.aclose()
        assert trio.current_time() == begin + CLOSE_TIMEOUT
        await trio.sleep(1)
        while (frame := await peer.hear()) and frame.flags != RST:
            assert frame.flags != FIN
        assert frame == Frame(WINDOW_UPDATE, RST, 1, 0)


async def test_a_peer_that_gives_credit_slowly_gets_everything(autojump_clock: MockClock) -> None:
    async with accepted() as (stream, peer):
        await stream.send_all(bytes(FULL))

        async def grant_slowly() -> None:
            for _ in range(4):
                await trio.sleep(CLOSE_TIMEOUT - 1)
                await peer.say(update(1, credit=SEND_BOUND // 4))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(grant_slowly)
            await stream.aclose()
        received = 0
        while (frame := await peer.hear()) and frame.flags != FIN:
            received += frame.length if frame.type == DATA else 0
        assert received == FULL


async def test_a_peer_that_does_not_end_its_half_is_reset_30_seconds_after_the_close(autojump_clock: MockClock) -> None:
    async with accepted() as (stream, peer):
        begin = trio.current_time()
        await stream.aclose()
        assert await peer.hear() == Frame(WINDOW_UPDATE, FIN, 1, 0)
        while (frame := await peer.hear()) and frame.type == PING:
            pass
        assert frame == Frame(WINDOW_UPDATE, RST, 1, 0)
        assert trio.current_time() == begin + CLOSE_TIMEOUT


async def test_a_peer_whose_data_nobody_reads_is_reset_at_once() -> None:
    async with pair() as (near, far, both):
        await near.send_all(b"the answer")
        await near.aclose()
        await far.send_all(b"more of the question")
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError):
            await far.send_all(b"still more")
        assert await read_all(far) == b"the answer"
        await far.aclose()
        await both.settle()


# Resets


async def test_a_reset_breaks_the_other_end_and_drops_what_was_queued() -> None:
    async with pair() as (near, far, both):
        await near.send_all(bytes(FULL))
        near.reset()
        assert not near.usable
        with pytest.raises(trio.BrokenResourceError):
            await read_all(far)
        assert not far.usable
        await both.settle()
        assert both.server.session.unread == 0


async def test_a_reset_wakes_everybody() -> None:
    async with pair() as (near, _, _), trio.open_nursery() as nursery:

        async def closed(what: Awaitable[object]) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await what

        nursery.start_soon(closed, near.send_all(bytes(2 * FULL)))
        nursery.start_soon(closed, near.receive_some())
        await wait_all_tasks_blocked()
        near.reset()
        near.reset()


async def test_a_stream_that_was_never_accepted_is_broken_at_the_opener(autojump_clock: MockClock) -> None:
    async with two(pipe(), heartbeat=NEVER) as both:
        begin = trio.current_time()
        near = await both.client.open()
        with pytest.raises(trio.BrokenResourceError):
            await near.receive_some()
        assert trio.current_time() == begin + ANSWER_TIMEOUT
        await wait_all_tasks_blocked()
        far = await both.server.accept()
        assert not far.usable
        with pytest.raises(trio.BrokenResourceError):
            await far.receive_some()


# Losing the connection


async def test_what_had_arrived_before_the_connection_was_lost_can_be_read() -> None:
    async with accepted() as (stream, peer):
        await peer.say(data(1, b"hello"))
        await peer.stream.aclose()
        await wait_all_tasks_blocked()
        assert await stream.receive_some(3) == b"hel"
        assert await stream.receive_some() == b"lo"
        for what in (stream.receive_some(), stream.send_all(b"x"), stream.send_eof()):
            with pytest.raises(trio.BrokenResourceError, match="connection is gone"):
                await what
        assert not stream.usable


async def test_an_end_that_had_arrived_before_the_connection_was_lost_is_an_end() -> None:
    async with accepted() as (stream, peer):
        await peer.say(data(1, b"all of it", FIN))
        await peer.stream.aclose()
        await wait_all_tasks_blocked()
        assert await read_all(stream) == b"all of it"


async def test_losing_the_connection_wakes_everybody() -> None:
    async with accepted() as (stream, peer), trio.open_nursery() as nursery:

        async def broken(what: Awaitable[object]) -> None:
            with pytest.raises(trio.BrokenResourceError):
                await what

        nursery.start_soon(broken, stream.send_all(bytes(2 * FULL)))
        nursery.start_soon(broken, stream.receive_some())
        await wait_all_tasks_blocked()
        await peer.stream.aclose()


async def test_losing_the_connection_ends_a_close_that_waits() -> None:
    async with accepted() as (stream, peer), trio.open_nursery() as nursery:
        await stream.send_all(bytes(FULL))
        nursery.start_soon(stream.aclose)
        await wait_all_tasks_blocked()
        await peer.stream.aclose()


async def test_closing_after_the_connection_was_lost_is_no_error() -> None:
    async with accepted() as (stream, peer):
        await peer.stream.aclose()
        await wait_all_tasks_blocked()
        with assert_checkpoints():
            await stream.aclose()
        stream.reset()


# Watching over a stream that one neither sends on nor receives from


@pytest.mark.parametrize(
    ("frames", "broken"),
    [([update(1, RST)], True), ([data(1, b"x", FIN), update(1, RST)], True), ([], False), ([update(1, FIN)], False)],
)
async def test_who_waits_for_a_break_hears_of_a_reset_and_of_nothing_else(frames: list[bytes], broken: bool) -> None:
    async with accepted() as (stream, peer), trio.open_nursery() as nursery:
        heard: list[bool] = []

        async def wait() -> None:
            heard.append(await stream.wait_broken())

        nursery.start_soon(wait)
        await peer.say(*frames, update(1, credit=1))
        await wait_all_tasks_blocked()
        assert heard == ([True] if broken else [])
        await stream.aclose()
        await wait_all_tasks_blocked()
        assert heard == [broken]
        assert not await stream.wait_broken()


async def test_who_waits_for_a_break_hears_of_a_lost_connection() -> None:
    async with accepted() as (stream, peer), trio.open_nursery() as nursery:
        nursery.start_soon(peer.stream.aclose)
        assert await stream.wait_broken()
        assert await stream.wait_broken()


async def test_who_waits_for_a_break_hears_of_it_when_both_halves_have_ended() -> None:
    async with accepted() as (stream, peer), trio.open_nursery() as nursery:
        await peer.say(data(1, b"x", FIN))
        assert await read_all(stream) == b"x"
        await stream.send_eof()
        heard: list[bool] = []

        async def wait() -> None:
            heard.append(await stream.wait_broken())

        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        with trio.move_on_after(0) as giving_up:
            await stream.wait_broken()
        assert giving_up.cancelled_caught
        assert not heard, "that it has ended is no break"
        await peer.stream.aclose()
        await wait_all_tasks_blocked()
        assert heard == [True, True]


async def test_who_waits_for_a_break_hears_of_a_reset_for_memory_when_both_halves_have_ended() -> None:
    async with one(pipe(), heartbeat=NEVER, limits=Limits(unread=1000)) as (running, peer):
        await peer.say(update(1, SYN))
        stream = await running.accept()
        await peer.say(data(1, bytes(900), FIN))
        await stream.send_eof()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def wait() -> None:
                assert await stream.wait_broken()
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()

            await wait_all_tasks_blocked()
            await peer.say(data(3, bytes(200), SYN))
        await running.accept()


async def test_a_lost_connection_can_be_raised_again_and_again() -> None:
    async with accepted() as (stream, peer):
        await peer.stream.aclose()
        await wait_all_tasks_blocked()
        await raise_again_and_again(stream.receive_some, trio.BrokenResourceError)
        with pytest.raises(trio.BrokenResourceError) as lost:
            await stream.send_all(b"x")
        assert lost.value.__cause__ is not None
        assert lost.value.__cause__.__traceback__ is None


async def test_draining_waits_for_what_is_queued() -> None:
    async with accepted() as (stream, peer), trio.open_nursery() as nursery:
        await stream.wait_flushed()
        await stream.send_all(bytes(FULL))
        drained = trio.Event()

        async def drain() -> None:
            await stream.wait_flushed()
            drained.set()

        nursery.start_soon(drain)
        await wait_all_tasks_blocked()
        await peer.say(update(1, credit=SEND_BOUND - 1))
        await wait_all_tasks_blocked()
        assert not drained.is_set()
        await peer.say(update(1, credit=1))
        await drained.wait()


@pytest.mark.parametrize("how", ["reset", "lost", "closed here"])
async def test_draining_ends_when_nothing_will_leave_any_more(how: str) -> None:
    async with accepted() as (stream, peer), trio.open_nursery() as nursery:
        await stream.send_all(bytes(FULL))
        nursery.start_soon(stream.wait_flushed)
        await wait_all_tasks_blocked()
        if how == "reset":
            await peer.say(update(1, RST))
        elif how == "lost":
            await peer.stream.aclose()
        else:
            stream.reset()


# What it is


async def test_many_streams_share_a_connection_in_both_directions() -> None:
    async with two(pipe(), heartbeat=NEVER) as both, trio.open_nursery() as nursery:
        for role, number in ((role, number) for role in Role for number in range(20)):
            opener, acceptor = both if role is Role.CLIENT else both[::-1]
            near = await opener.open()
            nursery.start_soon(echo, await acceptor.accept())
            nursery.start_soon(send_and_end, near, body(10 * KIB, number))
            assert await read_all(near) == body(10 * KIB, number)
            await near.aclose()


@pytest.mark.skipif(not CAN_WATCH, reason="there is no epoll here")
async def test_a_watched_stream_calls_back_and_neither_receives_nor_sends_by_waiting() -> None:
    async with pair() as (near, far, _):
        calls: list[None] = []
        buffer = memoryview(bytearray(16))
        with Reactor.current().stay():
            assert near.watch(lambda: calls.append(None)) is near
            assert near.receive_into_nowait(buffer) is None
            await far.send_all(b"word")
            await wait_all_tasks_blocked()
            assert calls
            assert near.receive_into_nowait(buffer) == 4
            assert bytes(buffer[:4]) == b"word"
            pieces = [bytes(16 * KIB)] * 100
            left = near.send_nowait(pieces)
            assert 0 < len(left) < 100
            async with trio.open_nursery() as nursery:
                nursery.start_soon(near.send_pieces, left)  # a task may wait for room meanwhile
                for _ in range(100):
                    received = 0
                    while received < 16 * KIB:
                        received += len(await far.receive_some(16 * KIB - received))
            calls.clear()
            await far.send_eof()
            await wait_all_tasks_blocked()
            assert calls
            assert near.receive_into_nowait(buffer) == 0
            near.unwatch()
        near.reset()
        with pytest.raises(trio.ClosedResourceError):
            near.send_nowait([b"late"])


@pytest.mark.skipif(not CAN_WATCH, reason="there is no epoll here")
async def test_a_watched_stream_calls_back_when_it_breaks() -> None:
    async with pair() as (near, far, _):
        calls: list[None] = []
        with Reactor.current().stay():
            near.watch(lambda: calls.append(None))
            far.reset()
            await wait_all_tasks_blocked()
            assert calls
            with pytest.raises(trio.BrokenResourceError):
                near.receive_into_nowait(memoryview(bytearray(1)))
            near.unwatch()


async def test_it_says_what_it_is() -> None:
    async with pair() as (near, _, _):
        assert repr(near) == "<YamuxStream 1>"
        await near.aclose()
        assert repr(near) == "<YamuxStream 1 closed>"
