"""The transports that a configuration may name, and which one follows from a relay's address."""

from __future__ import annotations

import enum
from typing import final

from .._model.addresses import RelayAddress
from .._model.errors import UnsupportedTransportError
from .._model.text import shown
from .._storage.validation import nearest

__all__ = ["Transport", "effective_transport"]


@final
class Transport(enum.StrEnum):
    """How the tunnel reaches the relay. The values are the words of the configuration."""

    WEBSOCKET = "websocket"
    """Native: one WebSocket, yamux inside."""
    TCP = "tcp"
    """The Pioneer Relay / rathole protocol in clear: an eavesdropper can read visitors' tokens."""
    TLS = "tls"
    """The same inside TLS."""
    NOISE = "noise"
    """Known to gateways, not offered by this library: a generation with it fails with `unsupported_transport`."""
    PROCESS = "process"
    """Another program, such as frpc, makes the tunnel."""

    @classmethod
    def parse(cls, word: str) -> Transport:
        """Read the word of a configuration or a setting.

        Raises:
            UnsupportedTransportError: the word is unknown.
        """
        try:
            return cls(word)
        except ValueError:
            known = [str(member) for member in cls]
        raise UnsupportedTransportError(
            f"unknown transport {shown('transport', word) or '…'}; known are {', '.join(known)}; "
            f"the nearest of them is {nearest(word, known)!r}"
        )


def effective_transport(transport: Transport | None, relay_addr: RelayAddress) -> Transport:
    """The transport; where none is named, a URL means `websocket`, and a bare address `tcp`."""
    if transport is not None:
        return transport
    return Transport.TCP if relay_addr.scheme is None else Transport.WEBSOCKET
