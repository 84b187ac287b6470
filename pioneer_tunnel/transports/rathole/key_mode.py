"""Key modes: what a relay of the Pioneer Relay / rathole protocol is told of a relay key. Pure.

Three kinds of relay speak that protocol. They differ in how a gateway names itself (the ID of its first message) and
in how it proves that it has the key (PROOF, which then also names its session to data channels):

    mode            ID                                                       PROOF
    token_routing   SHA256("relay/token-routing/v1" 0x00 SHA256(key))        SHA256(SHA256(key) nonce)
    token_hash      SHA256(service)                                          SHA256(SHA256(key) nonce)
    rathole         SHA256(service)                                          SHA256(key nonce)

The key itself is never sent. But whoever can read the connection sees nonce and proof, and can try guesses at them:
these transports take any key, so it is the key's length that protects it.

Neighbours: `config` and `seam.Target` carry a `KeyMode`; `transports.pioneer_relay` and the scripted relay of
`testing` ask it for digests, which `transports.rathole_codec` puts into messages.
"""

from __future__ import annotations

import enum
import hashlib
from typing import Final, final

from ..._model.keys import RelayKey

__all__ = ["KeyMode"]

_ROUTING_LABEL: Final = b"relay/token-routing/v1\0"


@final
class KeyMode(enum.StrEnum):
    """How a relay knows a gateway: the words that a configuration may name."""

    TOKEN_ROUTING = "token_routing"  # noqa: S105  # a word of the configuration
    """Pioneer Relay of today: it holds the key's hash, and finds the tunnel by it."""
    TOKEN_HASH = "token_hash"  # noqa: S105
    """Pioneer Relay 0.5: it holds the key's hash, and finds the tunnel by the service name."""
    RATHOLE = "rathole"
    """rathole: it holds the key itself, and finds the tunnel by the service name."""

    @property
    def by_name(self) -> bool:
        """True when the relay finds a tunnel by its service name, so that the name has to be the relay's."""
        return self is not KeyMode.TOKEN_ROUTING

    def id(self, key: RelayKey, service: str) -> bytes:
        """What a gateway names itself by: 32 bytes, the same for every connection."""
        if self.by_name:
            return hashlib.sha256(service.encode()).digest()
        return hashlib.sha256(_ROUTING_LABEL + _key_hash(key)).digest()

    def proof(self, key: RelayKey, nonce: bytes) -> bytes:
        """The answer to the relay's `nonce`: 32 bytes, which also name the session to its data channels."""
        secret = key.reveal().encode() if self is KeyMode.RATHOLE else _key_hash(key)
        return hashlib.sha256(secret + nonce).digest()


def _key_hash(key: RelayKey) -> bytes:
    return hashlib.sha256(key.reveal().encode()).digest()
