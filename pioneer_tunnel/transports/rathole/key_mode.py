"""Key modes: what a gateway sends of its relay key in the Pioneer Relay / rathole protocol. No I/O.

Three kinds of relay speak that protocol. They differ in the ID, by which the relay finds the tunnel, and in the PROOF
that the gateway has the key. The PROOF also names the session on data channels.

    mode            ID                                                       PROOF
    token_routing   SHA256("relay/token-routing/v1" 0x00 SHA256(key))        SHA256(SHA256(key) nonce)
    token_hash      SHA256(service)                                          SHA256(SHA256(key) nonce)
    rathole         SHA256(service)                                          SHA256(key nonce)

The key itself is never sent. But an eavesdropper sees nonce and proof and can test guesses of the key against them.
These transports take a key of any length, so only a long key is safe.
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
    """How a relay knows a gateway. The values are the words of the configuration."""

    TOKEN_ROUTING = "token_routing"  # noqa: S105  # a word of the configuration
    """Pioneer Relay of today: it stores the hash of the key, and finds the tunnel by it."""
    TOKEN_HASH = "token_hash"  # noqa: S105
    """Pioneer Relay 0.5: it stores the hash of the key, and finds the tunnel by the service name."""
    RATHOLE = "rathole"
    """rathole: it stores the key itself, and finds the tunnel by the service name."""

    @property
    def by_name(self) -> bool:
        """True when the relay finds a tunnel by the service name, so gateway and relay must use the same name."""
        return self is not KeyMode.TOKEN_ROUTING

    def id(self, key: RelayKey, service: str) -> bytes:
        """The ID: 32 bytes, the same for every connection."""
        if self.by_name:
            return hashlib.sha256(service.encode()).digest()
        return hashlib.sha256(_ROUTING_LABEL + _key_hash(key)).digest()

    def proof(self, key: RelayKey, nonce: bytes) -> bytes:
        """The answer to the relay's `nonce`: 32 bytes. Data channels name the session by it."""
        secret = key.reveal().encode() if self is KeyMode.RATHOLE else _key_hash(key)
        return hashlib.sha256(secret + nonce).digest()


def _key_hash(key: RelayKey) -> bytes:
    return hashlib.sha256(key.reveal().encode()).digest()
