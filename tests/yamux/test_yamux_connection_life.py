"""`yamux.connection`: how it finds out whether the peer is alive, and doubts it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, final

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from yamux_rig import GO_AWAY, GOODBYE, KIB, NEVER, PING, HandmadePeer, PipeEnd, data, go_away, one, pipe, two

from pioneer_tunnel._net.delivery import Delivery
from pioneer_tunnel._net.link import Bytes, Link
from pioneer_tunnel.yamux import Role, YamuxConnection, YamuxStream
from pioneer_tunnel.yamux.connection import GOODBYE_TIMEOUT
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW
from pioneer_tunnel.yamux.frames import ACK, HEADER_SIZE, SYN, encode_header
from pioneer_tunnel.yamux.pacing import FIRST_BATCH

HEARTBEAT: Final = 15.0


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
