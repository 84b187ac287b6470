"""What clients see of remote access: the `SNAPSHOT` of the gateway contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, final

import attrs

from .._model.status import Status
from .transport import Transport

__all__ = ["Snapshot", "WireTransport", "wire_transport"]

WireTransport: TypeAlias = Literal["tcp", "tls", "noise", "websocket"]
"""The transports that clients know. The list is closed: other transports are shown as `tcp`, with a detail."""

_WIRE_TRANSPORTS: Final[Mapping[Transport, tuple[WireTransport, str | None]]] = {
    Transport.TCP: ("tcp", None),
    Transport.TLS: ("tls", None),
    Transport.NOISE: ("noise", None),
    Transport.WEBSOCKET: ("websocket", None),
}


@final
@attrs.frozen(kw_only=True)
class Snapshot:
    """What clients see: the `SNAPSHOT` of the gateway contract.

    Attributes:
        enabled: whether remote access is switched on.
        server: the relay's address in use.
        service_name: the service label.
        transport: one of the transports that clients know.
        transport_detail: the name of the transport, when clients do not know it.
        has_key: whether a relay key is stored. The key itself is never sent.
        status: the status of remote access.
    """

    enabled: bool
    server: str | None = None
    service_name: str | None = None
    transport: WireTransport
    transport_detail: str | None = None
    has_key: bool
    status: Status

    def to_wire(self) -> dict[str, Any]:
        """The JSON object for clients; a field that is None is absent."""
        wire = {field.name: getattr(self, field.name) for field in attrs.fields(Snapshot)}
        wire["status"] = self.status.to_wire()
        return {name: value for name, value in wire.items() if value is not None}


def wire_transport(transport: Transport) -> tuple[WireTransport, str | None]:
    """`transport` as clients see it: a word that they know, and a detail where that is another transport."""
    return _WIRE_TRANSPORTS.get(transport, ("tcp", str(transport)))
