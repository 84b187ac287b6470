"""`yamux.connection`: what its three tasks promise. Time is Trio's mock clock, except where there are sockets."""

from __future__ import annotations

import gc
import hashlib
import itertools
import random
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, final

import pytest
import trio
from rig import no_hang, until_it_raises
from trio.testing import MockClock, wait_all_tasks_blocked
from yamux_rig import (
    KIB,
    Ends,
    Frame,
    HandmadePeer,
    PipeEnd,
    Running,
    ask,
    body,
    data,
    echo,
    go_away,
    one,
    parse,
    pipe,
    read_all,
    send_and_end,
    sockets,
    two,
    update,
)

from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel._net.delivery import Delivery
from pioneer_tunnel._net.link import Bytes, Link
from pioneer_tunnel.yamux import Limits, Role, YamuxConnection, YamuxStream
from pioneer_tunnel.yamux.connection import GOODBYE_TIMEOUT, STALL_TIMEOUT
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW
from pioneer_tunnel.yamux.frames import ACK, HEADER_SIZE, RST, SYN, FrameType, GoAwayCode, encode_header
from pioneer_tunnel.yamux.pacing import FIRST_BATCH
from pioneer_tunnel.yamux.session import MAX_UNACKNOWLEDGED

DATA, WINDOW_UPDATE, PING, GO_AWAY = FrameType
HEARTBEAT: Final = 15.0
NEVER: Final = 1e6
"""A heartbeat that does not disturb a test on something else."""

GOODBYE: Final = Frame(GO_AWAY, 0, 0, GoAwayCode.NORMAL)


async def in_memory() -> Ends:
    return pipe()


async def cut_anywhere() -> Ends:
    return pipe(capacity=5000, dice=random.Random(0))


over_anything = pytest.mark.parametrize("make_ends", [in_memory, cut_anywhere, sockets])


async def answer_correctly(stream: YamuxStream, question: bytes) -> None:
    """Ask an echo at the other end."""
    async with stream:
        assert await ask(stream, question) == question


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
    size = min(capacity * 1000, 2 * INITIAL_WINDOW)
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
            after = await visits(400)
        finally:
            tracemalloc.stop()
        assert after - before < 64 * KIB
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


# The heartbeat


@pytest.mark.parametrize(
    ("start", "heartbeat"),
    [(0.0, HEARTBEAT), (0.7, 0.1), (1234.567, 0.3)],  # sums of the latter are not what they seem, in binary
)
async def test_silence_is_met_by_a_ping_and_after_twice_as_long_by_the_end(
    start: float, heartbeat: float, autojump_clock: MockClock
) -> None:
    await trio.sleep_until(start)
    async with one(pipe(), heartbeat=heartbeat) as (running, peer):
        assert [await time_of_ping(peer) for _ in range(2)] == [start, start + heartbeat]
        assert await peer.hear_all() == []
        assert trio.current_time() == start + 2 * heartbeat
        await running.ended.wait()
        assert isinstance(running.ending, trio.BrokenResourceError)
        assert f"no byte came for {2 * heartbeat:g} seconds" in str(running.ending)


async def time_of_ping(peer: HandmadePeer) -> float:
    await peer.hear_ping()
    return trio.current_time()


async def test_a_peer_that_answers_pings_lives(autojump_clock: MockClock) -> None:
    async with two(pipe(), heartbeat=HEARTBEAT) as both:
        await trio.sleep(100 * HEARTBEAT)
        assert not both.client.ended.is_set()
        assert not both.server.ended.is_set()


async def test_any_byte_is_a_sign_of_life(autojump_clock: MockClock) -> None:
    """Also one in the middle of a frame."""
    async with one(pipe(), heartbeat=HEARTBEAT) as (running, peer):
        for byte in data(1, bytes(30), SYN):
            await trio.sleep(2 * HEARTBEAT - 1)
            await peer.stream.send_all(bytes([byte]))
        assert not running.ended.is_set()


