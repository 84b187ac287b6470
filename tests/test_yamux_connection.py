"""`yamux.connection`: what the three tasks promise. Time is Trio's mock clock, except over sockets."""

from __future__ import annotations

import gc
import hashlib
import itertools
import random
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Final

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from yamux_rig import (
    KIB,
    Ends,
    Frame,
    Running,
    ask,
    data,
    echo,
    go_away,
    one,
    pipe,
    read_all,
    send_and_end,
    sockets,
    two,
    update,
)

from pioneer_tunnel.yamux import Limits, Role, YamuxConnection, YamuxStream
from pioneer_tunnel.yamux.connection import GOODBYE_TIMEOUT, STALL_TIMEOUT
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW
from pioneer_tunnel.yamux.frames import ACK, RST, SYN, FrameType, GoAwayCode
from pioneer_tunnel.yamux.session import MAX_UNACKNOWLEDGED
from pioneer_tunnel.yamux.stream_state import LOW_WATER

DATA, WINDOW_UPDATE, PING, GO_AWAY = FrameType
HEARTBEAT: Final = 15.0


async def in_memory() -> Ends:
    return pipe()


async def cut_anywhere() -> Ends:
    return pipe(capacity=5000, dice=random.Random(0))


ways = pytest.mark.parametrize("make_ends", [in_memory, cut_anywhere, sockets])
Maker = Callable[[], Awaitable[Ends]]


def body(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


async def forget_the_ping(running: Running) -> None:
    """The ping that measures the round trip at the start is out of the way."""
    await wait_all_tasks_blocked()
    assert running.session.round_trip is None


# Carrying


@ways
@pytest.mark.parametrize("size", [0, 1, INITIAL_WINDOW - 1, INITIAL_WINDOW + 1, 1_500_000])
async def test_what_is_sent_arrives_both_ways_and_so_does_the_end(make_ends: Maker, size: int) -> None:
    async with two(await make_ends()) as both:
        near, far = await both.stream()
        forth, back = body(size, 1), body(size, 2)
        received: list[bytes] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_end, near, forth)
            nursery.start_soon(send_and_end, far, back)
            for stream in (near, far):
                received.append(await read_all(stream)) if size < LOW_WATER else nursery.start_soon(
                    keep, stream, received
                )
        assert sorted(received) == sorted([forth, back])
        await near.aclose()
        await far.aclose()
        await both.settle()


async def keep(stream: YamuxStream, received: list[bytes]) -> None:
    received.append(await read_all(stream))


@pytest.mark.parametrize("opener", [0, 1])
async def test_either_end_may_open(opener: int) -> None:
    async with two(pipe()) as both:
        near = await both[opener].open()
        async with near:
            await near.send_all(b"hello")
            far = await both[1 - opener].accept()
            assert await far.receive_some() == b"hello"
            await far.aclose()


async def test_a_thousand_streams_at_once_bring_what_was_sent() -> None:
    async with two(await sockets()) as both, trio.open_nursery() as nursery:
        nursery.start_soon(both.server.serve_echo)
        hashes: list[tuple[bytes, bytes]] = []

        async def visit(number: int) -> None:
            question = body(random.Random(number).choice([1, 100, 3000, 30_000]), number)
            async with await both.client.open() as stream:
                answer = await ask(stream, question)
            hashes.append((hashlib.sha256(question).digest(), hashlib.sha256(answer).digest()))

        async with trio.open_nursery() as visitors:
            for number in range(1000):
                visitors.start_soon(visit, number)
        assert len(hashes) == 1000
        assert all(asked == answered for asked, answered in hashes)
        await both.settle()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("capacity", [1, 7, 100, 4096])
async def test_a_tiny_pipe_never_deadlocks(capacity: int, autojump_clock: MockClock) -> None:
    """Both ends send and receive at once over a pipe that holds a few bytes.

    An end whose reader waited for its writer would stop reading while the other end does the same. The mock clock
    jumps as soon as everybody waits, so a deadlock fails at once.
    """
    size = min(capacity * 2000, 2 * INITIAL_WINDOW)
    with trio.fail_after(1000):
        async with two(pipe(capacity, random.Random(0)), heartbeat=1e6) as both, trio.open_nursery() as nursery:
            for opener, number in itertools.product(both, range(2)):
                near = await opener.open()
                far = await (both.server if opener is both.client else both.client).accept()
                nursery.start_soon(answer_correctly, near, body(size, number))
                nursery.start_soon(echo, far)


