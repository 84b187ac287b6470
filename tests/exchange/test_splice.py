"""The short way between two sockets keeps every promise of the long one, with splice and without."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fast_path import switch_fast_path_off
from rig import in_background, no_hang, nothing_left_behind, read_all, read_exactly, seeds

from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._net.dialing import dial_tcp
from pioneer_tunnel._net.fastpath import pipe_pool as pipes_module
from pioneer_tunnel._net.fastpath.event_loop import Reactor
from pioneer_tunnel._net.fastpath.pipe_pool import CAN_PIPE
from pioneer_tunnel._net.fastpath.socket_leg import SocketLeg
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel.exchange.exchange import Ending, Exchange
from pioneer_tunnel.exchange.pump import pump


@pytest.fixture(params=["splice", "no pipe to be had", "sockets not made for it", "the long way"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way that bytes can take, forced."""
    name: str = request.param
    if name != "the long way" and not CAN_PIPE:
        pytest.skip("this system has no short way")
    if name == "no pipe to be had":
        monkeypatch.setattr(pipes_module, "_MOST_PIPES", 0)
    if name == "the long way":
        switch_fast_path_off(monkeypatch)
    if name == "sockets not made for it":

        def refuse(*args: Any, **kwargs: Any) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(os, "splice", refuse, raising=False)
    return name


async def connection() -> tuple[trio.SocketStream, TcpStream]:
    """A connection: somebody's end, and the end that is pumped."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        outer = await dial_tcp("127.0.0.1", listener.socket.getsockname()[1])
        return outer, TcpStream((await listener.accept()).socket)


@asynccontextmanager
async def pumped() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream, trio.Event]]:
    """Two outer ends with a pump between, and its end."""
    left, first = await connection()
    right, second = await connection()
    over = trio.Event()

    async def run() -> None:
        await pump(first, second)
        over.set()

    async with left, right, in_background(run):
        yield left, right, over


def pipes() -> int:
    """The pipes of this process that are open now, each with two ends."""
    found = 0
    for name in Path("/proc/self/fd").iterdir():
        try:
            found += str(name.readlink()).startswith("pipe:")
        except FileNotFoundError:
            continue  # the descriptor that listed the folder
    return found


@pytest.mark.parametrize("size", [1, 4096, 300_000, 20_000_000])
async def test_every_byte_arrives_both_ways(way: str, size: int) -> None:
    before = pipes()
    data = random.Random(size).randbytes(size)
    expected = hashlib.sha256(data).digest()

    async def exchange(stream: trio.SocketStream) -> None:
        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            received = hashlib.sha256()
            while piece := await stream.receive_some(100_000):
                received.update(piece)
            assert received.digest() == expected

    with nothing_left_behind():
        async with pumped() as (left, right, over):
            with no_hang():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(exchange, left)
                    nursery.start_soon(exchange, right)
                await over.wait()
            assert pipes() == before


@pytest.mark.skipif(not CAN_PIPE, reason="this system has no splice")
async def test_a_bulk_of_bytes_is_spliced_and_a_few_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    spliced = 0
    original = os.splice

    def count(*args: Any, **kwargs: Any) -> int:
        nonlocal spliced
        amount = original(*args, **kwargs)
        spliced += amount
        return amount

    monkeypatch.setattr(os, "splice", count)
    async with pumped() as (left, right, _):
        for _ in range(20):
            await left.send_all(b"a few")
            assert await read_exactly(right, 5) == b"a few"
        assert spliced == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.send_all, bytes(20_000_000))
            await read_exactly(right, 20_000_000)
        assert spliced > 10_000_000


@pytest.mark.skipif(not CAN_PIPE, reason="this system has no splice")
async def test_a_socket_that_was_emptied_or_has_room_again_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read in vain costs as much as some 10 KB that are spliced."""
    in_vain = 0
    original = os.read

    def count(*args: Any) -> bytes:
        nonlocal in_vain
        try:
            return original(*args)
        except BlockingIOError:
            in_vain += 1
            raise

    async with pumped() as (left, right, _):
        monkeypatch.setattr(os, "read", count)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.send_all, bytes(50_000_000))
            await read_exactly(right, 50_000_000)
        assert in_vain <= 10  # a read may take exactly what was there


@pytest.mark.skipif(not CAN_PIPE, reason="this system has no short way")
async def test_without_a_descriptor_for_the_epoll_bytes_take_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("pioneer_tunnel._net.fastpath.event_loop.select.epoll", refuse)
    async with pumped() as (left, right, over):
        with no_hang():
            await left.send_all(b"request")
            await left.send_eof()
            assert await read_all(right) == b"request"
            await right.send_all(b"answer")
            await right.send_eof()
            assert await read_all(left) == b"answer"
            await over.wait()


