"""A carrier owns exchanges without a task for each, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing
from compiled import in_python
from rig import eventually, living_tasks, no_hang, nothing_left_behind, read_all, tcp_pair
from test_legs import Keeper

from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH
from pioneer_tunnel._net.leg import Bytes
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel.exchange.carrier import Carrier
from pioneer_tunnel.exchange.pump import Pump

pytestmark = pytest.mark.skipif(not CAN_WATCH, reason="this system has no event loop for it")


def no_bug(error: Exception) -> None:
    pytest.fail(repr(error))


async def visit(carrier: Carrier, after: Callable[[], object]) -> tuple[trio.SocketStream, trio.SocketStream]:
    left, first = await tcp_pair()
    second, right = await tcp_pair()
    pump = Pump(TcpStream(first.socket), TcpStream(second.socket))
    assert carrier.takes(pump)
    carrier.carry(pump, after)
    return left, right


async def test_an_exchange_that_ends_in_order_never_has_a_task() -> None:
    over: list[str] = []
    with nothing_left_behind(), no_hang():
        async with trio.open_nursery() as nursery:
            carrier = Carrier(on_bug=no_bug)
            await nursery.start(carrier.run)
            tasks = living_tasks()
            left, right = await visit(carrier, lambda: over.append("over"))
            async with left, right:
                await left.send_all(b"hello")
                await left.send_eof()
                assert await read_all(right) == b"hello"
                assert living_tasks() == tasks
                await right.send_eof()
                assert await read_all(left) == b""
                await eventually(lambda: over == ["over"])
                assert living_tasks() == tasks
            nursery.cancel_scope.cancel()


async def test_what_it_owns_is_reset_when_it_is_cancelled() -> None:
    over: list[int] = []
    with nothing_left_behind(), no_hang():
        async with trio.open_nursery() as nursery:
            carrier = Carrier(on_bug=no_bug)
            await nursery.start(carrier.run)
            visits = [await visit(carrier, lambda: over.append(1)) for _ in range(70)]
            nursery.cancel_scope.cancel()
        assert not carrier.running
        assert len(over) == len(visits)
        for ends in visits:
            for end in ends:
                with pytest.raises(trio.BrokenResourceError):
                    await end.receive_some()
                await end.aclose()


async def test_work_that_it_owns_is_stopped_unless_it_is_over() -> None:
    stopped: list[str] = []

    class Work:
        def __init__(self, name: str) -> None:
            self.name = name

        def stop(self) -> None:
            stopped.append(self.name)

    async with trio.open_nursery() as nursery:
        carrier = Carrier(on_bug=no_bug)
        await nursery.start(carrier.run)
        done = Work("done")
        carrier.own(done)
        carrier.own(Work("left"))
        carrier.disown(done)
        nursery.cancel_scope.cancel()
    assert stopped == ["left"]


@in_python
async def test_a_bug_in_a_leg_ends_its_exchange_alone() -> None:
    class Buggy(Keeper):
        def send(self, data: Bytes) -> bool:
            raise ZeroDivisionError

    class Sink(ByteStream):
        """A stream whose leg has a bug."""

        def __init__(self, stream: ByteStream) -> None:
            self.stream = stream

        def leg(self) -> Keeper:
            return Buggy()

        async def abort(self) -> None:
            await self.stream.abort()

        async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
            raise AssertionError

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            raise AssertionError

        async def wait_send_all_might_not_block(self) -> None:
            raise AssertionError

        async def send_eof(self) -> None:
            raise AssertionError

        async def aclose(self) -> None:
            raise AssertionError

    bugs: list[Exception] = []
    over = trio.Event()
    with nothing_left_behind(), no_hang():
        async with trio.open_nursery() as nursery:
            carrier = Carrier(bugs.append)
            await nursery.start(carrier.run)
            other = await visit(carrier, lambda: None)
            left, first = await tcp_pair()
            second, right = await tcp_pair()
            pump = Pump(TcpStream(first.socket), Sink(adopt(second)))
            assert carrier.takes(pump)
            carrier.carry(pump, over.set)
            await left.send_all(b"!")
            await over.wait()
            assert [type(bug) for bug in bugs] == [ZeroDivisionError]
            async with other[0], other[1]:
                await other[0].send_all(b"alive")
                assert await other[1].receive_some() == b"alive"
            await left.aclose()
            await right.aclose()
            nursery.cancel_scope.cancel()
