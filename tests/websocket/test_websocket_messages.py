"""Messages of a WebSocket: in order, up to the largest, and how bytes are packed into them."""

from __future__ import annotations

import itertools

import pytest
import trio
from hypothesis import given, strategies as st
from websocket_rig import each_pairing, open_pair, receive_bytes, receive_close, receive_texts

from pioneer_tunnel.websocket import MAX_BINARY, MAX_TEXT, EngineName, WebSocket
from pioneer_tunnel.websocket.messages import MESSAGE_SIZE, messages_of
from pioneer_tunnel.yamux.frames import LARGEST_FRAME


@each_pairing
async def test_messages_arrive_in_order_both_ways(client_engine: EngineName, server_engine: EngineName) -> None:
    async with open_pair(client_engine, server_engine) as (client, server):
        for sender, receiver in ((client, server), (server, client)):
            await sender.send(["one", "", "three é \U0001f600"])
            assert await receive_texts(receiver, 3) == ["one", "", "three é \U0001f600"]
            data = [bytes([number]) * (number * 700) for number in range(1, 90)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.send, data)
                assert await receive_bytes(receiver, sum(map(len, data))) == b"".join(data)


@each_pairing
async def test_the_largest_messages_are_taken(client_engine: EngineName, server_engine: EngineName) -> None:
    async with open_pair(client_engine, server_engine) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(client.send, [bytes(MAX_BINARY)])
        assert await receive_bytes(server, MAX_BINARY) == bytes(MAX_BINARY)
        nursery.start_soon(client.send, ["é" * (MAX_TEXT // 2)])
        assert await receive_texts(server, 1) == ["é" * (MAX_TEXT // 2)]


@each_pairing
@pytest.mark.parametrize(
    "message",
    [bytes(MAX_BINARY + 1), "x" * (MAX_TEXT + 1), "é" * (MAX_TEXT // 2 + 1)],
    ids=["binary", "text", "text, counted in bytes"],
)
async def test_larger_messages_close_with_1009(
    client_engine: EngineName, server_engine: EngineName, message: bytes | str
) -> None:
    for receiving in (0, 1):
        async with open_pair(client_engine, server_engine) as ends, trio.open_nursery() as nursery:
            receiver, sender = ends[receiving], ends[1 - receiving]
            nursery.start_soon(sender.send, [message])

            @nursery.start_soon
            async def hear(sender: WebSocket = sender) -> None:
                assert (await receive_close(sender)).code == 1009

            assert (await receive_close(receiver)).code == 1009
            with trio.move_on_after(1):
                await receiver.aclose()


def test_a_message_is_as_large_as_a_frame_of_yamux_that_is_made_for_it() -> None:
    assert MESSAGE_SIZE == LARGEST_FRAME


@given(st.lists(st.integers(1, 3 * MESSAGE_SIZE) | st.integers(1, 500), max_size=20))
def test_pack_joins_and_cuts_within_64_kib(sizes: list[int]) -> None:
    chunks = [bytes([index]) * size for index, size in enumerate(sizes)]
    messages = [b"".join(message) for message, _ in messages_of(chunks)]
    assert b"".join(messages) == b"".join(chunks)
    assert all(0 < len(message) <= MESSAGE_SIZE for message in messages)
    ends = set(itertools.accumulate(map(len, messages)))
    for start, chunk in zip(itertools.accumulate(sizes, initial=0), chunks, strict=False):
        if len(chunk) <= MESSAGE_SIZE:
            assert not any(start < end < start + len(chunk) for end in ends), "a small chunk was cut"