async def test_a_peer_that_is_heard_is_not_asked_for_a_sign_of_life(autojump_clock: MockClock) -> None:
    async with one(pipe(), heartbeat=HEARTBEAT) as (running, peer):
        await peer.hear_ping()
        for _ in range(20):
            await trio.sleep(HEARTBEAT - 1)
            await peer.say(go_away(0))
        running.scope.cancel()
        assert await peer.hear_all() == [GOODBYE]


async def test_the_round_trip_is_measured_every_10_seconds_while_there_is_traffic(autojump_clock: MockClock) -> None:
    """An idle stream is no traffic: an idle link sends nothing but the heartbeat."""
    async with two(pipe(), heartbeat=NEVER) as both:
        await trio.sleep(60)
        assert len(both.client.round_trips) == 1
        near, far = await both.stream()
        await trio.sleep(60)
        assert len(both.client.round_trips) == 2
        for _ in range(60):
            await near.send_all(b"x")
            await trio.sleep(1)
        assert 7 <= len(both.client.round_trips) <= 9
        assert both.client.session.round_trips.shortest == 0
        await near.aclose()
        await far.aclose()


@final
class Doubts:
    """Takes doubts. `restores` is what it answers."""

    def __init__(self, *, restores: bool = False) -> None:
        self.at: Final[list[float]] = []
        self.silences: Final[list[float]] = []
        self.restores = restores

    def __call__(self, silence: float) -> bool:
        self.at.append(trio.current_time())
        self.silences.append(silence)
        return self.restores


def cut(ends: tuple[PipeEnd, PipeEnd]) -> None:
    """Let no byte pass any more."""
    for end in ends:
        end.outbound.allow(0)


async def test_a_path_that_breaks_under_traffic_is_in_doubt_8_seconds_later(autojump_clock: MockClock) -> None:
    """Each second a request and its answer, and a hole in between."""
    ends, doubts = pipe(), Doubts()
    async with two(ends, on_doubt=doubts) as both:
        near, far = await both.stream()
        for _ in range(5):
            await trio.sleep(1)
            await near.send_all(b"request")
            await far.receive_some()
            await far.send_all(b"answer")
        broken_at = trio.current_time()
        cut(ends)
        await both.server.ended.wait()
        assert doubts.at == [broken_at + 8]
        assert doubts.silences == [8]
        assert trio.current_time() == broken_at + 30, "a doubt ends nothing"


async def test_a_path_that_is_broken_when_traffic_begins_is_in_doubt_8_seconds_later(
    autojump_clock: MockClock,
) -> None:
    ends, doubts = pipe(), Doubts()
    async with two(ends, heartbeat=60, on_doubt=doubts) as both:
        _near, far = await both.stream()
        await trio.sleep(100)
        cut(ends)
        began_at = trio.current_time()
        await far.send_all(b"answer")
        await trio.sleep(8.5)
        assert doubts.at == [began_at + 8]


async def test_an_idle_path_that_breaks_is_in_doubt_before_it_is_dead(autojump_clock: MockClock) -> None:
    ends, doubts = pipe(), Doubts()
    async with two(ends, on_doubt=doubts) as both:
        await trio.sleep(100)
        cut(ends)
        broken_at = trio.current_time()
        await both.server.ended.wait()
        assert broken_at + 5 <= doubts.at[0] <= broken_at + 20
        assert broken_at + 15 <= trio.current_time() <= broken_at + 30


async def test_an_idle_link_sends_nothing_more_often_than_the_heartbeat(autojump_clock: MockClock) -> None:
    """Also with open streams. Traffic is followed by one ping."""
    async with one(pipe(), heartbeat=15, on_doubt=Doubts()) as (_running, peer):
        asked: list[float] = []

        async def answer() -> None:
            while (ping := await peer.hear()) is not None:
                if ping.type == PING and ping.flags == SYN:
                    asked.append(trio.current_time())
                    await peer.say(encode_header(PING, ACK, 0, ping.length))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            await trio.sleep(4)
            await peer.say(data(1, b"request", SYN))
            await trio.sleep(100)
            nursery.cancel_scope.cancel()
        assert asked[:3] == [0, 7, 22]
        assert {after - before for before, after in itertools.pairwise(asked[2:])} == {15}


