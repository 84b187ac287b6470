"""The opening of a gateway's connection: which gateway is it, and has it the key?

The relay sends a challenge and what it offers. The gateway answers with a claim and a proof. The welcome comes later,
when the session may have the tunnel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any, Final, final

import attrs
import trio

from ..._model.errors import ProtocolError
from ..._model.keys import SigningIdentity
from ..._model.log_fields import about
from ..._model.text import clean_message
from ..._net.log_limiter import LogLimiter
from ..._wire import services
from ..._wire.certificate import CERTIFICATE, offer_certificate, sees_another_certificate
from ..._wire.handshake import Claim, Extensions, Rejection, RelayHandshake
from ..._wire.heartbeat import HEARTBEAT, agreed_heartbeat, offer_heartbeat
from ..._wire.links import LINKS, LinkPlace, link_place, offer_links
from ..._wire.messages import DRAINING
from ..._wire.node import NODE
from ..._wire.resumption import RESUME, RelayResumption, ResumeChoice
from ...websocket import Allowance, WebSocket
from ..admission import Arrival
from ..config import RelayConfig
from ..counts import RelayCounts
from ..rates import HandshakeRate
from ..tunnels import TunnelEntry
from .registry import Registry, RegistryAway
from .spreading import Spreading

__all__ = ["OPENING_ALLOWANCE", "OPENING_TIMEOUT", "GatewayOpening", "Proved", "break_off", "reject"]

OPENING_TIMEOUT: Final = 10.0
"""Seconds for the opening until the welcome, and again from the welcome to the first byte of the session."""

OPENING_ALLOWANCE: Final = Allowance(size=24 * 1024, frames=16)
"""What a gateway may send until then, including its WebSocket request. A proxy on the way may add pings."""

MOST_REASON: Final = 120
"""Characters of an error in a WebSocket close frame; these are ASCII."""

OFFERS: Final[Extensions] = {services.SERVICES: {}, DRAINING: {}, LINKS: offer_links()}
"""The extensions that the relay offers, beside those that depend on the configuration."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.control"))


@final
@attrs.frozen(kw_only=True)
class Proved:
    """A gateway that has proved its key.

    Attributes:
        websocket: its connection.
        entry: its tunnel.
        claim: what it claimed.
        handshake: makes its welcome.
        served: the services that it takes visitors of; None when it knows no services.
        heartbeat_ms: what it and the relay have agreed on.
        resumption, choice: of the extension `resume`; None if it is not in force.
        place: which of its links this is; None if it is the only one.
    """

    websocket: WebSocket
    entry: TunnelEntry
    claim: Claim
    handshake: RelayHandshake
    served: Collection[str] | None
    heartbeat_ms: int
    resumption: RelayResumption | None
    choice: ResumeChoice | None
    place: LinkPlace | None


