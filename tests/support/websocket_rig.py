"""Two ends of a WebSocket: both of ours, or ours and a client made of bytes."""

from __future__ import annotations

import base64
import functools
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import hostile
import pytest
import trio
import trio.testing
from hostile import accepting
from rig import no_hang, read_exactly, read_until, until_it_raises

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel.websocket import ENGINES, EngineName, Opening, WebSocket, WebSocketClosed, load_engine

Pair = tuple[trio.abc.Stream, trio.abc.Stream]

OPENING: Final = Opening(subprotocol="test.v1", address=RelayAddress.parse("ws://relay.test/path"), agent="test/1")

each_pairing = pytest.mark.parametrize(("client_engine", "server_engine"), list(itertools.product(ENGINES, ENGINES)))


@asynccontextmanager
async def open_pair(
    client_engine: EngineName, server_engine: EngineName, streams: Pair | None = None
) -> AsyncIterator[tuple[WebSocket, WebSocket]]:
    """Two ends of one WebSocket: the client's and the server's."""
    ours, theirs = streams or trio.testing.memory_stream_pair()
    done = trio.Event()

    async def serve() -> None:
        async with load_engine(server_engine).accept(theirs, OPENING) as websocket:
            accepted.append(websocket)
            is_accepted.set()
            await done.wait()

    accepted: list[WebSocket] = []
    is_accepted = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with load_engine(client_engine).connect(ours, OPENING) as client:
            await is_accepted.wait()
            yield client, accepted[0]
        done.set()
        nursery.cancel_scope.deadline = trio.current_time() + 1


async def receive_texts(websocket: WebSocket, count: int) -> list[str]:
    """So many texts; nothing else may come."""
    texts: list[str] = []
    while len(texts) < count:
        for message in await websocket.receive():
            assert isinstance(message, str)
            texts.append(message)
    return texts


async def receive_bytes(websocket: WebSocket, amount: int) -> bytes:
    """At least so many bytes of binary messages; no text may come."""
    received = bytearray()
    while len(received) < amount:
        for message in await websocket.receive():
            assert not isinstance(message, str)
            received += message
    return bytes(received)


async def receive_close(websocket: WebSocket) -> WebSocketClosed:
    """Take messages until the WebSocket is closed, and tell how it was."""
    with no_hang(), pytest.raises(WebSocketClosed) as closed:
        await until_it_raises(websocket.receive)
    return closed.value


frame: Final = functools.partial(hostile.frame, masked=True)


async def read_frame(stream: trio.abc.ReceiveStream) -> tuple[int, bytes]:
    """One unmasked frame that was not fragmented."""
    first, second = await read_exactly(stream, 2)
    assert first & 0xF0 == 0x80
    size = second
    if size == 126:
        size = int.from_bytes(await read_exactly(stream, 2), "big")
    elif size == 127:
        size = int.from_bytes(await read_exactly(stream, 8), "big")
    return first & 0x0F, await read_exactly(stream, size) if size else b""


@asynccontextmanager
async def raw_client(
    engine: EngineName, streams: Pair | None = None, opening: Opening = OPENING
) -> AsyncIterator[tuple[trio.abc.Stream, WebSocket]]:
    """A client made of bytes, after its opening, and the server."""
    ours, theirs = streams or trio.testing.memory_stream_pair()
    key = base64.b64encode(bytes(16))
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def open_it() -> None:
            await ours.send_all(
                b"GET / HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: other, test.v1\r\n"
                b"Sec-WebSocket-Key: " + key + b"\r\n\r\n"
            )
            answer = await read_until(ours, b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 101")
            assert accepting(key) in answer
            opened.set()

        opened = trio.Event()
        async with load_engine(engine).accept(theirs, opening) as server:
            await opened.wait()
            yield ours, server
