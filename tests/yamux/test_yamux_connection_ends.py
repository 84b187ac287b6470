"""`yamux.connection`: how it ends: in peace, at a write that stalls, with an error, or after a go-away."""

from __future__ import annotations

from itertools import count

import pytest
import trio
from rig import no_hang
from trio.testing import MockClock, wait_all_tasks_blocked
from yamux_rig import (
    DATA,
    GO_AWAY,
    GOODBYE,
    KIB,
    NEVER,
    WINDOW_UPDATE,
    Frame,
    HandmadePeer,
    Running,
    body,
    data,
    go_away,
    one,
    pipe,
    read_all,
    send_and_end,
    sockets,
    two,
    update,
)

from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel.yamux import Role, YamuxStream
from pioneer_tunnel.yamux.connection import GOODBYE_TIMEOUT, STALL_TIMEOUT
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW
from pioneer_tunnel.yamux.frames import ACK, HEADER_SIZE, RST, SYN, FrameType, GoAwayCode, encode_header
from pioneer_tunnel.yamux.pacing import FIRST_BATCH
from pioneer_tunnel.yamux.session import MAX_UNACKNOWLEDGED

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


async def test_a_writer_that_waits_for_room_and_then_has_nothing_to_send_does_not_delay_the_goodbye(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = trio.Event()
    async with one(pipe(), heartbeat=NEVER) as (running, peer):
        await peer.hear_ping()
        await peer.say(update(1, SYN))
        stream = await running.accept()
        assert await peer.hear() == Frame(WINDOW_UPDATE, ACK, 1, 0)
        monkeypatch.setattr(running.link, "wait_room", room.wait)
        await stream.send_all(b"never sent")
        await wait_all_tasks_blocked()
        await peer.say(update(1, RST))
        await wait_all_tasks_blocked()
        running.scope.cancel()
        await wait_all_tasks_blocked()
        room.set()
        assert [frame.type for frame in await peer.hear_all()] == [GO_AWAY]


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
    looks, current_time = count(), trio.current_time
    # Time passes with each look at the clock, so that each turn has been long enough.
    monkeypatch.setattr(trio, "current_time", lambda: current_time() + next(looks) / 100)
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
