"""Gateways that speak the handshake by hand, and what their visitors get."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
import trio.testing
from rig import (
    KEY,
    RELAY_NAME,
    RelayRig,
    connect,
)

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._wire.handshake import AGENT, SUBPROTOCOL, GatewayHandshake, Welcome
from pioneer_tunnel.relay.gateways.registry import LiveSession
from pioneer_tunnel.websocket import Opening, WebSocket, load_engine
from pioneer_tunnel.yamux.frames import ACK, SYN, FrameType, encode_header

ADDRESS: Final = RelayAddress.parse(f"ws://{RELAY_NAME}")


@asynccontextmanager
async def raw_gateway(
    rig: RelayRig, key: RelayKey = KEY, *, accepting: bool = True, **changes: Any
) -> AsyncIterator[tuple[WebSocket, bytes]]:
    """A gateway by hand: authenticated, and then whatever the test does.

    It comes with the yamux bytes that came together with the relay's welcome, such as its first ping.

    Args:
        accepting: accept the relay, and wait until the session has the tunnel.
    """
    fields: dict[str, Any] = {"audience": RELAY_NAME, "service": "pioneer_gateway", "instance": "by hand"}
    opening = GatewayHandshake(key.identity(), **(fields | changes))
    stream = await connect(rig.addresses.control)
    wanted = Opening(subprotocol=SUBPROTOCOL, address=ADDRESS, agent=AGENT)
    async with load_engine().connect(stream, wanted) as websocket:
        welcome: Welcome | None = None
        early = b""
        while welcome is None:
            for message in await websocket.receive():
                if isinstance(message, str):
                    answer = opening.receive(message)
                    if isinstance(answer, Welcome):
                        welcome = answer
                    else:
                        assert answer is not None
                        await websocket.send([answer])
                else:
                    assert welcome is not None
                    early += message
        if accepting:
            await accept(websocket)
        yield websocket, early


async def accept(websocket: WebSocket) -> None:
    """Send a ping, and read until its pong."""
    await websocket.send([encode_header(FrameType.PING, SYN, 0, 4711)])
    received = b""
    while encode_header(FrameType.PING, ACK, 0, 4711) not in received:
        for message in await websocket.receive():
            assert not isinstance(message, str)
            received += message


def status_of(answer: bytes) -> int:
    version, status, _ = answer.split(b" ", 2)
    assert version == b"HTTP/1.1"
    return int(status)


class Overwhelmed(LiveSession):
    """A gateway that takes no more streams."""

    id = ""
    instance = "overwhelmed"
    key_id = "its only key"
    since = 0.0

    async def open_stream(self) -> ByteStream:
        await trio.sleep_forever()
        raise AssertionError

    async def answers(self, within: float) -> bool:
        raise AssertionError

    def replace(self, by: str) -> None:
        raise AssertionError

    def retire(self, by: str) -> None:
        raise AssertionError

    def abandon(self) -> None:
        raise AssertionError
