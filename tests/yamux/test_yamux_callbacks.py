"""A yamux connection over a link that calls back: what it does within a turn, and what it leaves to its tasks."""

from __future__ import annotations

import errno
import functools
import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from callback_link import CallbackLink
from rig import eventually, no_hang, tcp_pair
from yamux_rig import DATA, FULL, GO_AWAY, WINDOW_UPDATE, go_away, parse, ping, update

from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH
from pioneer_tunnel._net.fastpath.stay import Stay
from pioneer_tunnel._net.leg import Leg
from pioneer_tunnel._net.prefixed_stream import PrefixedStream
from pioneer_tunnel._net.stream_link import StreamLink
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel._net.turn import Turn
from pioneer_tunnel.yamux import Role, YamuxConnection, YamuxStream
from pioneer_tunnel.yamux.driver import ACKNOWLEDGE_WITHIN, MOST_HELD_BACK, WAKES_PER_TURN
from pioneer_tunnel.yamux.flow import SEND_BOUND
from pioneer_tunnel.yamux.frames import ACK, FIN, SYN

pytestmark = pytest.mark.skipif(not CAN_WATCH, reason="this system has no epoll")


@asynccontextmanager
async def running(connection: YamuxConnection, link: CallbackLink) -> AsyncIterator[list[Exception]]:
    """Runs `connection`; yields what it raised, if it was not cancelled."""
    endings: list[Exception] = []

    async def run() -> None:
        try:
            await connection.run()
        except (RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            endings.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await eventually(lambda: link.watched)
        await trio.testing.wait_all_tasks_blocked()
        yield endings
        nursery.cancel_scope.cancel()


async def test_a_cancelled_session_finishes_what_left_in_part_at_the_end_of_a_turn() -> None:
    link = CallbackLink()
    connection = YamuxConnection(link, Role.CLIENT, heartbeat=15.0)
    async with running(connection, link):
        stream = await connection.open_stream()
        await trio.testing.wait_all_tasks_blocked()
        link.takes = 100
        Turn.current().run(lambda: stream.put(bytes(5000)))
    frames = parse([bytes(link.sent)])
    assert sum(len(frame.body) for frame in frames if frame.type == DATA) == 5000
    assert frames[-1].type == GO_AWAY


def frames_of(link: CallbackLink) -> list[tuple[int, int, int]]:
    """The type, the flags and the stream of the frames of streams that were sent."""
    return [(frame.type, frame.flags, frame.stream_id) for frame in parse([bytes(link.sent)]) if frame.stream_id]


@asynccontextmanager
async def accepting(count: int) -> AsyncIterator[tuple[CallbackLink, list[YamuxStream]]]:
    """A link by which so many streams have come, which were not accepted."""
    link, streams = CallbackLink(), list[YamuxStream]()
    connection = YamuxConnection(link, Role.SERVER, heartbeat=15.0, on_stream=streams.append)
    with Stay():
        async with running(connection, link):
            link.come(b"".join(update(1 + 2 * number, SYN) for number in range(count)))
            await eventually(lambda: len(streams) == count)
            yield link, streams


async def test_an_acceptance_leaves_with_the_first_frame_of_the_stream(autojump_clock: trio.testing.MockClock) -> None:
    async with accepting(4) as (link, (small, large, ended, silent)):
        for stream in (small, large, ended, silent):
            stream.acknowledge()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not frames_of(link)
        turn = Turn.current()
        turn.run(lambda: small.put(b"answer"))
        turn.run(lambda: large.put(bytes(50_000)))
        turn.run(ended.put_eof)
        await trio.testing.wait_all_tasks_blocked(0.01)
        answers = [(DATA, ACK, 1), (DATA, ACK, 3), (WINDOW_UPDATE, ACK | FIN, 5)]
        assert [frame for frame in frames_of(link) if frame[1]] == answers
        await trio.sleep(2 * ACKNOWLEDGE_WITHIN)
        assert [frame for frame in frames_of(link) if frame[1]] == [*answers, (WINDOW_UPDATE, ACK, 7)]
        turn.run(lambda: silent.put(b"late"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert frames_of(link)[-1] == (DATA, 0, 7)


async def test_many_acceptances_leave_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """An opener keeps at most 256 streams that are not accepted."""
    async with accepting(2 * MOST_HELD_BACK - 1) as (link, streams):
        for stream in streams:
            stream.acknowledge()
        accepted = [(WINDOW_UPDATE, ACK, 1 + 2 * number) for number in range(len(streams))]
        assert frames_of(link) == accepted[:MOST_HELD_BACK]
        await trio.sleep(2 * ACKNOWLEDGE_WITHIN)
        assert frames_of(link) == accepted


async def test_all_streams_that_a_batch_makes_room_for_are_woken() -> None:
    """Those beyond the wakes of a turn waited until something else happened in the session."""
    async with accepting(WAKES_PER_TURN + 1) as (link, streams):
        woken, legs = list[YamuxStream](), list[Leg]()
        for stream in streams:
            leg = stream.leg()
            leg.attach()
            leg.on_writable = functools.partial(woken.append, stream)
            leg.send(bytes(FULL - SEND_BOUND // 2 + 50))
            legs.append(leg)
        await trio.testing.wait_all_tasks_blocked(0.01)
        woken.clear()
        assert not any(leg.room for leg in legs)
        link.come(b"".join(update(1 + 2 * number, credit=100) for number in range(len(streams))))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert [stream for stream in streams if stream not in woken] == []


async def test_a_go_away_that_comes_up_at_the_end_of_a_turn_ends_its_own_session_alone() -> None:
    """It ended the task that leads the event loop, which is any visitor's."""

    def refuse(stream: YamuxStream) -> None:
        raise trio.WouldBlock

    link = CallbackLink()
    connection = YamuxConnection(link, Role.SERVER, heartbeat=15.0, on_stream=refuse)
    with no_hang(), Stay() as leader:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leader.wait)
            await trio.testing.wait_all_tasks_blocked()
            async with running(connection, link) as endings:
                openings = (update(1 + 2 * number, SYN) for number in range(WAKES_PER_TURN))
                link.come(b"".join((*openings, go_away(1))))
                await eventually(lambda: endings)
            assert isinstance(endings[0], RemoteProtocolError)
            assert not Turn.current().running
            leader.end()


async def test_the_end_of_the_last_stream_is_told_also_when_it_leaves_at_the_end_of_a_turn() -> None:
    """It was told with the next heartbeat, so that a drained session lived on for seconds."""
    link = CallbackLink()
    connection = YamuxConnection(link, Role.CLIENT, heartbeat=15.0)
    async with running(connection, link):
        stream = await connection.open_stream()
        link.come(update(1, ACK), update(1, FIN))
        assert await stream.receive_some(1) == b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.streams_gone)
            await trio.testing.wait_all_tasks_blocked()
            with no_hang():
                Turn.current().run(stream.close_soon)
                await eventually(lambda: not nursery.child_tasks)


async def test_a_peer_that_never_stops_does_not_keep_others_from_running() -> None:
    link = CallbackLink()
    connection = YamuxConnection(link, Role.SERVER, heartbeat=15.0)
    async with running(connection, link):
        link.come(*[ping(7, ACK) * 5000] * 30)
        seen = set()
        while link.pieces:
            seen.add(len(link.pieces))
            await trio.lowlevel.checkpoint()
    assert len(seen) > 2


async def test_of_a_session_that_has_ended_nothing_more_is_processed() -> None:
    """The first reason counts, also if more comes before the session's task runs."""
    link = CallbackLink()
    connection = YamuxConnection(link, Role.SERVER, heartbeat=15.0)
    async with running(connection, link) as endings:
        link.come(b"\xff" * 12)
        link.broken = True
        link.report()
        await eventually(lambda: endings)
    assert isinstance(endings[0], RemoteProtocolError)
    assert "version" in str(endings[0])


@pytest.mark.parametrize("problem", ["no descriptor", "no memory"])
async def test_a_stream_that_cannot_be_watched_says_so(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMemory:
        def fileno(self) -> int:
            return 1_000_000

        def register(self, *arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def poll(self, *arguments: object) -> list[object]:
            return []

        def close(self) -> None:
            pass

    def fail() -> NoMemory:
        if problem == "no descriptor":
            raise OSError(errno.EMFILE, "Too many open files")
        return NoMemory()

    monkeypatch.setattr(select, "epoll", fail)
    ours, theirs = await tcp_pair()
    async with ours, theirs:
        stream = TcpStream(ours.socket)
        with Stay():
            assert stream.watch(lambda: None) is None
        await theirs.send_all(b"x")
        assert await stream.receive_some() == b"x"


async def test_who_watches_a_stream_is_called_when_its_owner_closes_it() -> None:
    ours, theirs = await tcp_pair()
    stream = TcpStream(ours.socket)
    async with theirs, stream:
        with Stay():
            failures: list[BaseException] = []

            def read() -> None:
                try:
                    assert watched is not None
                    watched.receive_into_nowait(memoryview(bytearray(1)))
                except trio.ClosedResourceError as error:
                    failures.append(error)

            watched = stream.watch(read)
            await stream.aclose()
            assert len(failures) == 1


async def test_a_link_over_a_stream_whose_prefix_was_read_is_watched_no_more_after_unwatch() -> None:
    ours, theirs = await tcp_pair()
    tcp = TcpStream(ours.socket)
    async with theirs, tcp:
        link = StreamLink(PrefixedStream(tcp, b""), tcp)
        with Stay() as stay:
            assert link.watch(lambda: None)
            link.unwatch()
            stay.reactor.watch(ours.socket.fileno(), lambda _: None)
            stay.reactor.unwatch(ours.socket.fileno())