@final
class GatewayOpening:
    """Verifies gateways.

    Args:
        config: its id, public names, heartbeat and limits are used.
        registry: the tunnels and their keys.
        counts: counts refusals.
        spreading: what gateways hear about coming back.
        identity: proves the relay to gateways that pin it.
        node: the name of this relay in its fleet; None if there is none.
        window: bytes of a session that may be sent again when it resumes.
    """

    def __init__(
        self,
        config: RelayConfig,
        registry: Registry,
        counts: RelayCounts,
        spreading: Spreading,
        *,
        identity: SigningIdentity | None,
        node: str | None,
        window: int,
    ) -> None:
        self._config: Final = config
        self._registry: Final = registry
        self._counts: Final = counts
        self._spreading: Final = spreading
        self._identity: Final = identity
        self._node: Final = node
        self._window: Final = window
        self._handshakes: Final = HandshakeRate(config.limits.handshakes_per_second)

    async def prove(
        self, websocket: WebSocket, arrival: Arrival | None, certificate: bytes | None, *, resumable: bool
    ) -> Proved | None:
        """Verify a gateway's proof. None when that failed; the gateway has got the reason.

        Args:
            websocket: its connection.
            arrival: delays the answer to a wrong proof. None does not.
            certificate: the SHA-256 of the certificate that the gateway has to see; None if it cannot be compared.
            resumable: whether to offer that the session survives its connection.
        """
        wait = self._handshakes.wait(trio.current_time())
        if wait is not None:
            self._counts.refused("busy")
            await reject(websocket, None, None, self._busy(wait))
            return None
        config = self._config
        offers: dict[str, Mapping[str, Any]] = {
            **OFFERS,
            **self._spreading.offer,
            HEARTBEAT: offer_heartbeat(config.heartbeat_ms),
        }
        if self._node is not None:
            offers[NODE] = {}
        if certificate is not None:
            offers[CERTIFICATE] = offer_certificate(certificate)
        resumption = None
        if resumable:
            resumption = RelayResumption(timeout=config.resume_timeout_ms / 1000, window=self._window)
            offers[RESUME] = resumption.offer
        handshake = RelayHandshake(config.id, public_names=config.public_names, identity=self._identity, offers=offers)
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
                        entry = await self._entry(claim.key_id)
                        handshake.verify(
                            claim,
                            None if entry is None else entry.keys_by_id.get(claim.key_id),
                            service=None if entry is None else entry.service,
                        )
                        assert entry is not None  # without an entry, no key verifies
                        self._handshakes.proved(trio.current_time())
                        if certificate is not None and sees_another_certificate(claim.extensions, certificate):
                            line = f"tunnel {entry.id}: its gateway sees another certificate; TLS is opened on the way"
                            _log_limiter.log(
                                ("opened", entry.id), line, about=about("tls_intercepted", tunnel=entry.id)
                            )
                        wanted = claim.extensions.get(services.SERVICES)
                        chosen = claim.extensions.get(RESUME)
                        return Proved(
                            websocket=websocket,
                            entry=entry,
                            claim=claim,
                            handshake=handshake,
                            served=None if wanted is None else services.serves(wanted),
                            heartbeat_ms=agreed_heartbeat(claim.extensions, config.heartbeat_ms),
                            resumption=resumption,
                            choice=None if chosen is None or resumption is None else resumption.read(chosen),
                            place=link_place(claim.extensions),
                        )
        except Rejection as rejection:
            if rejection.reason == "auth_failed" and arrival is not None:
                await trio.sleep(arrival.failed(trio.current_time()))
            self._counts.refused(rejection.reason, None if entry is None else entry.id)
            await reject(websocket, claim, entry, rejection)
        except ProtocolError as error:
            await break_off(websocket, error)
        return None

    async def _entry(self, key_id: str) -> TunnelEntry | None:
        """The tunnel that a key opens.

        Raises:
            Rejection: that is not known now. The gateway comes again; its key is not wrong.
        """
        try:
            return await self._registry.by_key_id(key_id)
        except RegistryAway as away:
            raise Rejection("busy", str(away), retry_after_ms=away.retry_after * 1000) from None

    def _busy(self, wait: float) -> Rejection:
        rate = self._config.limits.handshakes_per_second
        text = f"more than {rate} gateways per second want to connect"
        return Rejection("busy", text, retry_after_ms=math.ceil(wait * 1000))


async def reject(websocket: WebSocket, claim: Claim | None, entry: TunnelEntry | None, rejection: Rejection) -> None:
    """Say to a gateway why it is refused, and close its connection."""
    named = clean_message(claim.key_id) if claim is not None else "?"
    kind = (rejection.reason, None if entry is None else entry.id)
    fields = about("gateway_rejected", tunnel=None if entry is None else entry.id, reason=rejection.reason)
    # A wrong key is the operator's business: a mistake, or an attempt. Others come again by themselves.
    level = logging.WARNING if rejection.reason == "auth_failed" else logging.INFO
    _log_limiter.log(kind, f"a gateway with the key id {named} was rejected: {rejection}", level=level, about=fields)
    await websocket.send([rejection.text])
    await websocket.close(1008, rejection.reason)


async def break_off(websocket: WebSocket, error: ProtocolError) -> None:
    """Close the connection of a gateway that has broken the protocol, and say how."""
    await websocket.close(1002, str(error)[:MOST_REASON])
