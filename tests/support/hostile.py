"""A relay and a gateway made of bytes, for attacks that no honest end would put on the wire."""

from __future__ import annotations

import base64
import hashlib
import json
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, final

import trio
from rig import KEY, RELAY_NAME, read_until
from yamux_rig import KIB, Frame, PipeEnd, data, pipe

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import TunnelError
from pioneer_tunnel._model.exception_groups import lone_error_bare
from pioneer_tunnel._wire.handshake import GatewayHandshake, Welcome
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.transports import Target
from pioneer_tunnel.transports.native import NativeTransport
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.forward import forward
from pioneer_tunnel.websocket import EngineName
from pioneer_tunnel.yamux import Limits
from pioneer_tunnel.yamux.frames import SYN, FrameDecoder, Header

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
RSV1: Final = 0x40
"""What permessage-deflate sets in the first byte of a compressed message."""

LOCAL: Final = Address("127.0.0.1", 17878)
HEADER: Final = ProxyHeader(visitor=Address("203.0.113.7", 4711)).encode()


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = False, bits: int = 0) -> bytes:
    """A WebSocket frame; masked, which is how clients send them, with a mask of zeros."""
    head = bytes([fin << 7 | bits | opcode])
    size = len(payload)
    if size < 126:
        head += bytes([masked << 7 | size])
    elif size < 65536:
        head += bytes([masked << 7 | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([masked << 7 | 127]) + size.to_bytes(8, "big")
    return head + (bytes(4) if masked else b"") + payload


def text(message: object) -> bytes:
    return frame(TEXT, message.encode() if isinstance(message, str) else json.dumps(message).encode())


def challenge(**changes: Any) -> dict[str, Any]:
    nonce = base64.b64encode(bytes(32)).decode()
    return {"type": "challenge", "version": 1, "relay": "r", "nonce": nonce} | changes


def accepting(key: bytes) -> bytes:
    """The `Sec-WebSocket-Accept` that answers a `Sec-WebSocket-Key`."""
    return base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())


def binaries(frames: bytes) -> bytes:
    """yamux frames in messages of 60 KiB."""
    size = 60 * KIB
    return b"".join(frame(BINARY, frames[start : start + size]) for start in range(0, len(frames), size))


WELCOME: Final = {"type": "welcome", "session": "s", "public_url": "http://office.test", "heartbeat_ms": 15000}


@final
class RelayOfBytes:
    """The relay's end of a gateway's connection.

    Attributes:
        stream: the bare connection.
        frames: what the gateway has said in yamux, as far as `listen` has heard it.
    """

    def __init__(self, stream: PipeEnd) -> None:
        self.stream: Final = stream
        self.request = b""
        self.frames: Final[list[Frame]] = []
        self.changed: Final = trio.lowlevel.ParkingLot()
        self._received = bytearray()
        self._decoder: Final = FrameDecoder()

    async def read_request(self) -> bytes:
        """Read the gateway's request; returns the answer that agrees to it, up to the empty line."""
        self.request = await read_until(self.stream, b"\r\n\r\n")
        (key,) = [line[19:] for line in self.request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key: ")]
        return (
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Protocol: pioneer-tunnel.v1\r\nSec-WebSocket-Accept: " + accepting(key) + b"\r\n"
        )

    async def upgrade(self) -> None:
        await self.say(await self.read_request(), b"\r\n")

    async def welcome(self) -> None:
        """All of the opening, as it should be."""
        await self.upgrade()
        await self.say(text(challenge()))
        opcode, said = await self.read_frame()
        assert opcode == TEXT
        assert json.loads(said)["type"] == "authenticate"
        await self.say(text(WELCOME))

    async def say(self, *pieces: bytes) -> None:
        await self.stream.send_all(b"".join(pieces))

    async def read_frame(self) -> tuple[int, bytes]:
        """The next WebSocket frame of the gateway, unmasked."""
        first, second = await self._read(2)
        size = second & 0x7F
        if size > 125:
            size = int.from_bytes(await self._read(2 if size == 126 else 8), "big")
        mask = int.from_bytes(await self._read(4) * (size // 4 + 1), "big")
        payload = await self._read(size) + bytes(4 - size % 4)
        return first & 0x0F, (int.from_bytes(payload, "big") ^ mask).to_bytes(len(payload), "big")[:size]

    async def _read(self, amount: int) -> bytes:
        while len(self._received) < amount:
            some = await self.stream.receive_some(64 * KIB)
            if not some:
                raise trio.BrokenResourceError("the gateway has left")
            self._received += some
        taken = bytes(self._received[:amount])
        del self._received[:amount]
        return taken

    async def listen(self) -> None:
        """Hear what the gateway says, until it leaves."""
        while True:
            opcode, payload = await self.read_frame()
            if opcode == BINARY:
                for item in self._decoder.receive_data(payload):
                    if isinstance(item, Header):
                        self.frames.append(Frame(*item))
                    else:
                        self.frames[-1] = self.frames[-1]._replace(body=self.frames[-1].body + item)
                self.changed.unpark_all()

    async def heard(self, stream_id: int, *, flags: int = 0, body: bytes = b"") -> None:
        """Wait until the gateway has said that on that stream."""
        with trio.fail_after(60):
            while not any(
                said.stream_id == stream_id and said.flags & flags == flags and body in said.body
                for said in self.frames
            ):
                await self.changed.park()

    def count(self, frame_type: int, flags: int) -> int:
        return sum(said.type == frame_type and said.flags & flags == flags for said in self.frames)

    async def visit(self, stream_id: int) -> None:
        """An honest visitor, who has to be served whatever else goes on."""
        await self.say(binaries(data(stream_id, HEADER + b"are you there?", SYN)))
        await self.heard(stream_id, body=b"are you there?")


@final
class HostileRelay:
    """One run of a gateway's native transport towards a relay made of bytes, until it fails.

    The gateway forwards its visitors to a local server, which says back what it hears.

    Attributes:
        dialled: every address that the gateway has connected to, the relay aside.
        most_tasks: how many tasks it has had at a time, beyond those that were there before.
    """

    def __init__(self, attack: Callable[[RelayOfBytes], Awaitable[object]], engine: EngineName | None = None) -> None:
        self.dialled: Final[list[Address]] = []
        self.relay: RelayOfBytes
        self.most_tasks = 0
        self._attack: Final = attack
        self._engine: Final = engine

    async def run(self, *, limits: Limits | None = None) -> TunnelError:
        """Run it; returns what the transport has raised."""
        before = trio.lowlevel.current_statistics().tasks_living

        def count() -> None:
            living = trio.lowlevel.current_statistics().tasks_living - before
            self.most_tasks = max(self.most_tasks, living)

        async def dial(host: str, port: int) -> trio.abc.Stream:
            ours, theirs = pipe()
            self.relay = RelayOfBytes(theirs)
            nursery.start_soon(play, theirs)
            return ours

        async def play(stream: PipeEnd) -> None:
            try:
                with lone_error_bare():
                    await self._attack(self.relay)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                await trio.aclose_forcefully(stream)

        async def dial_local(host: str, port: int) -> trio.abc.Stream:
            self.dialled.append(Address(host, port))
            count()
            ours, theirs = pipe()
            nursery.start_soon(say_back, theirs)
            return ours

        async def say_back(stream: PipeEnd) -> None:
            try:
                async with stream:
                    while heard := await stream.receive_some():
                        await stream.send_all(heard)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        def deliver(stream: TunnelStream) -> None:
            stream._carried.acknowledge()
            nursery.start_soon(lambda: forward(stream, LOCAL, dial=dial_local))

        settings: dict[str, Any] = {
            "dial": dial,
            "address": RelayAddress.parse(f"ws://{RELAY_NAME}"),
            "key": KEY,
        }
        async with trio.open_nursery() as nursery:
            try:
                await NativeTransport(engine=self._engine, limits=limits or Limits())(
                    Target(**settings),
                    deliver,
                    lambda event: count(),
                    task_status=trio.TASK_STATUS_IGNORED,
                )
            except TunnelError as error:
                failure = error
            nursery.cancel_scope.cancel()
        return failure


@final
class GatewayOfBytes:
    """The gateway's end of a relay's gateway endpoint, after an opening that was as it should be."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream: Final = stream

    async def open(self, *lines: bytes, before_proof: bytes = b"") -> bytes:
        """Open, with `lines` in the request and frames before the proof; returns the answer's head."""
        await self.stream.send_all(
            b"GET / HTTP/1.1\r\nHost: relay.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: pioneer-tunnel.v1\r\n"
            b"Sec-WebSocket-Key: " + base64.b64encode(bytes(16)) + b"\r\n"
            + b"".join(lines) + b"\r\n"
        )  # fmt: skip
        answer = await read_until(self.stream, b"\r\n\r\n")
        await self.say(before_proof)
        opening = GatewayHandshake(KEY.identity(), audience=RELAY_NAME, service="pioneer_gateway")
        while True:
            opcode, payload = await self.read_frame()
            if opcode == TEXT:
                said = opening.receive(payload.decode())
                if isinstance(said, Welcome):
                    return answer
                assert said is not None
                await self.say(frame(TEXT, said.encode(), masked=True))

    async def say(self, *pieces: bytes) -> None:
        await self.stream.send_all(b"".join(pieces))

    async def read_frame(self) -> tuple[int, bytes]:
        first, size = await self._read(2)
        if size > 125:
            size = int.from_bytes(await self._read(2 if size == 126 else 8), "big")
        return first & 0x0F, await self._read(size)

    async def _read(self, amount: int) -> bytes:
        received = b""
        while len(received) < amount:
            some = await self.stream.receive_some(amount - len(received))
            if not some:
                raise trio.BrokenResourceError("the relay has left")
            received += some
        return received


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Fail when the block, at any moment, holds more than `limit` bytes beyond what was there before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak // KIB} KiB were held, {limit // KIB} KiB are allowed"