async def answer_correctly(stream: YamuxStream, question: bytes) -> None:
    async with stream:
        assert await ask(stream, question) == question


async def test_a_reader_that_reads_nothing_holds_up_nobody_else(autojump_clock: MockClock) -> None:
    async with two(pipe(), limits=Limits(window_growth=0)) as both, trio.open_nursery() as nursery:
        stuck, unread = await both.stream()
        nursery.start_soon(send_and_end, stuck, body(2 * INITIAL_WINDOW))
        await wait_all_tasks_blocked()
        assert both.server.session.unread == INITIAL_WINDOW
        for number in range(20):
            near, far = await both.stream()
            nursery.start_soon(echo, far)
            await answer_correctly(near, body(100 * KIB, number))
        assert both.server.session.unread == INITIAL_WINDOW
        assert await read_all(unread) == body(2 * INITIAL_WINDOW)


async def test_a_stream_is_handed_on_with_everything_that_came_with_it() -> None:
    had: list[bytes | None] = []

    def look(stream: YamuxStream) -> None:
        had.append(stream.receive_nowait(100))

    async with one(pipe(), on_stream=look) as (_, peer):
        await peer.say(data(1, b"hello", SYN), data(1, b" world"), update(3, SYN))
        await wait_all_tasks_blocked()
        assert had == [b"hello world", None]


async def test_memory_is_flat_over_many_streams() -> None:
    async with two(pipe()) as both, trio.open_nursery() as nursery:
        nursery.start_soon(both.server.serve_echo)

        async def visits(count: int) -> int:
            for number in range(count):
                async with await both.client.open() as stream:
                    await ask(stream, body(1000, number))
            await both.settle()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = await visits(100)
            after = await visits(400)
        finally:
            tracemalloc.stop()
        assert after - before < 64 * KIB
        nursery.cancel_scope.cancel()


async def test_memory_is_flat_over_one_long_stream() -> None:
    """64 MiB pass, and what is held at any time is windows and batches."""
    async with two(await sockets(), limits=Limits(stream_window=1024 * KIB)) as both, trio.open_nursery() as nursery:
        near, far = await both.stream()
        piece, count = body(256 * KIB), 256

        async def send() -> None:
            for _ in range(count):
                await near.send_all(piece)
            await near.send_eof()

        tracemalloc.start()
        try:
            nursery.start_soon(send)
            received = 0
            while some := await far.receive_some():
                received += len(some)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert received == count * len(piece)
        assert peak < 6 * 1024 * KIB


# Openings


async def test_an_opener_waits_while_256_are_not_acknowledged() -> None:
    async with one(pipe(), Role.CLIENT) as (running, peer), trio.open_nursery() as nursery:
        opened: list[YamuxStream] = []

        async def keep_opening() -> None:
            while True:
                opened.append(await running.open())

        nursery.start_soon(keep_opening)
        await wait_all_tasks_blocked()
        assert len(opened) == MAX_UNACKNOWLEDGED
        for frame, allowed in ((update(1, ACK), 257), (update(3, RST), 258), (data(5, b"x", ACK), 259)):
            await peer.say(frame)
            await wait_all_tasks_blocked()
            assert len(opened) == allowed
        opened[10].reset()
        await wait_all_tasks_blocked()
        assert len(opened) == 260
        nursery.cancel_scope.cancel()


async def test_an_opener_that_gives_up_takes_nobody_s_place() -> None:
    async with one(pipe(), Role.CLIENT) as (running, peer), trio.open_nursery() as nursery:
        for _ in range(MAX_UNACKNOWLEDGED):
            await running.open()
        impatient = trio.CancelScope()

        async def give_up() -> None:
            with impatient:
                await running.open()

        nursery.start_soon(give_up)
        await wait_all_tasks_blocked()
        nursery.start_soon(running.open)
        await wait_all_tasks_blocked()
        impatient.cancel()
        await peer.say(update(1, ACK))
        await wait_all_tasks_blocked()
        assert len(running.session.live_streams) == MAX_UNACKNOWLEDGED + 1


async def test_an_opening_that_nobody_accepts_is_reset_after_30_seconds(autojump_clock: MockClock) -> None:
    async with one(pipe(), heartbeat=1000.0) as (running, peer):
        await trio.sleep(7.5)
        await peer.say(data(1, b"hello", SYN))
        frame = await peer.hear()
        assert frame is not None
        assert frame.type == PING
        assert await peer.hear() == Frame(PING, SYN, 0, 2)  # streams are there, so the round trip is measured again
        for _ in range(2):
            assert (await peer.hear() or frame).type == PING
        assert await peer.hear() == Frame(WINDOW_UPDATE, RST, 1, 0)
        assert trio.current_time() == 37.5
        assert not (await running.arrivals.receive()).usable


