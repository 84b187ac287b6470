"""The bytes that a gateway and a relay sign in the native handshake. docs/protocol.md specifies them.

Both ends sign what both have seen. So a proof made for one relay, one dialled name and one pair of nonces is not valid
for any other.
"""

from __future__ import annotations

import hashlib
from typing import Final, final

import attrs

__all__ = ["Transcript", "fields_bytes"]

_GATEWAY_LABEL: Final = b"pioneer-tunnel/v1 gateway proof"
_RELAY_LABEL: Final = b"pioneer-tunnel/v1 relay proof"


@final
@attrs.frozen(kw_only=True)
class Transcript:
    """What both ends have seen when they sign.

    Attributes:
        relay: the relay's id, from its challenge.
        audience: the host that the gateway dialled, in the normal form of `RelayAddress.audience`.
        service: the service label.
        relay_nonce, gateway_nonce: 32 random bytes of each side.
        challenge: the challenge message, byte for byte as it was sent.
    """

    relay: str
    audience: str
    service: str
    relay_nonce: bytes
    gateway_nonce: bytes
    challenge: bytes

    def gateway_bytes(self) -> bytes:
        """What the gateway signs to prove that it has the key."""
        return fields_bytes(_GATEWAY_LABEL, self._fields())

    def relay_bytes(self, authenticate: bytes) -> bytes:
        """What the relay signs in return; `authenticate` is that message, byte for byte as it was sent."""
        return fields_bytes(_RELAY_LABEL, [*self._fields(), hashlib.sha256(authenticate).digest()])

    def _fields(self) -> list[bytes]:
        return [
            self.relay.encode(),
            self.audience.encode(),
            self.service.encode(),
            self.relay_nonce,
            self.gateway_nonce,
            hashlib.sha256(self.challenge).digest(),
        ]


def fields_bytes(label: bytes, fields: list[bytes]) -> bytes:
    """A label and length-prefixed fields. Two different lists never have the same bytes."""
    return label + b"\0" + b"".join(len(field).to_bytes(4, "big") + field for field in fields)
