"""`yamux.stream`: a yamux stream is a Trio stream that sends and receives."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio
from rig import run_until_it_waits
from trio.testing import MockClock, assert_checkpoints, check_half_closeable_stream, wait_all_tasks_blocked
from yamux_rig import (
    FULL,
    KIB,
    NEVER,
    Ends,
    accepted,
    body,
    data,
    echo,
    pair,
    pipe,
    read_all,
    send_and_end,
    sockets,
    two,
    update,
)

from pioneer_tunnel.yamux import Role, YamuxStream
from pioneer_tunnel.yamux.frames import FIN, RST

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


async def test_it_says_what_it_is() -> None:
    async with pair() as (near, _, _):
        assert repr(near) == "<YamuxStream 1>"
        await near.aclose()
        assert repr(near) == "<YamuxStream 1 closed>"


async def test_what_is_not_read_outlives_the_buffer_of_the_link() -> None:
    async with accepted() as (stream, peer):
        for seed in (1, 2):
            await peer.say(data(1, body(2 * KIB, seed)))
            await trio.testing.wait_all_tasks_blocked()
        assert await stream.receive_some() == body(2 * KIB, 1) + body(2 * KIB, 2)