async def test_an_opening_for_which_there_is_no_room_is_reset() -> None:
    def no_room(stream: YamuxStream) -> None:
        raise trio.WouldBlock

    async with one(pipe(), on_stream=no_room) as (running, peer):
        await peer.hear()
        await peer.say(data(1, b"hello", SYN))
        assert await peer.hear() == Frame(WINDOW_UPDATE, RST, 1, 0)
        assert running.session.live_streams == []


@pytest.mark.parametrize("limits", [None, Limits(), Limits(unaccepted=1000)])
async def test_an_end_that_takes_no_streams_resets_every_opening(limits: Limits | None) -> None:
    async with one(pipe(), on_stream=None, limits=limits) as (running, peer):
        await peer.hear()
        await peer.say(data(1, b"hello", SYN), update(3, SYN))
        assert await peer.hear() == Frame(WINDOW_UPDATE, RST, 1, 0)
        assert await peer.hear() == Frame(WINDOW_UPDATE, RST, 3, 0)
        assert not running.ended.is_set()


# Heartbeat


@pytest.mark.parametrize(
    ("start", "heartbeat"),
    [(0.0, 15.0), (0.7, 0.1), (1234.567, 0.3)],  # sums of the latter two are no round numbers in binary
)
async def test_silence_is_met_by_a_ping_and_twice_as_long_by_the_end(
    start: float, heartbeat: float, autojump_clock: MockClock
) -> None:
    await trio.sleep(start)
    async with one(pipe(), heartbeat=heartbeat) as (running, peer):
        begin = trio.current_time()
        assert await peer.hear() == Frame(PING, SYN, 0, 1)  # measures the round trip
        assert trio.current_time() == begin
        if heartbeat > 10:
            await trio.sleep_until(begin + 14.9)
            assert not peer_has_more(running)
        frame = await peer.hear()
        assert frame is not None
        assert frame.type == PING
        assert trio.current_time() == begin + heartbeat
        await running.ended.wait()
        assert trio.current_time() == begin + 2 * heartbeat
        assert isinstance(running.ending, trio.BrokenResourceError)
        assert f"no byte came for {2 * heartbeat:g} seconds" in str(running.ending)


def peer_has_more(running: Running) -> bool:
    return running.session.has_work


async def test_a_peer_that_answers_pings_lives(autojump_clock: MockClock) -> None:
    async with two(pipe(), heartbeat=HEARTBEAT) as both:
        await trio.sleep(100 * HEARTBEAT)
        assert not both.client.ended.is_set()
        assert not both.server.ended.is_set()
        assert both.client.round_trips


async def test_any_byte_is_a_sign_of_life(autojump_clock: MockClock) -> None:
    async with one(pipe(), heartbeat=HEARTBEAT) as (running, peer):
        for byte in data(1, bytes(30), SYN):
            await trio.sleep(2 * HEARTBEAT - 1)
            await peer.stream.send_all(bytes([byte]))
        assert not running.ended.is_set()


async def test_who_is_busy_is_not_pinged_for_silence(autojump_clock: MockClock) -> None:
    async with one(pipe(), heartbeat=HEARTBEAT) as (running, peer):
        await peer.hear()
        for _ in range(20):
            await trio.sleep(HEARTBEAT - 1)
            await peer.say(update(0xFFFF, 0) if False else go_away(0))
        running.scope.cancel()
        assert [frame for frame in await peer.hear_all() if frame.type == PING] == []


async def test_the_round_trip_is_measured_while_there_are_streams(autojump_clock: MockClock) -> None:
    async with two(pipe()) as both:
        await both.stream()
        await trio.sleep(60)
        assert len(both.client.round_trips) == 7
        assert both.client.session.round_trip == 0


# Writes that stall


async def test_a_write_that_makes_no_progress_ends_the_session(autojump_clock: MockClock) -> None:
    ends = pipe(capacity=64 * KIB)
    async with two(ends, heartbeat=1e6) as both:
        near, _ = await both.stream()
        ends[0].outbound.allow(0)
        begin = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await near.send_all(body(INITIAL_WINDOW))
        assert isinstance(both.client.ending, trio.BrokenResourceError)
        assert f"took no byte for {STALL_TIMEOUT:g} seconds" in str(both.client.ending)
        # Nothing can be said any more, so nothing is waited for.
        assert begin + STALL_TIMEOUT <= trio.current_time() <= begin + STALL_TIMEOUT + GOODBYE_TIMEOUT


