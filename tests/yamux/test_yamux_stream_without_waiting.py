"""`yamux.stream`: what a stream does for callers that never wait, and what it reads for them."""

from __future__ import annotations

from typing import Final, final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked
from yamux_rig import DATA, GO_AWAY, KIB, NEVER, PING, Frame, data, one, pair, ping, pipe, update

from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH
from pioneer_tunnel._net.fastpath.stay import Stay
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel.exchange.pump import pump
from pioneer_tunnel.yamux import Limits, Role, SendBudget
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW, SEND_BOUND, SEND_RESERVE
from pioneer_tunnel.yamux.frames import ACK, SYN

MIB: Final = 1024 * KIB


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


@pytest.mark.skipif(not CAN_WATCH, reason="there is no epoll here")
async def test_a_watched_stream_calls_back_and_neither_receives_nor_sends_by_waiting() -> None:
    async with pair() as (near, far, _):
        calls: list[None] = []
        buffer = memoryview(bytearray(16))
        with Stay():
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
        with Stay():
            near.watch(lambda: calls.append(None))
            far.reset()
            await wait_all_tasks_blocked()
            assert calls
            with pytest.raises(trio.BrokenResourceError):
                near.receive_into_nowait(memoryview(bytearray(1)))
            near.unwatch()
