"""A link over a WebSocket: bytes both ways, and texts aside."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hostile import BINARY, CLOSE, TEXT
from rig import no_hang
from stream_link import StreamLink
from websocket_rig import frame, raw_client, read_frame

from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel.websocket import EngineName, WebSocketLink
from pioneer_tunnel.yamux.frames import FrameType, encode_header


async def test_text_goes_aside_also_inside_a_yamux_frame(engine: EngineName) -> None:
    texts: list[str] = []
    ours, theirs = trio.testing.memory_stream_pair()
    watched = watch(theirs)
    async with raw_client(engine, (ours, watched)) as (client, server):
        link = WebSocketLink(server, watched, texts.append)
        head = encode_header(FrameType.DATA, 0, 1, 3)
        await client.send_all(
            frame(TEXT, b"first") + frame(BINARY, head[:5]) + frame(TEXT, b"second") + frame(BINARY, head[5:] + b"ab")
            + frame(TEXT, b"third") + frame(BINARY, b"c")
        )  # fmt: skip
        received = b""
        with no_hang():
            while len(received) < 15:
                received += b"".join(await link.receive())
        assert received == head + b"abc"
        assert texts == ["first", "second", "third"]
        await link.send([b"x" * 40_000, b"y" * 40_000])
        assert await read_frame(client) == (BINARY, b"x" * 40_000)
        assert await read_frame(client) == (BINARY, b"y" * 40_000)


async def test_a_text_that_raises_comes_out_of_receive(engine: EngineName) -> None:
    def refuse(text: str) -> None:
        raise ValueError(text)

    watched = watch(trio.testing.memory_stream_pair()[0])
    async with raw_client(engine) as (client, server):
        await client.send_all(frame(TEXT, b"replaced"))
        with pytest.raises(ValueError, match="replaced"):
            await WebSocketLink(server, watched, refuse).receive()


async def test_what_came_with_the_handshake_is_received_first(engine: EngineName) -> None:
    """Also by callbacks, which ask the engine only."""
    texts: list[str] = []
    watched = watch(trio.testing.memory_stream_pair()[0])
    async with raw_client(engine) as (client, server):
        await client.send_all(frame(BINARY, b"later"))
        for by_callback in (False, True):
            link = WebSocketLink(server, watched, texts.append, [b"early", "text", b"bytes"])
            assert list(link.receive_nowait() or () if by_callback else await link.receive()) == [b"early", b"bytes"]
        assert b"".join(await link.receive()) == b"later"
    assert texts == ["text"] * 2


async def test_an_offered_text_is_sent_soon(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with raw_client(engine, (ours, theirs)) as (client, server):
        assert server.driver.offer_text("report")
        with no_hang():
            assert await read_frame(client) == (TEXT, b"report")
            await trio.testing.wait_all_tasks_blocked()
            assert server.driver.offer_text("again")
            await server.send_binary([b"bytes"])
            frames = [await read_frame(client), await read_frame(client)]
            assert sorted(frames) == [(TEXT, b"again"), (BINARY, b"bytes")]


async def test_texts_are_not_offered_to_a_peer_that_reads_none(engine: EngineName) -> None:
    """Otherwise they would pile up without a bound."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def never() -> None:
        await trio.sleep_forever()

    async with raw_client(engine, (ours, theirs)) as (_, server):
        theirs.send_stream.send_all_hook = never
        assert server.driver.offer_text("one")
        await trio.testing.wait_all_tasks_blocked()
        taken = [server.driver.offer_text(f"{number}") for number in range(100)]
        assert sum(taken) <= 1


async def test_a_link_closes_with_the_code_that_it_was_given(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    watched = watch(theirs)
    async with raw_client(engine, (ours, watched)) as (client, server), trio.open_nursery() as nursery:
        link = WebSocketLink(server, watched, pytest.fail)
        link.close_code, link.close_reason = 4001, "replaced"
        nursery.start_soon(link.aclose)
        assert await read_frame(client) == (CLOSE, (4001).to_bytes(2, "big") + b"replaced")
        await client.aclose()


async def test_a_link_over_a_bare_stream_carries_bytes_both_ways() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with StreamLink(ours) as one, StreamLink(theirs) as other:
        await one.send([b"ab", bytearray(b"c"), memoryview(b"d")])
        assert b"".join(await other.receive()) == b"abcd"
        await one.aclose()
        assert await other.receive() == []
