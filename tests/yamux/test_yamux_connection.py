"""`yamux.connection`: it carries streams, opens them, and gives all of them their turns."""

from __future__ import annotations

import gc
import hashlib
import itertools
import random
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import pytest
import trio
from rig import until_it_raises
from trio.testing import MockClock, wait_all_tasks_blocked
from yamux_rig import (
    KIB,
    NEVER,
    WINDOW_UPDATE,
    Ends,
    Frame,
    answer_correctly,
    ask,
    body,
    data,
    echo,
    one,
    pipe,
    read_all,
    send_and_end,
    sockets,
    two,
    update,
)

from pioneer_tunnel.yamux import Limits, Role, YamuxStream
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW
from pioneer_tunnel.yamux.frames import ACK, RST, SYN
from pioneer_tunnel.yamux.session import MAX_UNACKNOWLEDGED


async def in_memory() -> Ends:
    return pipe()


async def cut_anywhere() -> Ends:
    return pipe(capacity=5000, dice=random.Random(0))


over_anything = pytest.mark.parametrize("make_ends", [in_memory, cut_anywhere, sockets])


# Carrying


@over_anything
@pytest.mark.parametrize("size", [0, 1, INITIAL_WINDOW - 1, INITIAL_WINDOW + 1, 1_500_000])
async def test_what_is_sent_arrives_and_so_does_the_end(make_ends: Callable[[], Awaitable[Ends]], size: int) -> None:
    async with two(await make_ends()) as both:
        near, far = await both.stream()
        async with near, far, trio.open_nursery() as nursery:

            async def expect(stream: YamuxStream, expected: bytes) -> None:
                assert await read_all(stream) == expected

            nursery.start_soon(send_and_end, near, body(size, 1))
            nursery.start_soon(send_and_end, far, body(size, 2))
            nursery.start_soon(expect, far, body(size, 1))
            nursery.start_soon(expect, near, body(size, 2))
        await both.settle()


@pytest.mark.parametrize("opener", [0, 1])
async def test_either_end_may_open(opener: int) -> None:
    async with two(pipe()) as both, trio.open_nursery() as nursery:
        near = await both[opener].open()
        nursery.start_soon(answer_correctly, near, b"hello")
        await echo(await both[1 - opener].accept())


async def test_a_thousand_streams_at_once_bring_what_was_sent() -> None:
    async with two(await sockets()) as both, trio.open_nursery() as nursery:
        nursery.start_soon(both.server.serve_echo)
        right = 0

        async def visit(number: int) -> None:
            nonlocal right
            question = body(random.Random(number).choice([1, 100, 3000, 30_000]), number)
            async with await both.client.open() as stream:
                answer = await ask(stream, question)
            right += hashlib.sha256(answer).digest() == hashlib.sha256(question).digest()

        async with trio.open_nursery() as visitors:
            for number in range(1000):
                visitors.start_soon(visit, number)
        assert right == 1000
        await both.settle()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("capacity", [1, 7, 100, 4096])
async def test_a_tiny_pipe_never_deadlocks(capacity: int, autojump_clock: MockClock) -> None:
    """Both ends send and receive at once over a pipe that holds a few bytes.

    An end whose reader waited for its writer would stop reading while the other end does the same. The mock clock
    jumps as soon as everybody waits, so a deadlock fails at once.
    """
    size = min(capacity * 400, 2 * INITIAL_WINDOW)
    with trio.fail_after(1000):
        async with two(pipe(capacity, random.Random(0)), heartbeat=NEVER) as both, trio.open_nursery() as nursery:
            for opener, number in itertools.product((0, 1), range(2)):
                nursery.start_soon(answer_correctly, await both[opener].open(), body(size, number))
                nursery.start_soon(echo, await both[1 - opener].accept())


