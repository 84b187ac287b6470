"""How a WebSocket ends: codes and reasons, peers that vanish, and what is left behind."""

from __future__ import annotations

import tracemalloc

import pytest
import trio
import trio.testing
from hostile import BINARY, CLOSE, PING, TEXT
from rig import no_hang, nothing_left_behind, raise_again_and_again, run_until_it_waits, tcp_pair, until_it_raises
from websocket_rig import each_pairing, frame, open_pair, raw_client, read_frame, receive_close, receive_texts

from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel.websocket import MAX_BINARY, EngineName, WebSocketClosed


async def test_what_comes_during_the_closing_is_not_kept(engine: EngineName) -> None:
    """Found by an attack: a peer that was told to go sent 350 MB meanwhile, and all of it was kept."""
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:
        piece = frame(BINARY, bytes(500_000))

        @nursery.start_soon
        async def go_on() -> None:
            for _ in range(40):
                await client.send_all(piece)
                await trio.testing.wait_all_tasks_blocked()  # until it was read
            await client.send_all(frame(CLOSE, (1002).to_bytes(2, "big")))

        tracemalloc.start()
        try:
            with no_hang():
                await server.close(1002)
            assert tracemalloc.get_traced_memory()[1] < 8_000_000
        finally:
            tracemalloc.stop()


@each_pairing
async def test_close_codes_arrive_both_ways(client_engine: EngineName, server_engine: EngineName) -> None:
    for closing, code, reason in ((0, 1000, ""), (1, 1001, "stopping"), (1, 4001, "replaced"), (0, 1008, "no")):
        async with open_pair(client_engine, server_engine) as ends, trio.open_nursery() as nursery:
            closer, other = ends[closing], ends[1 - closing]
            await closer.send(["the last word"])
            nursery.start_soon(closer.close, code, reason)
            with no_hang():
                assert await receive_texts(other, 1) == ["the last word"]
            closed = await receive_close(other)
            assert (closed.code, closed.reason) == (code, reason)
            with pytest.raises(trio.BrokenResourceError):
                await other.send(["too late"])
            with no_hang():
                await other.aclose()


async def test_an_answered_close_is_not_waited_for_any_longer(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.close, 1000)
        with no_hang():
            assert (await read_frame(client))[0] == CLOSE
            await client.send_all(frame(CLOSE, (1000).to_bytes(2, "big")))
            assert await client.receive_some() == b"", "the connection is closed as well"


@pytest.mark.parametrize("last", [frame(CLOSE, (1000).to_bytes(2, "big")), frame(3, b"reserved opcode")])
async def test_what_comes_after_our_close_frame_does_not_stop_the_closing(engine: EngineName, last: bytes) -> None:
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.close, 1000)
        with no_hang():
            assert (await read_frame(client))[0] == CLOSE
            await client.send_all(frame(PING, b"still there?") + frame(TEXT, b"text") + last)
            assert await client.receive_some() == b"", "the ping is not answered, and the connection is closed"


async def test_a_close_without_a_code_is_1005(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server):
        await client.send_all(frame(CLOSE))
        assert (await receive_close(server)).code == 1005


async def test_a_close_can_be_raised_again_and_again(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server):
        await client.send_all(frame(CLOSE, (1000).to_bytes(2, "big")))
        with pytest.raises(WebSocketClosed):
            await server.receive()
        await raise_again_and_again(server.receive, WebSocketClosed)
        await raise_again_and_again(lambda: server.send([b"x"]), WebSocketClosed)


async def test_a_close_reason_cannot_forge_a_log_line(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server):
        await client.send_all(frame(CLOSE, (1000).to_bytes(2, "big") + b"a\r\nb\x1b[31m"))
        assert (await receive_close(server)).reason == "a b [31m"


@each_pairing
async def test_a_peer_that_vanishes_is_broken_and_not_closed(
    client_engine: EngineName, server_engine: EngineName
) -> None:
    for resetting in (False, True):
        ours, theirs = await tcp_pair()
        async with open_pair(client_engine, server_engine, (ours, theirs)) as (_, server):
            await (abandon(ours) if resetting else trio.aclose_forcefully(ours))
            with no_hang(), pytest.raises(trio.BrokenResourceError) as broken:
                await server.receive()
            assert not isinstance(broken.value, WebSocketClosed)
            with no_hang():
                await server.aclose()


@each_pairing
async def test_a_cancelled_send_is_good_for_nothing_but_aclose(
    client_engine: EngineName, server_engine: EngineName
) -> None:
    async with open_pair(client_engine, server_engine, await tcp_pair()) as (client, server):
        await run_until_it_waits(lambda: client.send([bytes(MAX_BINARY)] * 32))
        with trio.move_on_after(0.1):
            await client.aclose()
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await until_it_raises(server.receive)


@each_pairing
@pytest.mark.parametrize("how", ["quietly", "cancelled", "raising"])
async def test_leaving_leaves_nothing_behind(client_engine: EngineName, server_engine: EngineName, how: str) -> None:
    with nothing_left_behind(), trio.CancelScope() as scope:
        try:
            async with open_pair(client_engine, server_engine, await tcp_pair()) as (client, _):
                await client.send(["hello"])
                if how == "cancelled":
                    scope.cancel()
                    await trio.sleep_forever()
                if how == "raising":
                    raise ValueError
        except* ValueError:
            pass
