"""The gateways' door: a WebSocket, a proof, and then yamux towards the gateway.

Neighbours: `server` brings the connections; `handshake` decides who comes in; the directory learns who is here;
`ingress` opens streams through a `GatewaySession`.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress
from typing import Final, final

import trio

from ..errors import ProtocolError
from ..handshake import SUBPROTOCOL, Claim, Rejection, RelayHandshake, replaced_text
from ..identity import SigningIdentity
from ..status import clean_message
from ..streams import MeteredStream, WatchedStream
from ..websocket import EngineName, Opening, WebSocket, WebSocketLink, WebSocketRefused, load_engine
from ..yamux import Limits, Role, YamuxConnection, YamuxStream
from .admission import Arrival
from .config import RelayConfig, TunnelEntry
from .registry import Directory, LiveSession, Registry

__all__ = ["ControlDoor", "GatewaySession"]

OPENING_TIMEOUT: Final = 10.0
"""Seconds that a gateway has to prove itself."""

OPENING_BYTES: Final = 128 * 1024
"""Bytes that it may send until then, its WebSocket request included."""

CLOSE_REPLACED: Final = 4001
CLOSE_GOING_AWAY: Final = 1001
FAREWELL_TIMEOUT: Final = 1.0

_log: Final = logging.getLogger("pioneer_tunnel.relay.control")


@final
class GatewaySession(LiveSession):
    """One authenticated gateway, connected."""

    def __init__(self, session_id: str, claim: Claim, connection: YamuxConnection) -> None:
        self.id: Final = session_id
        self._instance: Final = claim.instance or ""
        self._connection: Final = connection
        self.replaced_by: str | None = None
        self.replaced: Final = trio.Event()

    @property
    def instance(self) -> str:
        return self._instance

    async def open_stream(self) -> YamuxStream:
        return await self._connection.open_stream()

    def replace(self, by: str) -> None:
        self.replaced_by = by
        self.replaced.set()


@final
class ControlDoor:
    """Lets gateways in.

    Args:
        config: the relay's id, names and heartbeat.
        identity: proves the relay to gateways that pin it.
        limits: what each session may cost.
        engine: None for the fastest that is installed.
    """

    def __init__(
        self,
        config: RelayConfig,
        registry: Registry,
        directory: Directory,
        *,
        identity: SigningIdentity | None = None,
        limits: Limits | None = None,
        engine: EngineName | None = None,
    ) -> None:
        self._config: Final = config
        self._registry: Final = registry
        self._directory: Final = directory
        self._identity: Final = identity
        self._engine: Final = load_engine(engine)
        # The relay opens streams and takes none: a gateway's SYN is reset.
        self._limits: Final = limits or Limits(unaccepted=0, unread=config.limits.buffered_bytes_per_tunnel)

    async def serve(self, stream: trio.abc.Stream, watched: WatchedStream, arrival: Arrival | None = None) -> None:
        """Serve one connection, from its WebSocket request on, until it ends; `stream` is closed then.

        Args:
            stream: what to speak over.
            watched: the same, or what lies below its TLS.
            arrival: settled when the gateway has proved itself, and slowed down when it does not; None when nobody
                counts.
        """
        deadline = trio.CancelScope(deadline=trio.current_time() + OPENING_TIMEOUT)
        with deadline:
            try:
                metered = MeteredStream(stream, OPENING_BYTES)
                async with self._engine.accept(metered, Opening(subprotocol=SUBPROTOCOL)) as websocket:
                    opened = await self._open(websocket, arrival)
                    if opened is not None:
                        deadline.deadline = float("inf")
                        metered.trusted = True
                        if arrival is not None:
                            arrival.settle()
                        await self._carry(websocket, watched, *opened)
            except (WebSocketRefused, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                _log.debug("a connection at the control door ended in its opening: %s", error)
        if deadline.cancelled_caught:
            _log.info("a connection at the control door did not prove itself within %g seconds", OPENING_TIMEOUT)

    async def _open(
        self, websocket: WebSocket, arrival: Arrival | None
    ) -> tuple[TunnelEntry, Claim, RelayHandshake] | None:
        """The opening; None when it failed, after the gateway was told."""
        handshake = RelayHandshake(self._config.id, public_names=self._config.public_names, identity=self._identity)
        await websocket.send([handshake.challenge])
        claim: Claim | None = None
        try:
            while True:
                for message in await websocket.receive():
                    if not isinstance(message, str):
                        await websocket.close(1002, "binary before the welcome")
                        return None
                    claim = handshake.receive(message)
                    if claim is not None:
                        entry = await self._registry.by_key_id(claim.key_id)
                        handshake.verify(
                            claim,
                            None if entry is None else entry.key,
                            service=None if entry is None else entry.service,
                        )
                        assert entry is not None  # or its key would not have verified
                        return entry, claim, handshake
        except Rejection as rejection:
            named = clean_message(claim.key_id) if claim is not None else "?"
            _log.info("a gateway with the key id %s was rejected: %s", named, rejection)
            if rejection.reason == "auth_failed" and arrival is not None:
                await trio.sleep(arrival.failed(trio.current_time()))
            await websocket.send([rejection.text])
            await websocket.close(1008, rejection.reason)
        except ProtocolError as error:
            await websocket.close(1002, str(error)[:120])
        return None

    async def _carry(
        self, websocket: WebSocket, watched: WatchedStream, entry: TunnelEntry, claim: Claim, handshake: RelayHandshake
    ) -> None:
        session_id = secrets.token_hex(8)
        link = WebSocketLink(websocket, watched, _ignore_text)
        link.close_code, link.close_reason = CLOSE_GOING_AWAY, "the relay is stopping"
        connection = YamuxConnection(link, Role.CLIENT, heartbeat=self._config.heartbeat_ms / 1000, limits=self._limits)
        session = GatewaySession(session_id, claim, connection)
        welcome = handshake.welcome(
            claim, session=session_id, public_url=str(entry.url), heartbeat_ms=self._config.heartbeat_ms
        )
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_end_when_replaced, session, websocket, link, nursery.cancel_scope)
                # First, so that a visitor who comes as soon as the gateway says that it is connected finds it.
                await self._directory.enter(entry.id, session)
                try:
                    await websocket.send([welcome])
                    _log.info("tunnel %s: session %s is connected (%s)", entry.id, session_id, claim.agent)
                    await connection.run()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._directory.leave(entry.id, session)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, ProtocolError) as group:
            _log.info("tunnel %s: session %s has ended: %s", entry.id, session_id, group.exceptions[0])


async def _end_when_replaced(
    session: GatewaySession, websocket: WebSocket, link: WebSocketLink, scope: trio.CancelScope
) -> None:
    # No deadline: most sessions are never replaced.
    await session.replaced.wait()
    by = session.replaced_by or ""
    with trio.move_on_after(FAREWELL_TIMEOUT), suppress(trio.BrokenResourceError):
        await websocket.send([replaced_text(by, "a newer session has taken this tunnel over")])
    link.close_code, link.close_reason = CLOSE_REPLACED, "replaced"
    scope.cancel()


def _ignore_text(text: str) -> None:
    """Gateways have nothing to say in text after the opening that this version knows."""