async def test_a_check_that_is_answered_changes_nothing(autojump_clock: MockClock) -> None:
    doubts = Doubts()
    async with two(pipe(), heartbeat=NEVER, on_doubt=doubts) as both:
        await trio.sleep(5)
        before = len(both.server.round_trips)
        both.server.connection.check()
        await trio.sleep(5)
        assert len(both.server.round_trips) == before + 1
        assert doubts.at == []
        assert not both.server.ended.is_set()


async def test_a_check_without_an_answer_ends_the_session_after_2_seconds(autojump_clock: MockClock) -> None:
    ends, doubts = pipe(), Doubts()
    async with two(ends, heartbeat=NEVER, on_doubt=doubts) as both:
        await trio.sleep(5)
        cut(ends)
        both.server.connection.check()
        await both.server.ended.wait()
        assert trio.current_time() <= 7 + GOODBYE_TIMEOUT, "the ping is stuck in the pipe"
        assert doubts.at == [7]
        assert both.server.connection.failed_check
        assert isinstance(both.server.ending, trio.BrokenResourceError)


async def test_a_check_ends_nothing_while_the_link_restores_itself(autojump_clock: MockClock) -> None:
    ends, doubts = pipe(), Doubts(restores=True)
    async with two(ends, on_doubt=doubts) as both:
        await trio.sleep(5)
        cut(ends)
        both.server.connection.check()
        await both.server.ended.wait()
        assert doubts.at == [7]
        assert trio.current_time() >= 30, "the heartbeat decides"
        assert not both.server.connection.failed_check


async def test_given_up_it_ends_at_once(autojump_clock: MockClock) -> None:
    doubts = Doubts()
    async with two(pipe(), on_doubt=doubts) as both:
        await trio.sleep(5)
        both.server.connection.give_up("the address is gone")
        await both.server.ended.wait()
        assert trio.current_time() == 5
        assert doubts.at == [5]
        assert both.server.connection.failed_check
        assert str(both.server.ending) == "the address is gone"


async def test_given_up_it_goes_on_if_the_link_restores_itself(autojump_clock: MockClock) -> None:
    doubts = Doubts(restores=True)
    async with two(pipe(), on_doubt=doubts) as both:
        await trio.sleep(5)
        both.server.connection.give_up("the address is gone")
        await trio.sleep(100)
        assert doubts.at == [5]
        assert not both.server.ended.is_set()


async def test_a_peer_that_is_asked_answers(autojump_clock: MockClock) -> None:
    async with two(pipe(), heartbeat=NEVER) as both:
        started = trio.current_time()
        assert await both.client.connection.answers(2.0)
        assert trio.current_time() == started


async def test_one_that_does_not_answer_is_given_so_long(autojump_clock: MockClock) -> None:
    ends = pipe()
    async with two(ends, heartbeat=NEVER) as both:
        await wait_all_tasks_blocked()
        ends[1].outbound.allow(0)
        started = trio.current_time()
        assert not await both.client.connection.answers(2.0)
        assert trio.current_time() == started + 2.0