async def test_half_close_both_ways_round(way: str) -> None:
    async with pumped() as (left, right, over):
        with no_hang():
            await left.send_all(b"request")
            await left.send_eof()
            assert await read_all(right) == b"request"
            assert not over.is_set()
            await right.send_all(b"answer" * 100_000)
            await right.send_eof()
            assert await read_all(left) == b"answer" * 100_000
            await over.wait()


@pytest.mark.parametrize("clogged", [False, True])
async def test_a_break_of_either_end_is_a_reset_of_the_other(way: str, clogged: bool) -> None:
    for breaker, other in ((0, 1), (1, 0)):
        with nothing_left_behind():
            async with pumped() as (*ends, over):
                with trio.move_on_after(0.2 if clogged else 0):
                    await ends[breaker].send_all(bytes(50_000_000))
                await abandon(ends[breaker])
                with no_hang():
                    with pytest.raises(trio.BrokenResourceError):
                        await read_all(ends[other])
                    await over.wait()


async def test_a_slow_reader_holds_the_writer_up_and_loses_nothing(way: str) -> None:
    data = random.Random(1).randbytes(30_000_000)
    async with pumped() as (left, right, _), trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, data)
        await trio.sleep(0.1)
        with no_hang():
            assert await read_exactly(right, len(data)) == data


async def test_many_at_once_share_what_there_is(way: str) -> None:
    before = pipes()

    async def one(number: int) -> None:
        data = bytes([number]) * 1_000_000
        async with pumped() as (left, right, over), trio.open_nursery() as nursery:
            nursery.start_soon(left.send_all, data)
            assert await read_exactly(right, len(data)) == data
            most.append(pipes() - before)
            await left.aclose()
            await right.aclose()
            await over.wait()

    most: list[int] = []
    with no_hang():
        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(one, number)
    assert max(most) <= 2 * 32
    assert pipes() == before


@seeds(15, quick=5)
async def test_cancelled_at_any_moment_both_ends_are_reset_and_nothing_stays(way: str, seed: int) -> None:
    before, chance = pipes(), random.Random(seed)
    told = set()

    async def send(stream: trio.SocketStream, data: bytes) -> None:
        # The pump, cancelled in the same moment, may be the first to end. Of a reset the system tells once.
        try:
            await stream.send_all(data)
        except trio.BrokenResourceError:
            told.add(stream)

    with nothing_left_behind():
        left, first = await connection()
        right, second = await connection()
        async with left, right, trio.open_nursery() as nursery:
            with trio.move_on_after(chance.uniform(0, 0.01)):
                async with trio.open_nursery() as pumping:
                    pumping.start_soon(pump, first, second)
                    pumping.start_soon(send, left, bytes(chance.randrange(10_000_000)))
                    if chance.random() < 0.5:
                        pumping.start_soon(_discard, right)
                    await trio.sleep_forever()
            with no_hang():
                for end in {left, right} - told:
                    with pytest.raises(trio.BrokenResourceError):
                        await read_all(end)
            nursery.cancel_scope.cancel()
        assert pipes() == before


async def _discard(stream: trio.SocketStream) -> None:
    while await stream.receive_some(10_000):
        pass


async def test_a_silent_connection_costs_no_pipe() -> None:
    before = pipes()
    async with pumped() as (left, right, _):
        await left.send_all(b"x")
        assert await read_exactly(right, 1) == b"x"
        assert pipes() == before


# Who moves the bytes


async def test_the_others_go_on_when_the_one_who_moves_all_bytes_is_cancelled(way: str) -> None:
    async with trio.open_nursery() as nursery:
        pairs = []
        for _ in range(3):
            left, first = await connection()
            right, second = await connection()
            scope = await nursery.start(_pump_in_a_scope, first, second)
            pairs.append((left, right, scope))
        with no_hang():
            while pairs:
                for left, right, _ in pairs:
                    await left.send_all(b"ping")
                    assert await read_exactly(right, 4) == b"ping"
                left, right, scope = pairs.pop(0)  # the first to come leads
                scope.cancel()
                for end in (left, right):
                    with pytest.raises(trio.BrokenResourceError):
                        await read_all(end)
                    await end.aclose()


