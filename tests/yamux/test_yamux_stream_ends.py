"""`yamux.stream`: closing, resets, lost connections, and waiting for one of them."""

from __future__ import annotations

from collections.abc import Awaitable

import pytest
import trio
from rig import raise_again_and_again, run_until_it_waits
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked
from yamux_rig import (
    DATA,
    FULL,
    NEVER,
    PING,
    WINDOW_UPDATE,
    Frame,
    accepted,
    body,
    data,
    one,
    pair,
    pipe,
    read_all,
    two,
    update,
)

from pioneer_tunnel.yamux import Limits, YamuxStream
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW, SEND_BOUND
from pioneer_tunnel.yamux.frames import FIN, RST, SYN
from pioneer_tunnel.yamux.session import ANSWER_TIMEOUT, CLOSE_TIMEOUT

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