@final
class SilentLink(Link):
    """Bytes come now and then, and are never enough for something whole."""

    last_received = 0.0
    sending_since = None

    async def send(self, chunks: Sequence[Bytes]) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> Sequence[Bytes]:
        await trio.sleep_forever()
        raise AssertionError

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@final
class SlowLink(Link):
    """Nothing arrives; the system at the other end acknowledges a little every second, until a moment.

    Attributes:
        window_left: see `Link`.
        batches: the size of each batch that was sent.
        hints: how often bulk was expected.
    """

    last_received = 0.0
    window_left = 0

    def __init__(self, until: float) -> None:
        self._until: Final = until
        self.batches: Final[list[int]] = []
        self.hints = 0

    @property
    def sending_since(self) -> float | None:
        return min(trio.current_time(), self._until)

    def delivery(self) -> Delivery:
        seconds = int(min(trio.current_time(), self._until))
        return Delivery(
            arrived=0,
            taken=seconds,
            acknowledged=1000 * seconds,
            written=10**9,
            segment=1448,
            window_left=0,
            in_slow_start=False,
            longest_pause=10.0,
            resend_after=3.0,
        )

    def expect_bulk(self) -> None:
        self.hints += 1

    async def send(self, chunks: Sequence[Bytes]) -> None:
        self.batches.append(sum(map(len, chunks)))
        await trio.sleep(0.1)

    async def receive(self) -> Sequence[Bytes]:
        await trio.sleep_forever()
        raise AssertionError

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(("heartbeat", "ends_at"), [(1.0, 210.0), (2.0, 210.0), (15.0, 230.0)])
async def test_a_link_that_takes_bytes_slowly_lives(
    heartbeat: float, ends_at: float, autojump_clock: MockClock
) -> None:
    """No byte is read, because the answer to the ping is behind other bytes. The path breaks after 200 seconds."""
    connection = YamuxConnection(SlowLink(until=200.0), Role.SERVER, heartbeat=heartbeat)
    with pytest.raises(trio.BrokenResourceError, match=r"no byte came|took no byte"):
        await connection.run()
    assert ends_at <= trio.current_time() <= ends_at + 3