@pytest.mark.skipif(not CAN_PIPE, reason="this system has no short way")
async def test_what_was_cancelled_while_it_waited_for_its_turn_is_not_touched_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its descriptor may be another connection's by then, whose bytes would be taken."""
    touched: list[int] = []
    read = os.read

    def note(descriptor: int, size: int) -> bytes:
        touched.append(descriptor)
        return read(descriptor, size)

    async with pumped() as (left, right, _):  # this one leads, and goes on
        await left.send_all(b"ping")
        assert await read_exactly(right, 4) == b"ping"
        source, first = await connection()
        sink, second = await connection()
        descriptor = first.socket.fileno()
        async with source, sink, trio.open_nursery() as nursery:
            nursery.start_soon(pump, first, second)
            await trio.testing.wait_all_tasks_blocked()
            leg: Any = Reactor.current()._watched[descriptor]
            Reactor.current().queue(leg.__self__._read_on)
            nursery.cancel_scope.cancel()
        monkeypatch.setattr(os, "read", note)
        await left.send_all(b"pong")
        assert await read_exactly(right, 4) == b"pong"
        assert touched
        assert descriptor not in touched


async def _pump_in_a_scope(
    first: ByteStream, second: ByteStream, *, task_status: trio.TaskStatus[trio.CancelScope]
) -> None:
    with trio.CancelScope() as scope:
        task_status.started(scope)
        await pump(first, second)


async def test_the_others_go_on_when_the_connection_of_the_one_who_moves_all_bytes_ends(way: str) -> None:
    async with pumped() as (left, right, over), pumped() as (other_left, other_right, other_over):
        with no_hang():
            for end in (left, right):
                await end.send_eof()
            await over.wait()
            await other_left.send_all(b"ping")
            assert await read_exactly(other_right, 4) == b"ping"
            await abandon(other_right)
            await other_over.wait()


async def test_a_stream_that_its_owner_closes_is_let_go_of_and_the_other_end_is_reset(way: str) -> None:
    left, first = await connection()
    right, second = await connection()
    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(pump, first, second)
        await left.send_all(b"half of what")
        assert await read_exactly(right, 12) == b"half of what"
        with no_hang():
            await first.aclose()
            with pytest.raises(trio.BrokenResourceError):
                await read_all(right)


@pytest.mark.skipif(not CAN_PIPE, reason="this system has no short way")
async def test_an_owner_that_closes_in_the_moment_of_the_end_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be a `KeyError`: the end wanted to let go of what had been let go of."""
    left, first = await connection()
    right, second = await connection()
    original = Exchange.end

    def end(self: Exchange, ending: Ending, error: Exception | None = None) -> None:
        original(self, ending, error)
        if self.ending is Ending.CLOSED:
            first.plain_socket.take_back()
            first.socket.close()

    monkeypatch.setattr(Exchange, "end", end)
    async with left, right:
        await left.send_eof()
        await right.send_eof()
        with no_hang():
            assert await pump(first, second)


@pytest.mark.skipif(not CAN_PIPE, reason="this system has no short way")
async def test_a_stream_that_was_joined_leaves_no_circle() -> None:
    """Rounds of the garbage collector cost each short connection some 20 us."""
    modules = {Exchange.__module__, SocketLeg.__module__}
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            async with pumped() as (left, right, over):
                await left.send_eof()
                await right.send_eof()
                with no_hang():
                    await over.wait()
        left_over = [thing for thing in gc.get_objects() if type(thing).__module__ in modules]
    finally:
        gc.enable()
    assert {type(thing).__name__ for thing in left_over} <= {"Ending"}


@pytest.mark.skipif(not CAN_PIPE, reason="this system has no short way")
async def test_a_connection_is_joined_to_one_other_at_a_time() -> None:
    left, first = await connection()
    right, second = await connection()
    third, fourth = await connection()
    async with left, right, third, trio.open_nursery() as nursery:
        nursery.start_soon(pump, first, second)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await pump(fourth, first)
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(not CAN_PIPE, reason="the long way notices when there is something to say")
async def test_a_visitor_that_has_ended_and_then_resets_is_noticed_while_the_gateway_is_silent() -> None:
    async with pumped() as (left, right, over):
        with no_hang():
            await left.send_all(b"request")
            await left.send_eof()
            assert await read_all(right) == b"request"
            await abandon(left)
            await over.wait()
            with pytest.raises(trio.BrokenResourceError):
                await right.send_all(b"answer")


async def test_a_bulk_of_bytes_does_not_hold_up_a_few(way: str) -> None:
    """Not by the clock: while a few go to and fro a hundred times, the bulk must not have got through."""
    total = 400_000_000
    async with pumped() as (source, sink, _), pumped() as (left, right, _), trio.open_nursery() as nursery:
        received = 0

        async def drain() -> None:
            nonlocal received
            while received < total:
                received += len(await sink.receive_some(1_000_000))

        nursery.start_soon(source.send_all, bytes(total))
        nursery.start_soon(drain)
        for _ in range(100):
            await left.send_all(b"ping")
            assert await read_exactly(right, 4) == b"ping"
        assert 0 < received < total
        nursery.cancel_scope.cancel()