async def test_a_reader_that_reads_nothing_holds_up_nobody_else(autojump_clock: MockClock) -> None:
    async with two(pipe(), limits=Limits(window_growth=0)) as both, trio.open_nursery() as nursery:
        stuck, unread = await both.stream()
        nursery.start_soon(send_and_end, stuck, body(2 * INITIAL_WINDOW))
        await wait_all_tasks_blocked()
        assert both.server.session.unread == INITIAL_WINDOW
        for number in range(20):
            near, far = await both.stream()
            nursery.start_soon(echo, far)
            await answer_correctly(near, body(400 * KIB, number))
        assert both.server.session.unread == INITIAL_WINDOW
        assert await read_all(unread) == body(2 * INITIAL_WINDOW)


async def test_a_bulk_stream_delays_a_small_one_by_little_on_a_slow_path(autojump_clock: MockClock) -> None:
    """The path takes 16 KiB in 10 ms. A word waits for the batch under way, and then for one turn at most."""
    ends = pipe()
    async with two(ends, heartbeat=NEVER) as both, trio.open_nursery() as nursery:
        delays: list[float] = []

        async def chat(words: int) -> None:
            for _ in range(words):
                asked_at = trio.current_time()
                await small.send_all(b"quick")
                assert await small.receive_some() == b"quick"
                delays.append(trio.current_time() - asked_at)
                await trio.sleep(0.01)

        async def trickle() -> None:
            ends[0].outbound.allow(0)
            while True:
                ends[0].outbound.allow(ends[0].outbound.allowance + 16 * KIB)
                await trio.sleep(0.01)

        small, far = await both.stream()
        bulk, sink = await both.stream()
        nursery.start_soon(echo, far)
        nursery.start_soon(read_all, sink)
        await chat(50)  # that these words are quick must not make the writer think that the path is
        nursery.start_soon(trickle)
        nursery.start_soon(send_and_end, bulk, body(8 * INITIAL_WINDOW))
        await trio.sleep(0.02)
        await chat(20)
        assert bulk.usable
        assert max(delays) < 0.065  # the first batch has 64 KiB
        assert max(delays[-10:]) < 0.025
        nursery.cancel_scope.cancel()


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
                await answer_correctly(await both.client.open(), body(1000, number))
            await both.settle()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = await visits(100)
            after = await visits(200)
        finally:
            tracemalloc.stop()
        assert after - before < 32 * KIB, "a stream leaves less than 160 bytes"
        nursery.cancel_scope.cancel()


async def test_memory_is_flat_over_one_long_stream() -> None:
    """Of 64 MiB that pass, at any time only windows and batches are held."""
    async with two(await sockets(), limits=Limits(stream_window=1024 * KIB)) as both, trio.open_nursery() as nursery:
        near, far = await both.stream()
        piece, count = body(256 * KIB), 256

        async def send() -> None:
            for _ in range(count):
                await near.send_all(piece)
            await near.send_eof()

        received = 0
        tracemalloc.start()
        try:
            nursery.start_soon(send)
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
        for count, frame in enumerate((update(1, ACK), update(3, RST), data(5, b"x", ACK)), 1):
            await peer.say(frame)
            await wait_all_tasks_blocked()
            assert len(opened) == MAX_UNACKNOWLEDGED + count
        opened[10].reset()
        await wait_all_tasks_blocked()
        assert len(opened) == MAX_UNACKNOWLEDGED + 4
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
    async with one(pipe(), heartbeat=NEVER) as (running, peer):
        await trio.sleep(7.5)
        await peer.say(data(1, b"hello", SYN))
        while await peer.hear() != Frame(WINDOW_UPDATE, RST, 1, 0):
            pass
        assert trio.current_time() == 37.5
        assert not (await running.arrivals.receive()).usable


async def test_an_opening_for_which_there_is_no_room_is_reset() -> None:
    def no_room(stream: YamuxStream) -> None:
        raise trio.WouldBlock

    async with one(pipe(), on_stream=no_room) as (running, peer):
        await peer.say(data(1, b"hello", SYN))
        assert (await peer.hear_ping()).flags == SYN
        assert await peer.hear() == Frame(WINDOW_UPDATE, RST, 1, 0)
        assert running.session.live_streams == []


