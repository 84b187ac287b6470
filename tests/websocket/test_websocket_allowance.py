"""What a WebSocket takes before the other end is trusted."""

from __future__ import annotations

import base64

import attrs
import hostile
import pytest
import trio
import trio.testing
from fuzzing import fuzzed
from hostile import BINARY, CONTINUATION, PING, PONG, TEXT
from hypothesis import given, strategies as st
from rig import no_hang, until_it_raises
from websocket_rig import OPENING, frame, raw_client, read_frame, receive_bytes, receive_close, receive_texts
from yamux_rig import cut

from pioneer_tunnel._model.exception_groups import lone_error_bare
from pioneer_tunnel.websocket import (
    MAX_BINARY,
    Allowance,
    EngineName,
    Opening,
    WebSocketClosed,
    WebSocketRefused,
    load_engine,
)
from pioneer_tunnel.websocket.frame_meter import FRAMES_PER_TURN, FrameMeter


def stranger(**allowed: int) -> Opening:
    return attrs.evolve(OPENING, allowance=Allowance(**({"size": 24 * 1024, "frames": 16} | allowed)))


@pytest.mark.parametrize(
    "flood",
    [
        frame(PING) * 17,
        frame(PONG) * 17,
        frame(TEXT, b"{}") * 17,
        frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) * 16,
        frame(BINARY, bytes(24 * 1024)),
        frame(PING, bytes(125)) * 400,
    ],
    ids=["pings", "pongs", "texts", "fragments", "bytes", "a read of large pings"],
)
async def test_a_stranger_that_sends_more_than_its_allowance_is_cut_off(engine: EngineName, flood: bytes) -> None:
    async with raw_client(engine, opening=stranger()) as (client, server):
        await client.send_all(flood)
        with no_hang(), pytest.raises(trio.BrokenResourceError) as broken:
            await until_it_raises(server.receive)
        assert not isinstance(broken.value, WebSocketClosed)


async def test_the_size_of_a_message_counts_from_before_the_trust(engine: EngineName) -> None:
    """The library has begun with such a message, and gets the rest of it, too."""
    async with raw_client(engine, opening=stranger()) as (client, server), trio.open_nursery() as nursery:
        await client.send_all(frame(BINARY, b"begun", fin=False))
        assert await receive_bytes(server, 5) == b"begun"
        server.trust()

        @nursery.start_soon
        async def send() -> None:
            await client.send_all(frame(CONTINUATION, bytes(MAX_BINARY // 2), fin=False) * 2)
            assert (await read_frame(client))[1][:2] == (1009).to_bytes(2, "big")
            await client.aclose()

        assert (await receive_close(server)).code == 1009


async def test_a_message_that_began_before_the_trust_has_to_end_before_another_one(engine: EngineName) -> None:
    async with raw_client(engine, opening=stranger()) as (client, server):
        await client.send_all(frame(BINARY, b"begun", fin=False))
        assert await receive_bytes(server, 5) == b"begun"
        server.trust()
        await client.send_all(frame(PING, b"between"))
        with no_hang():
            await server.receive_bytes()
            assert await read_frame(client) == (PONG, b"between")
        await client.send_all(frame(BINARY, b"another"))
        assert (await receive_close(server)).code == 1002


async def test_an_allowance_counts_frames_that_come_with_the_request(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    key = base64.b64encode(bytes(16))
    await ours.send_all(
        b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Protocol: test.v1\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n" + frame(PONG) * 1000
    )
    # One engine reads on before its request is answered, so it may end in the opening.
    with no_hang(), lone_error_bare(), pytest.raises((trio.BrokenResourceError, WebSocketRefused)):
        async with load_engine(engine).accept(theirs, stranger()) as server:
            await until_it_raises(server.receive)


async def test_a_trusted_end_has_no_allowance(engine: EngineName) -> None:
    async with raw_client(engine, opening=stranger()) as (client, server):
        await client.send_all(frame(TEXT, b"x" * 10_000) + frame(PING) * 15)
        assert await receive_texts(server, 1) == ["x" * 10_000]
        server.trust()
        await client.send_all(frame(BINARY, bytes(100_000)) + frame(BINARY, b"!") * 100)
        assert await receive_bytes(server, 100_100) == bytes(100_000) + b"!" * 100


sizes = st.sampled_from([0, 1, 125, 126, 300, 65_535, 65_536])


@fuzzed()
@given(
    st.lists(st.tuples(sizes, st.booleans()), max_size=100), st.sampled_from([b"\r\n\r\n", b"\n\n", b"\n\r\n"]),
    st.lists(st.integers(0, 1000), max_size=20),
)  # fmt: skip
def test_a_meter_admits_whole_turns_of_frames(parts: list[tuple[int, bool]], end: bytes, places: list[int]) -> None:
    """However reads are cut, the head comes alone, each portion after it begins at most as many frames as a turn may
    have, and all bytes pass.
    """
    frames_of = [hostile.frame(BINARY, bytes(size), masked=masked) for size, masked in parts]
    head = b"GET /" + end
    starts = {len(head) + sum(map(len, frames_of[:number])) for number in range(len(parts))}
    said = head + b"".join(frames_of)
    meter, passed = FrameMeter(), 0
    for piece in cut(said, places):
        until = passed + len(piece)
        while passed < until:
            amount = meter.admit(memoryview(said)[passed:until])
            begun = [start for start in starts if passed <= start < passed + amount]
            assert passed >= len(head) or passed + amount <= len(head)
            passed += amount
            assert passed in {until, len(head)} or len(begun) == FRAMES_PER_TURN
            assert len(begun) <= FRAMES_PER_TURN
    assert passed == len(said)
