"""The short way between two sockets keeps every promise of the long one, with splice and without."""

from __future__ import annotations

import errno
import functools
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
from rig import in_background, nothing_left_behind, read_all, read_exactly

from pioneer_tunnel import pump as pump_module, splice
from pioneer_tunnel.dialer import dial_tcp
from pioneer_tunnel.pump import pump
from pioneer_tunnel.splice import CAN_SPLICE, carry
from pioneer_tunnel.streams import WatchedStream, abandon


@pytest.fixture(params=["splice", "buffer", "no pipe to be had", "sockets not made for it"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way that bytes can take, forced."""
    name: str = request.param
    if name == "splice" and not CAN_SPLICE:
        pytest.skip("this system has no splice")
    if name == "buffer":
        monkeypatch.setattr(pump_module, "carry", functools.partial(carry, splice=False))
    if name == "no pipe to be had":
        monkeypatch.setattr(splice, "_MOST_PIPES", 0)
    if name == "sockets not made for it":

        def refuse(*args: Any, **kwargs: Any) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(os, "splice", refuse, raising=False)
    return name


async def connection() -> tuple[trio.SocketStream, WatchedStream]:
    """A connection: somebody's end, and the end that is pumped."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        outer = await dial_tcp("127.0.0.1", listener.socket.getsockname()[1])
        return outer, WatchedStream(await listener.accept())


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
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(exchange, left)
                    nursery.start_soon(exchange, right)
                await over.wait()
            assert pipes() == before


@pytest.mark.skipif(not CAN_SPLICE, reason="this system has no splice")
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


async def test_half_close_both_ways_round(way: str) -> None:
    async with pumped() as (left, right, over):
        with trio.fail_after(5):
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
                with trio.fail_after(5):
                    with pytest.raises(trio.BrokenResourceError):
                        await read_all(ends[other])
                    await over.wait()


async def test_a_slow_reader_holds_the_writer_up_and_loses_nothing(way: str) -> None:
    data = random.Random(1).randbytes(30_000_000)
    async with pumped() as (left, right, _), trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, data)
        await trio.sleep(0.1)
        with trio.fail_after(20):
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
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(one, number)
    assert max(most) <= 2 * 32
    assert pipes() == before


@pytest.mark.parametrize("seed", range(15))
async def test_cancelled_at_any_moment_both_ends_are_reset_and_nothing_stays(way: str, seed: int) -> None:
    before, chance = pipes(), random.Random(seed)
    with nothing_left_behind():
        left, first = await connection()
        right, second = await connection()
        async with left, right, trio.open_nursery() as nursery:
            with trio.move_on_after(chance.uniform(0, 0.01)):
                async with trio.open_nursery() as pumping:
                    pumping.start_soon(pump, first, second)
                    pumping.start_soon(left.send_all, bytes(chance.randrange(10_000_000)))
                    if chance.random() < 0.5:
                        pumping.start_soon(_discard, right)
                    await trio.sleep_forever()
            with trio.fail_after(5):
                for end in (left, right):
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
