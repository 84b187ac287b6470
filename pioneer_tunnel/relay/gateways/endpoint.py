"""The gateways' door: a WebSocket, a proof, and then yamux towards the gateway.

Neighbours: `server` brings the connections; `handshake` decides who comes in; the directory learns who is here, and
may say that the tunnel stays with another; `session` is what an opening becomes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, final

import trio

from ..._model.errors import ProtocolError
from ..._model.exception_groups import leaves
from ..._model.keys import SigningIdentity
from ..._model.status import clean_message
from ..._net.adopted import Watched
from ..._net.log_limiter import Complaints
from ..._wire.handshake import SUBPROTOCOL, Claim, Rejection, RelayHandshake
from ...websocket import Allowance, EngineName, Opening, WebSocket, WebSocketRefused, load_engine
from ...yamux import Limits, SendBudget
from ..admission import Arrival
from ..config import RelayConfig, TunnelEntry
from .registry import Directory, Registry, TunnelTaken
from .session import GatewaySession

__all__ = ["ControlDoor"]

OPENING_TIMEOUT: Final = 10.0
"""Seconds that a gateway has to prove itself, and again, after the welcome, to send the first byte of its session."""

OPENING_ALLOWANCE: Final = Allowance(size=24 * 1024, frames=16)
"""What it may send until then, its WebSocket request included. A proxy on the way may add pings."""

BUSY_RETRY_MS: Final = 5_000
"""How long a gateway is asked to wait whose tunnel another one has."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.control")
_complaints: Final = Complaints(_log)