async def test_a_write_that_makes_progress_may_take_its_time(autojump_clock: MockClock) -> None:
    """A slow path is slow, a dead one is dead."""
    ends = pipe(capacity=64 * KIB)
    async with two(ends, heartbeat=1e6) as both, trio.open_nursery() as nursery:
        near, far = await both.stream()
        await wait_all_tasks_blocked()
        ends[0].outbound.allow(0)
        nursery.start_soon(send_and_end, near, body(INITIAL_WINDOW))
        for _ in range(8):
            await trio.sleep(STALL_TIMEOUT - 1)
            assert not both.client.ended.is_set()
            ends[0].outbound.allow(64 * KIB)
        assert await read_all(far) == body(INITIAL_WINDOW)
        assert trio.current_time() > 5 * STALL_TIMEOUT


async def test_progress_on_a_socket_is_seen_to_the_byte(mock_clock: MockClock) -> None:
    """A batch that takes longer than any deadline, a few KiB at a time."""
    near, far = await sockets()
    async with two((near, pipe()[0]), heartbeat=1e6) as both:
        stream = await both.client.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_end, stream, body(INITIAL_WINDOW))
            nursery.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        del far


# Endings


async def test_a_cancelled_session_says_goodbye() -> None:
    async with one(pipe()) as (running, peer):
        stream = await running.open()
        await stream.send_all(b"the last words")
        await wait_all_tasks_blocked()
        running.scope.cancel()
        frames = await peer.hear_all()
        assert frames[-2:] == [Frame(DATA, SYN, 2, 14, b"the last words"), Frame(GO_AWAY, 0, 0, GoAwayCode.NORMAL)]
        await running.ended.wait()
        assert running.ending is None
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")


@pytest.mark.parametrize("slow", [0.0, 0.4, 0.9])
async def test_a_goodbye_cuts_no_frame_that_can_be_finished(slow: float, autojump_clock: MockClock) -> None:
    ends = pipe(capacity=1000)
    async with one(ends) as (running, peer):
        stream = await running.open()
        await peer.hear()
        ends[0].outbound.allow(500)
        await stream.send_all(body(40_000))
        await wait_all_tasks_blocked()
        begin = trio.current_time()
        running.scope.cancel()
        await trio.sleep(slow)
        ends[0].outbound.allow(float("inf"))
        frames = await peer.hear_all()
        assert b"".join(frame.body for frame in frames) == body(40_000)
        assert frames[-1] == Frame(GO_AWAY, 0, 0, GoAwayCode.NORMAL)
        await running.ended.wait()
        assert trio.current_time() - begin <= GOODBYE_TIMEOUT


async def test_a_goodbye_takes_no_longer_than_a_second(autojump_clock: MockClock) -> None:
    ends = pipe(capacity=1000)
    async with one(ends) as (running, _):
        stream = await running.open()
        await wait_all_tasks_blocked()
        ends[0].outbound.allow(0)
        await stream.send_all(body(40_000))
        await wait_all_tasks_blocked()
        begin = trio.current_time()
        running.scope.cancel()
        await running.ended.wait()
        assert trio.current_time() == begin + GOODBYE_TIMEOUT


async def test_a_goodbye_that_finds_the_link_full_takes_no_longer_than_a_second(autojump_clock: MockClock) -> None:
    ends = pipe(capacity=1000)
    async with one(ends) as (running, _):
        await wait_all_tasks_blocked()
        ends[0].outbound.allow(0)
        begin = trio.current_time()
        running.scope.cancel()
        await running.ended.wait()
        assert trio.current_time() == begin + GOODBYE_TIMEOUT


async def test_a_link_that_breaks_during_the_goodbye_is_no_error(autojump_clock: MockClock) -> None:
    """Who cancels gets a cancellation, whatever else happens on the way out."""
    ends = pipe(capacity=1000)
    connection = YamuxConnection(running_link(ends), Role.SERVER, heartbeat=HEARTBEAT)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(break_after, scope, ends, connection)
            await connection.run()
        assert scope.cancelled_caught


def running_link(ends: Ends) -> object:
    raise NotImplementedError


async def break_after(scope: trio.CancelScope, ends: Ends, connection: YamuxConnection) -> None:
    raise NotImplementedError
