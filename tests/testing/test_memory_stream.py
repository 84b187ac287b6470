"""Connections in memory: Trio's contract, and each way of going wrong, in virtual time."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from rig import read_all, read_exactly

from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel.testing import MemoryConnection, MemoryStream, virtual_time


async def make_pair() -> tuple[MemoryStream, MemoryStream]:
    connection = MemoryConnection()
    return connection.client, connection.server


async def make_clogged_pair() -> tuple[MemoryStream, MemoryStream]:
    connection = MemoryConnection(buffer=16)
    for end in (connection.client, connection.server):
        await end.send_all(bytes(16))
    return connection.client, connection.server


async def test_it_keeps_the_contract_of_trio() -> None:
    await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)


@virtual_time
async def test_a_full_buffer_holds_the_sender_until_somebody_reads() -> None:
    connection = MemoryConnection(buffer=10)
    with trio.move_on_after(1) as gave_up:
        await connection.client.send_all(bytes(25))
    assert gave_up.cancelled_caught
    assert await connection.server.receive_some() == bytes(10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.client.send_all, bytes(25))
        assert await read_exactly(connection.server, 25) == bytes(25)


@virtual_time
async def test_an_end_with_bytes_unread_is_a_reset() -> None:
    connection = MemoryConnection()
    await connection.client.send_all(b"never read")
    await connection.server.send_all(b"an answer that is overtaken")
    await connection.server.aclose()
    with pytest.raises(trio.BrokenResourceError, match="reset"):
        await connection.client.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await connection.client.send_all(b"?")


@virtual_time
async def test_an_orderly_end_arrives_after_the_bytes() -> None:
    connection = MemoryConnection()
    await connection.client.send_all(b"all of it")
    await connection.client.aclose()
    assert await read_all(connection.server) == b"all of it"


@virtual_time
async def test_what_is_abandoned_is_reset() -> None:
    connection = MemoryConnection()
    await connection.client.send_all(b"dropped")
    await abandon(connection.client)
    with pytest.raises(trio.BrokenResourceError, match="reset"):
        await connection.server.receive_some()


@virtual_time
async def test_a_reset_takes_back_an_end_that_nobody_has_read() -> None:
    connection = MemoryConnection()
    await connection.client.send_all(b"all of it")
    await connection.client.send_eof()
    connection.client.reset()
    with pytest.raises(trio.BrokenResourceError, match="reset"):
        await connection.server.receive_some()


@virtual_time
async def test_a_cut_breaks_both_ends_wherever_they_wait() -> None:
    connection = MemoryConnection(buffer=1)
    await connection.client.send_all(b"x")
    told = []

    async def broken(name: str, call: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(trio.BrokenResourceError, match="cut"):
            await call()
        told.append(name)

    await connection.server.send_all(b"z")
    assert await connection.client.receive_some() == b"z"
    await connection.server.send_all(b"z")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broken, "send", lambda: connection.client.send_all(b"y"))
        nursery.start_soon(broken, "room", connection.server.wait_send_all_might_not_block)
        await trio.sleep(1)
        assert not told
        connection.cut()
    assert sorted(told) == ["room", "send"]
    await broken("receive", connection.client.receive_some)
    assert not connection.whole


@pytest.mark.parametrize("amount", [0, 1, 5, 6, 7])
@virtual_time
async def test_so_many_bytes_come_through_and_no_more(amount: int) -> None:
    connection = MemoryConnection()
    connection.cut_after(amount)
    received = b""
    try:
        await connection.client.send_all(b"abc")
        received += await connection.server.receive_some()
        await connection.server.send_all(b"def")
        received += await connection.client.receive_some()
    except trio.BrokenResourceError:
        assert amount <= 6
    else:
        assert amount == 7
    assert connection.carried == min(amount, 6)
    assert received == b"abcdef"[: 3 * (amount > 3) + 3 * (amount > 6)]


@pytest.mark.parametrize("amount", range(5))
@virtual_time
async def test_one_direction_is_cut_after_so_many_bytes(amount: int) -> None:
    connection = MemoryConnection()
    connection.cut_after(amount, towards="client")
    received = b""
    try:
        await connection.client.send_all(b"abcdefg")
        for letter in (b"x", b"y", b"z"):
            await connection.server.send_all(letter)
            received += await connection.client.receive_some()
    except trio.BrokenResourceError:
        assert amount <= 3
    assert received == b"xyz"[: max(amount - 1, 0)] if amount <= 3 else received == b"xyz"


@virtual_time
async def test_into_a_black_hole_goes_a_buffer_and_no_more() -> None:
    connection = MemoryConnection(buffer=8)
    connection.black_hole()
    with trio.move_on_after(60) as gave_up:
        await connection.client.send_all(bytes(9))
    assert gave_up.cancelled_caught
    with trio.move_on_after(60) as heard_nothing:
        await connection.server.receive_some()
    assert heard_nothing.cancelled_caught


@virtual_time
async def test_nobody_is_told_of_an_end_in_a_black_hole() -> None:
    for last_word in (MemoryStream.aclose, MemoryStream.send_eof, abandon):
        connection = MemoryConnection()
        connection.black_hole()
        await last_word(connection.client)
        with trio.move_on_after(3600) as heard_nothing:
            await connection.server.receive_some()
        assert heard_nothing.cancelled_caught


@virtual_time
async def test_a_black_hole_that_heals_has_lost_nothing() -> None:
    changes = []
    connection = MemoryConnection(on_change=lambda: changes.append(connection.whole))
    await connection.client.send_all(b"before, ")
    connection.black_hole()
    await connection.client.send_all(b"meanwhile, ")
    await connection.client.send_eof()
    connection.heal()
    assert await read_all(connection.server) == b"before, meanwhile, "
    assert changes == [False, True]


@settings(max_examples=30, deadline=None)
@given(
    speed=st.sampled_from([100, 1000, 65536]),
    sizes=st.lists(st.integers(0, 2000), max_size=3),
    max_bytes=st.sampled_from([None, 1000]),
)
@virtual_time
async def test_a_slow_connection_takes_as_long_as_its_bytes(
    speed: int, sizes: list[int], max_bytes: int | None
) -> None:
    connection = MemoryConnection(buffer=1024)
    connection.slow_down(speed)
    data = b"".join(bytes([number]) * size for number, size in enumerate(sizes))
    received = b""

    async def send() -> None:
        for number, size in enumerate(sizes):
            await connection.client.send_all(bytes([number]) * size)
        await connection.client.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while piece := await connection.server.receive_some(max_bytes):
            received += piece
    assert received == data
    assert trio.current_time() == pytest.approx(len(data) / speed)


def test_what_is_no_speed_and_no_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="is no speed"):
        MemoryConnection().slow_down(0)
    with pytest.raises(ValueError, match="is no speed"):
        MemoryConnection().slow_down(math.nan)
    with pytest.raises(ValueError, match="passes nothing on"):
        MemoryConnection(buffer=0)