@final
class ControlDoor:
    """Lets gateways in.

    Args:
        config: the relay's id, names, heartbeat and grace.
        identity: proves the relay to gateways that pin it.
        limits: what each session may cost.
        engine: None for the fastest that is installed.
        wall_clock: seconds since 1970, for what a gateway is told.
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
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config: Final = config
        self._registry: Final = registry
        self._directory: Final = directory
        self._identity: Final = identity
        self._engine: Final = load_engine(engine)
        # The relay opens streams and takes none: a gateway's SYN is reset.
        self._limits: Final = limits or Limits(
            unaccepted=0,
            unread=config.limits.buffered_bytes_per_tunnel,
            unsent=config.limits.unsent_bytes_per_tunnel,
        )
        self._sending: Final = SendBudget(config.limits.unsent_bytes)
        self._wall_clock: Final = wall_clock
        self._sessions: Final[set[GatewaySession]] = set()

    async def serve(self, stream: trio.abc.Stream, watched: Watched, arrival: Arrival | None = None) -> None:
        """Serve one connection, from its WebSocket request on, until it ends; `stream` is closed then.

        Args:
            stream: what to speak over.
            watched: the same, or what lies below its TLS.
            arrival: settled when the gateway has proved itself and accepted the relay, and slowed down when it does not
                prove itself; None when nobody counts.
        """
        deadline = trio.CancelScope(deadline=trio.current_time() + OPENING_TIMEOUT)
        with deadline:
            try:
                wanted = Opening(subprotocol=SUBPROTOCOL, allowance=OPENING_ALLOWANCE)
                async with self._engine.accept(stream, wanted) as websocket:
                    opened = await self._open(websocket, arrival)
                    if opened is not None:
                        websocket.trust()
                        await self._carry(websocket, watched, *opened, arrival=arrival, deadline=deadline)
            except (WebSocketRefused, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                _log.debug("a connection at the control door ended in its opening: %s", error)
        if deadline.cancelled_caught:
            line = f"a connection at the control door did not finish its opening within {OPENING_TIMEOUT:g} seconds"
            _complaints.tell("no opening", line, level=logging.INFO)

    async def hold_against_registry(self) -> None:
        """Ask the registry about every session anew. One whose key does not open its tunnel any more ends at once."""
        for session in [*self._sessions]:
            entry = await self._registry.by_key_id(session.key_id)
            if entry is None or entry.id != session.tunnel_id:
                session.revoke()

    async def _open(
        self, websocket: WebSocket, arrival: Arrival | None
    ) -> tuple[TunnelEntry, Claim, RelayHandshake] | None:
        """The opening; None when it failed, after the gateway was told."""
        handshake = RelayHandshake(self._config.id, public_names=self._config.public_names, identity=self._identity)
        await websocket.send([handshake.challenge])
        claim: Claim | None = None
        entry: TunnelEntry | None = None
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
                            None if entry is None else entry.keys_by_id.get(claim.key_id),
                            service=None if entry is None else entry.service,
                        )
                        assert entry is not None  # or its key would not have verified
                        return entry, claim, handshake
        except Rejection as rejection:
            if rejection.reason == "auth_failed" and arrival is not None:
                await trio.sleep(arrival.failed(trio.current_time()))
            await _reject(websocket, claim, entry, rejection)
        except ProtocolError as error:
            await websocket.close(1002, str(error)[:120])
        return None

    async def _carry(
        self,
        websocket: WebSocket,
        watched: Watched,
        entry: TunnelEntry,
        claim: Claim,
        handshake: RelayHandshake,
        *,
        arrival: Arrival | None,
        deadline: trio.CancelScope,
    ) -> None:
        config = self._config

        async def enter() -> None:
            """Give the tunnel to the session.

            A gateway that does not accept the relay, because it pins another identity, closes the connection after the
            welcome. Until the first byte of its session, it changes nothing for the session that has the tunnel.
            """
            if not session.ended:
                try:
                    await self._directory.enter(entry.id, session, rules=entry.takeover_rules)
                except TunnelTaken as taken:
                    session.refuse(str(taken))
            if session.ended:
                await trio.sleep_forever()  # no deadline: the session is ending, and answers nothing
            session.entered = True
            deadline.deadline = float("inf")
            if arrival is not None:
                arrival.settle()
            line = f"tunnel {entry.id}: session {session.id} is connected ({claim.agent})"
            _complaints.tell(("connected", entry.id), line, level=logging.INFO)

        session = GatewaySession(
            entry.id,
            claim,
            websocket,
            watched,
            heartbeat=config.heartbeat_ms / 1000,
            limits=self._limits,
            sending=self._sending,
            since=self._wall_clock(),
            rotation_grace=config.rotation_grace_ms / 1000,
            on_first_bytes=enter,
        )
        # Known from here on, so that a key that is withdrawn while it waits for its entry does not slip through.
        self._sessions.add(session)
        try:
            try:
                await self._directory.admit(entry.id, session, rules=entry.takeover_rules)
                welcome = handshake.welcome(
                    claim, session=session.id, public_url=str(entry.url), heartbeat_ms=config.heartbeat_ms
                )
                await websocket.send([welcome])
                deadline.deadline = trio.current_time() + OPENING_TIMEOUT
                await session.carry()
            except TunnelTaken as taken:
                await _reject(websocket, claim, entry, Rejection("busy", str(taken), retry_after_ms=BUSY_RETRY_MS))
            finally:
                # Also after an `enter` that was cancelled: it may have been carried out.
                with trio.CancelScope(shield=True):
                    await self._directory.leave(entry.id, session)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, ProtocolError) as group:
            when = "" if session.entered else " before its gateway accepted the relay"
            line = f"tunnel {entry.id}: session {session.id} has ended{when}: {leaves(group)[0]}"
            _complaints.tell(("ended", entry.id), line, level=logging.INFO)
        finally:
            self._sessions.discard(session)


async def _reject(websocket: WebSocket, claim: Claim | None, entry: TunnelEntry | None, rejection: Rejection) -> None:
    named = clean_message(claim.key_id) if claim is not None else "?"
    kind = (rejection.reason, None if entry is None else entry.id)
    _complaints.tell(kind, f"a gateway with the key id {named} was rejected: {rejection}", level=logging.INFO)
    await websocket.send([rejection.text])
    await websocket.close(1008, rejection.reason)