async def test_a_batch_is_larger_by_what_would_leave_at_once(autojump_clock: MockClock) -> None:
    link = SlowLink(until=NEVER)
    connection = YamuxConnection(link, Role.CLIENT, heartbeat=NEVER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await wait_all_tasks_blocked()
        for begun in (1, 2):
            link.window_left = 50 * KIB
            nursery.start_soon(drown_quietly, await connection.open_stream())
            await trio.sleep(5.0)
            assert link.hints == begun
        first = link.batches.index(max(link.batches)) - 1
        assert link.batches[first] == pytest.approx(FIRST_BATCH, abs=3 * HEADER_SIZE)
        assert link.batches[first + 1] == pytest.approx(FIRST_BATCH + 50 * KIB, abs=3 * HEADER_SIZE)
        nursery.cancel_scope.cancel()


async def drown_quietly(stream: YamuxStream) -> None:
    with suppress(trio.BrokenResourceError):
        await stream.send_all(bytes(INITIAL_WINDOW))


async def test_a_part_of_something_is_an_answer_too(autojump_clock: MockClock) -> None:
    """A large message on a slow path, say: the pong is behind it, the bytes are not."""
    slow = SilentLink()
    connection = YamuxConnection(slow, Role.CLIENT, heartbeat=NEVER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        await trio.sleep(1)

        @nursery.start_soon
        async def trickle() -> None:
            await trio.sleep(1)
            slow.last_received = trio.current_time()

        assert await connection.answers(2.0)
        assert not await connection.answers(2.0)
        nursery.cancel_scope.cancel()


async def test_one_question_serves_all_who_ask(autojump_clock: MockClock) -> None:
    async with one(pipe(), heartbeat=NEVER) as (running, peer):
        await peer.hear_ping()
        answers: list[bool] = []

        async def ask() -> None:
            answers.append(await running.connection.answers(2.0))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.sleep(1)
            await peer.say(go_away(0))
        assert answers == [True] * 5
        running.scope.cancel()
        assert [frame.type for frame in await peer.hear_all()] == [PING, GO_AWAY]


async def test_a_connection_that_is_gone_does_not_answer(autojump_clock: MockClock) -> None:
    ends = pipe()
    async with two(ends, heartbeat=NEVER) as both, trio.open_nursery() as nursery:
        await wait_all_tasks_blocked()
        ends[1].outbound.allow(0)
        answers: list[bool] = []

        @nursery.start_soon
        async def ask() -> None:
            answers.append(await both.client.connection.answers(2.0))

        await trio.sleep(1)
        ends[0].inbound.break_()
        await both.client.ended.wait()
        answers.append(await both.client.connection.answers(2.0))
        assert answers == [False, False]
        assert trio.current_time() < 2


# Leaving


async def test_streams_that_are_open_end_in_peace_after_no_more_are_taken() -> None:
    async with two(pipe()) as both:
        near, far = await both.stream()
        both.client.connection.refuse_streams()
        gone = trio.Event()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def wait() -> None:
                await both.client.connection.streams_gone()
                gone.set()

            nursery.start_soon(send_and_end, near, body(100_000))
            assert await read_all(far) == body(100_000)
            await wait_all_tasks_blocked()
            assert not gone.is_set()
            await far.aclose()
            await near.aclose()
            with no_hang():
                await gone.wait()
        with pytest.raises(trio.BrokenResourceError, match="no more streams"):
            await both.client.open()


@pytest.mark.parametrize("how", ["reset here", "reset there", "cut"])
async def test_nobody_waits_for_streams_that_were_broken(how: str) -> None:
    ends = pipe()
    async with two(ends) as both:
        near, far = await both.stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.client.connection.streams_gone)
            await wait_all_tasks_blocked()
            match how:
                case "reset here":
                    near.reset()
                case "reset there":
                    far.reset()
                case _:
                    ends[0].inbound.break_()
            nursery.cancel_scope.deadline = trio.current_time() + 5
        assert not nursery.cancel_scope.cancelled_caught


async def test_the_goodbye_takes_as_long_as_it_is_given(autojump_clock: MockClock) -> None:
    ends = pipe(capacity=1000)
    async with one(ends, goodbye=0.25) as (running, _):
        stream = await running.open()
        await wait_all_tasks_blocked()
        ends[0].outbound.allow(0)
        await stream.send_all(body(40_000))
        await wait_all_tasks_blocked()
        begin = trio.current_time()
        running.scope.cancel()
        await running.ended.wait()
        assert trio.current_time() == begin + 0.25


# Writes that stall


async def test_a_write_that_makes_no_progress_ends_the_session(autojump_clock: MockClock) -> None:
    ends = pipe(capacity=64 * KIB)
    async with two(ends, heartbeat=NEVER) as both:
        near, _ = await both.stream()
        ends[0].outbound.allow(0)
        begin = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await near.send_all(body(INITIAL_WINDOW))
        await both.client.ended.wait()
        assert isinstance(both.client.ending, trio.BrokenResourceError)
        assert f"took no byte for {STALL_TIMEOUT:g} seconds" in str(both.client.ending)
        assert STALL_TIMEOUT <= trio.current_time() - begin <= STALL_TIMEOUT + GOODBYE_TIMEOUT


async def test_a_write_that_makes_progress_may_take_its_time(autojump_clock: MockClock) -> None:
    """A slow path is slow, a dead one is dead."""
    ends = pipe(capacity=64 * KIB)
    async with two(ends, heartbeat=NEVER) as both, trio.open_nursery() as nursery:
        near, far = await both.stream()
        await wait_all_tasks_blocked()
        begin = trio.current_time()
        ends[0].outbound.allow(0)
        nursery.start_soon(send_and_end, near, body(INITIAL_WINDOW))

        async def trickle() -> None:
            while True:
                await trio.sleep(STALL_TIMEOUT - 1)
                ends[0].outbound.allow(64 * KIB)

        nursery.start_soon(trickle)
        assert await read_all(far) == body(INITIAL_WINDOW)
        assert trio.current_time() - begin > 4 * STALL_TIMEOUT
        assert not both.client.ended.is_set()
        nursery.cancel_scope.cancel()


async def test_on_a_socket_progress_is_seen_within_a_batch(mock_clock: MockClock) -> None:
    """Real bytes and a clock that jumps: the peer takes a little every 29 seconds, then nothing any more."""
    async with one(await sockets(), heartbeat=NEVER) as (running, peer), trio.open_nursery() as nursery:
        assert isinstance(peer.stream, trio.SocketStream)
        stream = await running.open()
        await peer.say(update(2, ACK, credit=2**30))
        nursery.start_soon(drown, stream)
        for _ in range(5):
            await wait_all_tasks_blocked(0.05)  # until the kernel's buffers are full
            mock_clock.jump(STALL_TIMEOUT - 1)
            while running.link.sending_since not in {None, trio.current_time()}:
                await peer.stream.receive_some(64 * KIB)
            assert not running.ended.is_set()
        await wait_all_tasks_blocked(0.05)
        while not running.ended.is_set():
            mock_clock.jump(1)
            await trio.lowlevel.checkpoint()
        assert f"took no byte for {STALL_TIMEOUT:g} seconds" in str(running.ending)


async def drown(stream: YamuxStream) -> None:
    """Send far more than any socket's buffers take."""
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(bytes(64 * 1024 * KIB))


# Endings


async def test_a_cancelled_session_sends_what_it_has_and_says_goodbye() -> None:
    async with one(pipe()) as (running, peer):
        await peer.hear_ping()
        stream = await running.open()
        await stream.send_all(b"the last words")
        running.scope.cancel()
        frames = await peer.hear_all()
        assert sorted(frames) == sorted([Frame(DATA, SYN, 2, 14, b"the last words"), GOODBYE])
        await running.ended.wait()
        assert running.ending is None
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")


@pytest.mark.parametrize("pause", [0.0, 0.4, 0.9])
async def test_a_frame_under_way_is_finished_before_the_goodbye(pause: float, autojump_clock: MockClock) -> None:
    ends = pipe(capacity=1000)
    async with one(ends) as (running, peer):
        await peer.hear_ping()
        stream = await running.open()
        ends[0].outbound.allow(500)
        await stream.send_all(body(FIRST_BATCH - HEADER_SIZE))
        await wait_all_tasks_blocked()
        begin = trio.current_time()
        running.scope.cancel()
        await trio.sleep(pause)
        ends[0].outbound.allow(float("inf"))
        frames = await peer.hear_all()
        assert b"".join(frame.body for frame in frames) == body(FIRST_BATCH - HEADER_SIZE)
        assert frames[-1] == GOODBYE
        await running.ended.wait()
        assert trio.current_time() - begin <= GOODBYE_TIMEOUT


@pytest.mark.parametrize("under_way", [0, 40_000])
async def test_a_goodbye_takes_a_second_at_most(under_way: int, autojump_clock: MockClock) -> None:
    ends = pipe(capacity=1000)
    async with one(ends) as (running, _):
        stream = await running.open()
        await wait_all_tasks_blocked()
        ends[0].outbound.allow(0)
        await stream.send_all(body(under_way))
        await wait_all_tasks_blocked()
        begin = trio.current_time()
        running.scope.cancel()
        await running.ended.wait()
        assert trio.current_time() == begin + GOODBYE_TIMEOUT


async def test_a_batch_that_was_about_to_leave_does_not_prolong_the_goodbye(autojump_clock: MockClock) -> None:
    """The writer wakes in the same moment as the session is cancelled."""
    ends = pipe(capacity=1000)
    async with one(ends) as (running, _):
        stream = await running.open()
        await wait_all_tasks_blocked()
        ends[0].outbound.allow(0)
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, body(40_000))
            await trio.lowlevel.checkpoint()
            running.scope.cancel()
        await running.ended.wait()
        assert trio.current_time() <= begin + 2 * GOODBYE_TIMEOUT