@pytest.mark.parametrize("limits", [None, Limits(), Limits(unaccepted=1000)])
async def test_an_end_that_takes_no_streams_resets_every_opening(limits: Limits | None) -> None:
    async with one(pipe(), on_stream=None, limits=limits) as (running, peer):
        await peer.hear_ping()
        await peer.say(data(1, b"hello", SYN), update(3, SYN))
        assert await peer.hear() == Frame(WINDOW_UPDATE, RST, 1, 0)
        assert await peer.hear() == Frame(WINDOW_UPDATE, RST, 3, 0)
        assert not running.ended.is_set()


# Turns: how many handlers begin or end before other tasks run


class Passes(trio.abc.Instrument):
    """Counts the passes of the event loop, and how often `note` was called in each."""

    def __init__(self) -> None:
        self.notes: Counter[int] = Counter()
        self._pass = 0
        trio.lowlevel.add_instrument(self)

    def after_io_wait(self, timeout: float) -> None:
        self._pass += 1

    def note(self) -> None:
        self.notes[self._pass] += 1

    def most(self) -> int:
        return max(self.notes.values())


MANY: Final = 640


@pytest.mark.parametrize("how", ["resets", "the link is lost"])
async def test_many_streams_that_end_at_once_let_their_handlers_end_in_turns(how: str) -> None:
    """Found by an attack: thousands of handlers ended in one pass of the event loop, which took two seconds."""
    passes = Passes()

    async def handle(stream: YamuxStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await until_it_raises(stream.receive_some)
        passes.note()

    ends = pipe()
    async with trio.open_nursery() as nursery, one(ends, heartbeat=NEVER) as (running, peer):
        nursery.start_soon(suppressed, peer.hear_all)
        for number in range(MANY):
            await peer.say(update(1 + 2 * number, SYN))
            nursery.start_soon(handle, await running.accept())
        await wait_all_tasks_blocked()
        if how == "resets":
            await peer.say(*(update(1 + 2 * number, RST) for number in range(MANY)))
        else:
            await peer.stream.aclose()
        while passes.notes.total() < MANY:
            await trio.lowlevel.checkpoint()
    assert passes.most() < 100


async def test_many_openings_at_once_are_handed_on_in_turns() -> None:
    passes = Passes()
    async with (
        one(pipe(), heartbeat=NEVER, on_stream=lambda _: passes.note()) as (_, peer),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(suppressed, peer.hear_all)
        await peer.say(*(update(1 + 2 * number, SYN) for number in range(256)))
        while passes.notes.total() < 256:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert passes.most() < 100


async def test_openings_that_are_taken_back_at_once_are_not_handed_on() -> None:
    handed_on: list[YamuxStream] = []
    async with one(pipe(), heartbeat=NEVER, on_stream=handed_on.append) as (running, peer):
        for number in range(100):
            opening = update(1 + 4 * number, SYN) if number % 2 else data(1 + 4 * number, b"hello", SYN)
            await peer.say(opening, update(1 + 4 * number, RST))
        await peer.say(update(3, SYN))
        await wait_all_tasks_blocked()
        assert len(handed_on) == 1
        assert running.session.unread == 0


async def test_many_writers_that_get_room_at_once_all_go_on() -> None:
    """More of them than a turn wakes: the rest is woken without anything else happening."""
    async with one(pipe(), heartbeat=NEVER) as (running, peer), trio.open_nursery() as nursery:
        nursery.start_soon(suppressed, peer.hear_all)
        done = 0

        async def send(stream: YamuxStream) -> None:
            nonlocal done
            await stream.send_all(bytes(INITIAL_WINDOW + 100 * KIB))
            done += 1

        for number in range(100):
            await peer.say(update(1 + 2 * number, SYN))
            nursery.start_soon(send, await running.accept())
        await wait_all_tasks_blocked()
        assert done == 0
        await peer.say(*(update(1 + 2 * number, credit=100 * KIB) for number in range(100)))
        await wait_all_tasks_blocked()
        assert done == 100
        nursery.cancel_scope.cancel()


async def suppressed(listen: Callable[[], Awaitable[object]]) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await listen()
