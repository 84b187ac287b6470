"""The native transport against scripted peers, for tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, final

import attrs
import pytest
import trio
import trio.testing
from rig import KEY, RELAY_NAME, read_until

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import (
    TunnelError,
)
from pioneer_tunnel._model.keys import PublicKey
from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._wire.handshake import SUBPROTOCOL, RelayHandshake
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.testing.virtual_time import stop_the_clock_for_threads
from pioneer_tunnel.transports import Target
from pioneer_tunnel.transports.interface import Deliver, Event, Session
from pioneer_tunnel.transports.native import NativeTransport
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.websocket import EngineName, Opening, WebSocket, WebSocketLink, load_engine
from pioneer_tunnel.yamux import Role, YamuxConnection

Peer = Callable[[trio.abc.Stream], Awaitable[object]]

HEADER: Final = ProxyHeader(visitor=Address("203.0.113.7", 4711), local=Address("192.0.2.1", 443), tls=True)
UPGRADED: Final = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"


class Recorder(trio.abc.Stream):
    """A peer's end of a connection that remembers all it was told."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.received = bytearray()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        self.received += data
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


@final
class Attempt:
    """One run of the transport towards a peer, and what came of it."""

    def __init__(
        self,
        peer: Peer,
        engine: EngineName | None = None,
        address: str = f"ws://{RELAY_NAME}",
        deliver: Deliver | None = None,
    ) -> None:
        self.visitors: list[TunnelStream] = []
        self.events: list[Event] = []
        self.session: Session | None = None
        self.up_at = 0.0
        self.heard = bytearray()
        self.took = 0.0
        self._peer = peer
        self._deliver = deliver or self.visitors.append
        self._transport = NativeTransport(engine=engine)
        self._fields: dict[str, Any] = {"address": RelayAddress.parse(address), "key": KEY}

    async def run(self, *, relay_identity: PublicKey | None = None, **changes: Any) -> TunnelError:
        """Run it to its end; returns what it raised."""
        serve = attrs.evolve(self._transport, relay_identity=relay_identity)
        stop_the_clock_for_threads()
        started = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def dial(host: str, port: int) -> trio.abc.Stream:
                ours, theirs = trio.testing.memory_stream_pair()
                nursery.start_soon(play, Recorder(theirs))
                return ours

            async def play(stream: Recorder) -> None:
                self.heard = stream.received
                try:
                    await self._peer(stream)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                finally:
                    await trio.aclose_forcefully(stream)

            with pytest.raises(TunnelError) as raised:
                await serve(
                    Target(**({"dial": dial} | self._fields | changes)),
                    self._deliver,
                    self.events.append,
                    task_status=self,
                )
            self.took = trio.current_time() - started
            nursery.cancel_scope.cancel()
        return raised.value

    def started(self, value: Session | None = None) -> None:
        """As a `trio.TaskStatus`."""
        assert self.session is None
        self.session = value
        self.up_at = trio.current_time()


def relay(
    then: Callable[[WebSocket, YamuxConnection], Awaitable[object]] | None = None,
    *,
    welcome: Callable[[RelayHandshake, WebSocket], Awaitable[object]] | None = None,
    engine: EngineName | None = None,
) -> Peer:
    """A relay: opens, lets the gateway in, runs `then` beside yamux, and leaves with 1001."""

    async def peer(stream: trio.abc.Stream) -> None:
        watched = watch(stream)
        async with load_engine(engine).accept(watched, Opening(subprotocol=SUBPROTOCOL)) as websocket:
            opening = RelayHandshake("relay-1", public_names=[RELAY_NAME])
            if welcome is not None:
                await welcome(opening, websocket)
                return
            await websocket.send([opening.challenge])
            claim = None
            while claim is None:
                for text in await websocket.receive():
                    assert isinstance(text, str)
                    claim = opening.receive(text)
            opening.verify(claim, KEY.identity().public_key)
            await websocket.send(
                [opening.welcome(claim, session="s-1", public_url="http://office.test", heartbeat_ms=15_000)]
            )
            link = WebSocketLink(websocket, watched)
            connection = YamuxConnection(link, Role.CLIENT, heartbeat=15)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run)
                if then is None:
                    await trio.sleep_forever()
                else:
                    await then(websocket, connection)
                link.close_code, link.close_reason = 1001, "the relay is stopping"
                nursery.cancel_scope.cancel()

    return peer


async def leave(websocket: WebSocket, connection: YamuxConnection) -> None:
    """What a relay does that leaves at once."""
    await trio.lowlevel.checkpoint()


def saying(answer: bytes, *, hold: bool = True) -> Peer:
    """A peer that answers every request in the same way, and then waits or ends."""

    async def peer(stream: trio.abc.Stream) -> None:
        await read_until(stream, b"\r\n\r\n")
        await stream.send_all(answer)
        if hold:
            await trio.sleep_forever()

    return peer


def assert_nothing_secret(heard: bytes | bytearray) -> None:
    """Neither the key nor anything that is made of it."""
    for secret in (KEY.reveal(), KEY.identity().key_id, KEY.identity().public_key.raw.hex(), "proof", "authenticate"):
        assert secret.encode() not in heard


async def silent(stream: trio.abc.Stream) -> None:
    while await stream.receive_some():
        pass
    await trio.sleep_forever()
