"""`task_leg`: what it promises to an exchange, step by step. test_pump.py has whole exchanges."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import attrs
import pytest
import trio
import trio.testing

from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel._net.leg import LARGEST_READ
from pioneer_tunnel._net.streams import DelegatingStream
from pioneer_tunnel.exchange.exchange import HandedOver
from pioneer_tunnel.exchange.task_leg import TaskLeg
from pioneer_tunnel.testing.memory_stream import MemoryConnection, MemoryStream

BUFFER: Final = 1000


@attrs.define
class Running:
    """A leg whose tasks run.

    Attributes:
        peer: the other end of its stream.
        told: what the leg has called back, in order.
    """

    leg: TaskLeg
    peer: MemoryStream
    told: list[str]

    async def settle(self) -> list[str]:
        """Let the tasks run until they wait; returns what was told since the last time."""
        await trio.testing.wait_all_tasks_blocked()
        told, self.told[:] = [*self.told], []
        return told


@asynccontextmanager
async def running() -> AsyncIterator[Running]:
    connection = MemoryConnection(buffer=BUFFER)
    leg = TaskLeg(adopt(connection.client))
    told: list[str] = []
    leg.on_readable = lambda: told.append("readable")
    leg.on_writable = lambda: told.append("writable")
    async with trio.open_nursery() as nursery:
        for task in leg.tasks:
            nursery.start_soon(task)
        yield Running(leg, connection.server, told)
        nursery.cancel_scope.cancel()


async def test_it_reads_only_what_was_asked_for() -> None:
    async with running() as run:
        await run.peer.send_all(b"0123456789")
        assert await run.settle() == [], "nobody has asked"
        assert run.leg.receive(4) is None
        assert await run.settle() == ["readable"]
        assert run.leg.held == 4
        assert run.leg.receive(4) == b"0123"
        assert run.leg.held == 0
        assert await run.settle() == []
        assert run.leg.receive(100) is None
        assert await run.settle() == ["readable"]
        assert run.leg.receive(2) == b"45", "less than what was read"
        assert run.leg.held == 4
        assert run.leg.receive(100) == b"6789"


async def test_an_eof_stays() -> None:
    async with running() as run:
        assert run.leg.receive(10) is None
        await run.peer.send_eof()
        assert await run.settle() == ["readable"]
        for _ in range(2):
            assert run.leg.receive(10) == b""
        assert not run.leg.broken
        assert run.leg.can_half_close


async def test_a_break_after_the_eof_is_told() -> None:
    class Breaking(DelegatingStream):
        """Knows of a break without reading."""

        async def wait_broken(self) -> bool:
            await is_broken.wait()
            return True

    is_broken = trio.Event()
    connection = MemoryConnection()
    leg = TaskLeg(Breaking(adopt(connection.client)))
    told: list[bool] = []
    leg.on_readable = lambda: told.append(leg.broken)
    async with trio.open_nursery() as nursery:
        for task in leg.tasks:
            nursery.start_soon(task)
        leg.receive(10)
        await connection.server.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert leg.receive(10) == b""
        assert told == [False]
        is_broken.set()
        await trio.testing.wait_all_tasks_blocked()
        assert told == [False, True]
        nursery.cancel_scope.cancel()


async def test_what_was_read_before_a_break_comes_first_and_the_break_stays() -> None:
    async with running() as run:
        assert run.leg.receive(10) is None
        await run.peer.send_all(b"half")
        assert await run.settle() == ["readable"]
        run.peer.reset()
        assert run.leg.receive(10) == b"half"
        assert run.leg.receive(10) is None
        assert await run.settle() == ["readable"]
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError):
                run.leg.receive(10)


@pytest.mark.parametrize("error", [trio.ClosedResourceError, HandedOver])
async def test_it_raises_what_its_stream_raised(error: type[Exception]) -> None:
    class Raising(DelegatingStream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            raise error

    leg = TaskLeg(Raising(adopt(MemoryConnection().client)))
    told: list[str] = []
    leg.on_readable = lambda: told.append("readable")
    read, _ = leg.tasks
    assert leg.receive(1) is None
    await read()
    assert told == ["readable"]
    with pytest.raises(error):
        leg.receive(1)


async def test_what_is_sent_meanwhile_is_joined_and_eof_comes_after_it() -> None:
    async with running() as run:
        assert (run.leg.room, run.leg.sent) == (LARGEST_READ, True)
        run.leg.send(b"one, ")
        run.leg.send(memoryview(b"two, "))
        run.leg.send(bytearray(b"three"))
        run.leg.send_eof()
        assert (run.leg.room, run.leg.sent) == (0, False)
        told = await run.settle()
        assert set(told) == {"writable"}
        assert (run.leg.room, run.leg.sent) == (LARGEST_READ, True)
        assert await run.peer.receive_some() == b"one, two, three"
        assert await run.peer.receive_some() == b""


async def test_there_is_no_room_until_a_slow_peer_has_read() -> None:
    async with running() as run:
        run.leg.send(bytes(BUFFER + 1))
        assert await run.settle() == []
        assert (run.leg.room, run.leg.sent) == (0, False)
        received = 0
        while received <= BUFFER:
            received += len(await run.peer.receive_some())
            await trio.testing.wait_all_tasks_blocked()
        assert await run.settle() == ["writable"]
        assert (run.leg.room, run.leg.sent) == (LARGEST_READ, True)


async def test_a_stream_that_says_how_much_it_takes_is_waited_for() -> None:
    class Narrow(DelegatingStream):
        @property
        def room(self) -> int:
            return room

        async def wait_send_all_might_not_block(self) -> None:
            await has_room.wait()

    room, has_room = 7, trio.Event()
    leg = TaskLeg(Narrow(adopt(MemoryConnection().client)))
    told: list[int] = []
    leg.on_writable = lambda: told.append(leg.room)
    async with trio.open_nursery() as nursery:
        for task in leg.tasks:
            nursery.start_soon(task)
        assert leg.room == 7
        room = 0
        assert leg.room == 0
        await trio.testing.wait_all_tasks_blocked()
        assert told == []
        room = 5
        has_room.set()
        await trio.testing.wait_all_tasks_blocked()
        assert told == [5]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["data", "eof"])
async def test_a_refusal_is_told_once_and_nothing_waits_any_more(what: str) -> None:
    class Refusing(DelegatingStream):
        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            raise trio.BrokenResourceError

        async def send_eof(self) -> None:
            raise trio.BrokenResourceError

    leg = TaskLeg(Refusing(adopt(MemoryConnection().client)))
    told: list[Exception | None] = []
    leg.on_writable = lambda: told.append(leg.refusal)
    if what == "data":
        leg.send(b"lost")
    leg.send_eof()
    _, write = leg.tasks
    await write()
    (refusal,) = told
    assert isinstance(refusal, trio.BrokenResourceError)
    assert leg.sent, "an exchange need not wait for it"


async def test_a_bug_of_the_stream_ends_the_task_that_met_it() -> None:
    class Buggy(DelegatingStream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            raise ZeroDivisionError

    leg = TaskLeg(Buggy(adopt(MemoryConnection().client)))
    leg.receive(1)
    read, _ = leg.tasks
    with pytest.raises(ZeroDivisionError):
        await read()
