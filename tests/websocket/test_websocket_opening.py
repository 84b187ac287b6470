"""The opening of a WebSocket: the same by either engine, and towards an end that is none."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import hostile
import pytest
import trio
import trio.testing
from hostile import BINARY, TEXT, accepting
from rig import no_hang, nothing_left_behind, read_until, tcp_pair, until_it_raises
from websocket_rig import OPENING, each_pairing, open_pair, receive_close

from pioneer_tunnel._model.errors import UnsupportedTransportError
from pioneer_tunnel.websocket import ENGINES, EngineName, Opening, WebSocketRefused, load_engine


@each_pairing
async def test_opening_agrees_on_the_subprotocol(client_engine: EngineName, server_engine: EngineName) -> None:
    async with open_pair(client_engine, server_engine) as (client, server):
        assert client.subprotocol == server.subprotocol == "test.v1"


async def test_the_request_names_host_path_and_agent(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def look() -> None:
        request = (await read_until(theirs, b"\r\n\r\n")).decode().lower()
        assert request.startswith("get /path http/1.1\r\n")
        assert "\r\nhost: relay.test\r\n" in request
        assert "\r\nuser-agent: test/1\r\n" in request
        assert "\r\nsec-websocket-protocol: test.v1\r\n" in request
        assert "sec-websocket-extensions" not in request, "no compression"
        await theirs.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        with pytest.raises((trio.BrokenResourceError, WebSocketRefused)):
            async with load_engine(engine).connect(ours, OPENING):
                pytest.fail("it opened")


@each_pairing
async def test_a_server_without_the_subprotocol_is_told_apart(
    client_engine: EngineName, server_engine: EngineName
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def serve() -> None:
        try:
            async with load_engine(server_engine).accept(theirs, Opening(subprotocol="other.v1")) as websocket:
                assert websocket.subprotocol is None
                await receive_close(websocket)
        except WebSocketRefused:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        try:
            async with load_engine(client_engine).connect(ours, OPENING) as client:
                assert client.subprotocol is None
                await client.aclose()
        except WebSocketRefused:
            pass  # the server has said so already


async def test_a_connection_that_ends_without_an_answer_is_broken(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.aclose()
    with no_hang(), pytest.raises((trio.BrokenResourceError, WebSocketRefused)):
        async with load_engine(engine).connect(ours, OPENING):
            pytest.fail("it opened")


@pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(99)])
async def test_a_client_that_is_none_is_refused(engine: EngineName, said: bytes) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.send_all(said)
    await ours.send_eof()
    with no_hang(), pytest.raises((trio.BrokenResourceError, WebSocketRefused)):
        async with load_engine(engine).accept(theirs, OPENING):
            pytest.fail("it opened")


async def test_a_client_that_leaves_when_it_has_asked_is_broken(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def nobody_is_there() -> None:
        raise trio.BrokenResourceError("the client is gone")

    theirs.send_stream.send_all_hook = nobody_is_there
    request = (
        "GET /path HTTP/1.1\r\nHost: relay.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n"
        "Sec-WebSocket-Protocol: test.v1\r\n\r\n"
    )
    await ours.send_all(request.encode())
    with no_hang(), pytest.raises(trio.BrokenResourceError):
        async with load_engine(engine).accept(theirs, OPENING) as websocket:
            await until_it_raises(websocket.receive)


@asynccontextmanager
async def raw_server(answer: bytes) -> AsyncIterator[trio.abc.Stream]:
    """The client's stream to a server that answers with these bytes, in which `ACCEPT` stands for the right one."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def serve() -> None:
        request = await read_until(theirs, b"\r\n\r\n")
        key = next(line.split()[1] for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
        await theirs.send_all(answer.replace(b"ACCEPT", accepting(key)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield ours


SWITCHING: Final = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


async def test_what_comes_with_the_answer_is_not_lost(engine: EngineName) -> None:
    frames = hostile.frame(TEXT, b"early") + hostile.frame(BINARY, b"bytes")
    answer = SWITCHING + b"Date: today\r\nSec-WebSocket-Accept: ACCEPT\r\n\r\n" + frames
    async with raw_server(answer) as stream, load_engine(engine).connect(stream, OPENING) as client:
        received = list[str | bytes]()
        with no_hang():
            while len(received) < 2:
                received += [each if isinstance(each, str) else bytes(each) for each in await client.receive()]
        assert received == ["early", b"bytes"]
        assert client.date == "today"


@pytest.mark.parametrize("answer", [SWITCHING + b"Sec-WebSocket-Accept: wrong\r\n\r\n", SWITCHING + b"\r\n"])
async def test_a_server_that_does_not_prove_that_it_understands_is_refused(engine: EngineName, answer: bytes) -> None:
    async with raw_server(answer) as stream:
        with no_hang(), pytest.raises(WebSocketRefused):
            async with load_engine(engine).connect(stream, OPENING):
                pytest.fail("it opened")


def test_an_engine_that_is_not_there_is_named() -> None:
    with pytest.raises(UnsupportedTransportError, match="speed"):
        load_engine("another")  # type: ignore[arg-type]
    assert "trio-websocket" in ENGINES


@pytest.mark.parametrize("moment", range(12))
async def test_an_opening_cancelled_at_any_checkpoint_leaves_nothing_behind(engine: EngineName, moment: int) -> None:
    streams = await tcp_pair()
    with nothing_left_behind(), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def cancel() -> None:
                for _ in range(moment):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            async with open_pair(engine, engine, streams):
                await trio.sleep_forever()
    for stream in streams:
        assert isinstance(stream, trio.SocketStream)
        assert stream.socket.fileno() == -1