async def test_a_link_that_breaks_during_the_goodbye_is_no_error(autojump_clock: MockClock) -> None:
    """Who cancels gets a cancellation back, whatever else happens on the way out."""
    ends = pipe(capacity=1000)
    async with one(ends) as (running, _):
        stream = await running.open()
        await wait_all_tasks_blocked()
        ends[0].outbound.allow(0)
        await stream.send_all(body(40_000))
        await wait_all_tasks_blocked()
        running.scope.cancel()
        await trio.sleep(GOODBYE_TIMEOUT / 2)
        ends[0].outbound.break_()
        await running.ended.wait()
        assert running.ending is None


async def test_a_broken_rule_is_told_and_ends_the_session() -> None:
    async with one(pipe()) as (running, peer):
        await peer.hear_ping()
        await peer.say(data(1, b"hello", SYN), data(1, b"too late", SYN))
        assert await peer.hear_all() == [Frame(GO_AWAY, 0, 0, GoAwayCode.PROTOCOL_ERROR)]
        await running.ended.wait()
        assert isinstance(running.ending, RemoteProtocolError)


async def test_many_frames_leave_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by an attack: a gateway that says much and means nothing kept all others from the relay for seconds."""
    monkeypatch.setattr("pioneer_tunnel.yamux.connection._TURN_SECONDS", -1.0)  # each turn has been long enough
    async with one(pipe()) as (_, peer), trio.open_nursery() as nursery:
        await peer.hear_ping()
        turns = 0

        @nursery.start_soon
        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        await peer.say(encode_header(FrameType.GO_AWAY, 0, 0, GoAwayCode.NORMAL) * 60_000)
        await peer.say(encode_header(FrameType.PING, SYN, 0, 7))
        before = turns
        await peer.hear()
        assert turns - before >= 10
        nursery.cancel_scope.cancel()


async def test_a_broken_rule_counts_for_more_than_the_link_that_breaks_then() -> None:
    ends = pipe(capacity=1000)
    async with one(ends) as (running, peer):
        await peer.hear_ping()
        ends[0].outbound.allow(0)
        stream = await running.open()
        await stream.send_all(body(40_000))
        await wait_all_tasks_blocked()
        await peer.say(update(2, SYN))
        await trio.lowlevel.checkpoint()
        ends[0].outbound.break_()
        await running.ended.wait()
        assert isinstance(running.ending, RemoteProtocolError)


async def test_a_peer_that_closes_ends_the_session() -> None:
    async with one(pipe()) as (running, peer):
        await peer.stream.aclose()
        await running.ended.wait()
        assert isinstance(running.ending, trio.BrokenResourceError)


async def test_a_link_that_breaks_ends_the_session() -> None:
    ends = pipe()
    async with one(ends) as (running, _):
        await wait_all_tasks_blocked()
        ends[0].inbound.break_()
        await running.ended.wait()
        assert isinstance(running.ending, trio.BrokenResourceError)


async def test_a_bug_in_a_callback_resets_its_stream_and_the_session_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def divide(stream: YamuxStream) -> None:
        _ = 1 / 0

    ends = pipe()
    running = Running(ends[0], Role.SERVER, on_stream=divide)
    peer = HandmadePeer(ends[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.run)
        await peer.say(update(1, SYN))
        await wait_all_tasks_blocked()
        assert running.connection.failure is None
        nursery.cancel_scope.cancel()
    heard = await peer.hear_all()
    assert Frame(WINDOW_UPDATE, RST, 1, 0) in heard
    assert heard[-1] == GOODBYE
    assert "ZeroDivisionError" in caplog.text


async def test_the_link_is_closed_however_the_session_ends() -> None:
    for way in ("cancelled", "broken rule", "peer's end"):
        ours, theirs = await sockets()
        async with one((ours, theirs)) as (running, peer):
            if way == "cancelled":
                running.scope.cancel()
            elif way == "broken rule":
                await peer.say(update(2, SYN))
            else:
                await peer.stream.aclose()
            await running.ended.wait()
            assert ours.socket.fileno() == -1
        await theirs.aclose()


# Go-aways


async def test_after_the_peer_s_go_away_streams_go_on_and_none_is_opened() -> None:
    async with one(pipe(), Role.CLIENT) as (running, peer), trio.open_nursery() as nursery:
        streams = [await running.open() for _ in range(MAX_UNACKNOWLEDGED)]
        nursery.start_soon(cannot_open, running)
        await wait_all_tasks_blocked()
        await peer.say(go_away(0), data(1, b"goes on"))
        assert await streams[0].receive_some() == b"goes on"
        await streams[0].send_all(b"too")
        await cannot_open(running)
        assert not running.ended.is_set()


async def cannot_open(running: Running) -> None:
    with pytest.raises(trio.BrokenResourceError, match="takes no more streams"):
        await running.open()


async def test_refusing_streams_tells_the_peer_and_lets_streams_go_on() -> None:
    async with one(pipe(), Role.CLIENT) as (running, peer), trio.open_nursery() as nursery:
        await peer.hear_ping()
        streams = [await running.open() for _ in range(MAX_UNACKNOWLEDGED)]
        nursery.start_soon(cannot_open, running)
        await wait_all_tasks_blocked()
        running.connection.refuse_streams()
        await peer.say(data(1, b"goes on"), update(2, SYN))
        assert await streams[0].receive_some() == b"goes on"
        frames = [await peer.hear() for _ in range(MAX_UNACKNOWLEDGED + 2)]
        assert GOODBYE in frames
        assert frames[-1] == Frame(WINDOW_UPDATE, RST, 2, 0)
        assert not running.ended.is_set()


@pytest.mark.parametrize("code", [GoAwayCode.PROTOCOL_ERROR, GoAwayCode.INTERNAL_ERROR, 99])
async def test_a_go_away_with_an_error_ends_the_session(code: int) -> None:
    async with one(pipe()) as (running, peer):
        await peer.say(go_away(code))
        await running.ended.wait()
        assert isinstance(running.ending, RemoteProtocolError)
        assert f"code {code}" in str(running.ending)


# Cancellation at every checkpoint


class CancelAt(trio.abc.Instrument):
    """Cancels `scope` when the tasks that are `meant` have stopped for the `count`th time, at any checkpoint."""

    def __init__(self, count: int, scope: trio.CancelScope, meant: Callable[[trio.lowlevel.Task], bool]) -> None:
        self.left = count
        self._scope: Final = scope
        self._meant: Final = meant

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.left and self._meant(task):
            self.left -= 1
            if not self.left:
                self._scope.cancel()


@contextmanager
def cancelled_at(count: int, scope: trio.CancelScope, meant: Callable[[trio.lowlevel.Task], bool]) -> Iterator[None]:
    instrument = CancelAt(count, scope, meant)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(instrument)


def is_below(task: trio.lowlevel.Task, parent: trio.lowlevel.Task | None) -> bool:
    return task.parent_nursery is not None and task.parent_nursery.parent_task is parent


async def use_a_stream(running: Running, size: int) -> None:
    """Everything that one does with a stream."""
    async with await running.open() as stream:
        assert await ask(stream, body(size)) == body(size)


async def test_a_user_of_a_stream_who_is_cancelled_anywhere_leaves_the_session_whole() -> None:
    """No half frame, no task, no stream, no byte of a budget is left behind, and the next user is served."""
    user = trio.lowlevel.current_task()
    for count in itertools.count(1):
        async with two(pipe(40_000, random.Random(count))) as both, trio.open_nursery() as nursery:
            nursery.start_soon(both.server.serve_echo)
            scope = trio.CancelScope()
            with cancelled_at(count, scope, lambda task: task is user or is_below(task, user)), scope:
                await use_a_stream(both.client, INITIAL_WINDOW + 1000)
            await answer_correctly(await both.client.open(), b"next")
            await both.settle()
            nursery.cancel_scope.cancel()
            for running in both:
                assert not running.ended.is_set()
                assert running.session.unread == 0
                assert running.session._budget.left == running.session.limits.window_growth
        if not scope.cancelled_caught:
            break
    assert count > 20


async def test_a_session_that_is_cancelled_anywhere_ends_with_a_whole_frame() -> None:
    """Whichever of its tasks stands wherever: only the cancellation comes out, and the peer sees an orderly end."""
    for count in itertools.count(1):
        ends = pipe(20_000, random.Random(count))
        ends[0].outbound.record = record = bytearray()
        async with two(ends) as (client, server), trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_echo)
            with cancelled_at(count, client.scope, lambda task, client=client: is_below(task, client.task)):  # type: ignore[misc]
                try:
                    await use_a_stream(client, 60_000)
                except* trio.BrokenResourceError:
                    pass
            cancelled = client.scope.cancel_called
            client.scope.cancel()
            await client.ended.wait()
            await server.ended.wait()
            assert client.ending is None
            assert isinstance(server.ending, trio.BrokenResourceError)
            assert parse([record]).count(GOODBYE) == 1
            with pytest.raises(trio.BrokenResourceError):
                await client.open()
            nursery.cancel_scope.cancel()
        if not cancelled:
            break
    assert count > 20


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
