"""What the WebSocket engines make of frames: fragments, pings, what breaks a rule, and floods."""

from __future__ import annotations

import tracemalloc

import pytest
import trio
import trio.testing
from hostile import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT
from rig import no_hang, until_it_raises
from websocket_rig import frame, raw_client, read_frame, receive_bytes, receive_close

from pioneer_tunnel.websocket import EngineName
from pioneer_tunnel.websocket.frame_meter import FRAMES_PER_TURN


async def test_fragments_of_a_message_are_joined(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server):
        await client.send_all(
            frame(TEXT, b"caf\xc3", fin=False) + frame(PING, b"now?") + frame(CONTINUATION, b"\xa9")
            + frame(BINARY, b"ab", fin=False) + frame(CONTINUATION, b"", fin=False) + frame(CONTINUATION, b"cd")
        )  # fmt: skip
        texts: list[str] = []
        data = b""
        with no_hang():
            while data != b"abcd":
                for message in await server.receive():
                    if isinstance(message, str):
                        texts.append(message)
                    else:
                        data += message
            assert texts == ["café"]
            assert await read_frame(client) == (PONG, b"now?")


async def test_a_long_text_in_fragments_closes_with_1009(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await client.send_all(frame(TEXT, b"x" * 10_000, fin=False) + frame(CONTINUATION, b"x" * 10_000))
            assert (await read_frame(client))[1][:2] == (1009).to_bytes(2, "big")
            await client.send_all(frame(CLOSE, (1009).to_bytes(2, "big")))
            await client.aclose()

        assert (await receive_close(server)).code == 1009


async def test_a_text_in_endless_empty_fragments_is_not_waited_for(engine: EngineName) -> None:
    """Found by an attack: they cost their sender six bytes each, and this end the square of their number."""
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await client.send_all(frame(TEXT, b"", fin=False) + frame(CONTINUATION, b"", fin=False) * 300)
            assert (await read_frame(client))[1][:2] == (1009).to_bytes(2, "big")
            await client.send_all(frame(CLOSE, (1009).to_bytes(2, "big")))
            await client.aclose()

        assert (await receive_close(server)).code == 1009


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (frame(CONTINUATION, b"of nothing"), 1002),
        (frame(3, b"reserved opcode"), 1002),
        (frame(BINARY, b"not masked", masked=False), 1002),
        (frame(CLOSE, b"\x03"), 1002),
        (frame(PING, bytes(126)), 1002),
        (frame(TEXT, b"\xff\xfe"), 1007),
        (frame(BINARY, b"begun", fin=False) + frame(TEXT, b"inside"), 1002),
        (frame(TEXT, b"begun", fin=False) + frame(BINARY, b"inside"), 1002),
    ],
    ids=["continuation", "opcode", "unmasked", "close", "ping", "utf-8", "in binary", "in text"],
)
async def test_what_breaks_a_rule_closes_with_its_code(engine: EngineName, wrong: bytes, code: int) -> None:
    async with raw_client(engine) as (client, server):
        await client.send_all(wrong)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def look() -> None:
                opcode, payload = await read_frame(client)
                assert (opcode, int.from_bytes(payload[:2], "big")) == (CLOSE, code)
                await client.aclose()

            assert (await receive_close(server)).code == code


async def test_a_ping_is_answered_while_nobody_receives_or_sends(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.receive)
        with no_hang():
            for number in range(5):
                await client.send_all(frame(PING, b"%d" % number))
                assert await read_frame(client) == (PONG, b"%d" % number)
        nursery.cancel_scope.cancel()


async def test_pings_do_not_stop_the_receiver_while_the_writer_is_blocked(engine: EngineName) -> None:
    async with (
        raw_client(engine, trio.testing.lockstep_stream_pair()) as (client, server),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(server.send, [bytes(100_000)])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(client.send_all, frame(PING, b"there?") + frame(BINARY, b"more"))
        with no_hang():
            assert await receive_bytes(server, 4) == b"more"
            assert await read_frame(client) == (BINARY, bytes(100_000))
            assert await read_frame(client) == (PONG, b"there?")


async def test_pings_that_nobody_lets_us_answer_are_bounded(engine: EngineName) -> None:
    async with (
        raw_client(engine, trio.testing.lockstep_stream_pair()) as (client, server),
        trio.open_nursery() as nursery,
    ):

        @nursery.start_soon
        async def flood() -> None:
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                await until_it_raises(lambda: client.send_all(frame(PING, b"!") * 50))

        assert (await receive_close(server)).code == 1008
        await trio.aclose_forcefully(server)


@pytest.mark.parametrize("small", [frame(CONTINUATION, fin=False), frame(PONG), frame(PONG, b"x" * 125)])
async def test_many_small_frames_leave_others_their_turn(engine: EngineName, small: bytes) -> None:
    """One read may bring 100,000 frames, and the engines parse all that they are given without a pause."""
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:
        turns = 0

        @nursery.start_soon
        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        await client.send_all(frame(BINARY, bytes(1024 * 1024 - 10)))  # so that reads are as large as they get
        await receive_bytes(server, 1024 * 1024 - 10)
        before = turns
        await client.send_all(frame(BINARY, fin=False) + small * 10_000 + frame(CONTINUATION, b"the last"))
        assert await receive_bytes(server, 8) == b"the last"
        assert turns - before >= 10_000 // FRAMES_PER_TURN
        nursery.cancel_scope.cancel()


async def test_a_stranger_who_says_little_costs_little(engine: EngineName) -> None:
    """Found by an attack: each connection had a buffer for the largest read, before it had proved anything."""
    async with raw_client(engine) as (_, server):
        tracemalloc.start()
        try:
            async with raw_client(engine) as (_, another):
                assert another is not server
                assert tracemalloc.get_traced_memory()[1] < 200_000
        finally:
            tracemalloc.stop()
