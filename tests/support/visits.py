"""A visit whose visitor and gateway are streams in memory, and what they say, for the tests of the relay."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias, final

import trio
import trio.testing
from rig import read_all, request, tunnel_entry

from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.relay import TunnelEntry
from pioneer_tunnel.relay.gateways.registry import LiveSession, LocalDirectory, LocalRegistry
from pioneer_tunnel.relay.limits import RelayLimits
from pioneer_tunnel.relay.visitors.ingress import Ingress
from pioneer_tunnel.relay.visitors.visit import Visit

OTHER_HOST: Final = "home.test"
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SWITCH: Final = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
NOBODY: Final = ProxyHeader(visitor=None, local=None, tls=False).encode()
UPGRADE: Final = ("Upgrade: websocket", "Connection: Upgrade")
MemoryStream: TypeAlias = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


def statuses(told: bytes) -> list[int]:
    return [int(part[:3]) for part in told.split(b"HTTP/1.1 ")[1:]]


HEAD: Final = request()


POSTED: Final = b"POST / HTTP/1.1\r\nHost: office.test\r\nContent-Length: 4\r\n\r\n"


@final
class FakeSession(LiveSession):
    """A session whose streams end in the test."""

    id = ""
    instance = "by hand"
    key_id = "its only key"
    since = 0.0

    def __init__(self, ingress: Ingress) -> None:
        self.ingress: Final = ingress
        self.gone = False
        self.streams: list[MemoryStream] = []

    async def open_stream(self) -> ByteStream:
        if self.gone:
            raise trio.BrokenResourceError
        ours, theirs = trio.testing.memory_stream_pair()
        self.streams.append(theirs)
        return adopt(ours)

    async def answers(self, within: float) -> bool:
        raise AssertionError

    def replace(self, by: str) -> None:
        raise AssertionError

    def retire(self, by: str) -> None:
        raise AssertionError

    def abandon(self) -> None:
        raise AssertionError


def visit_of(stream: trio.abc.Stream) -> Visit:
    return Visit(stream=stream, visitor=None, local=None, tls=False)


@asynccontextmanager
async def by_hand(**limits: Any) -> AsyncIterator[tuple[trio.abc.HalfCloseableStream, FakeSession]]:
    """A visitor who has connected, and a gateway for it, on streams in memory."""
    directory = LocalDirectory()
    ingress = Ingress(LocalRegistry([TunnelEntry(**tunnel_entry())]), directory, limits=RelayLimits(**limits))
    session = FakeSession(ingress)
    await directory.enter("office", session)
    visitor, stream = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingress.serve, visit_of(stream))
        yield visitor, session


async def until_end(stream: trio.abc.ReceiveStream) -> bytes:
    """All bytes up to EOF, without the PROXY header."""
    said = await read_all(stream)
    assert said.startswith(NOBODY)
    return said[len(NOBODY) :]
