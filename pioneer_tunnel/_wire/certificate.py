"""The extension `certificate`: it shows whether someone between the gateway and the relay opens TLS.

    relay    {"sha256": HEX}    of the certificate with which the relay itself ended the TLS of this connection, DER
    gateway  {"sha256": HEX}    of the certificate that it has seen
    relay    {}

The hashes differ when TLS is opened on the way. A proxy that opens it cannot change what the relay says: the challenge
is part of what both ends sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from .messages import Choose, Message

__all__ = ["CERTIFICATE", "choose_certificate", "offer_certificate", "sees_another_certificate"]

CERTIFICATE: Final = "certificate"
"""Its name."""


def offer_certificate(sha256: bytes) -> Mapping[str, Any]:
    """What a relay says in the challenge."""
    return {"sha256": sha256.hex()}


def choose_certificate(seen: bytes | None, on_another: Callable[[], object]) -> Choose:
    """How a gateway chooses.

    Args:
        seen: the hash of the certificate that it has seen; None without TLS.
        on_another: called when the relay's is another one. What it raises ends the handshake.
    """

    def choose(offered: Message) -> Mapping[str, Any] | None:
        announced = offered.text("sha256")
        if seen is None:
            return None
        if announced != seen.hex():
            on_another()
        return {"sha256": seen.hex()}

    return choose


def sees_another_certificate(chosen: Mapping[str, Message], sha256: bytes) -> bool:
    """Whether a gateway has seen another certificate than the relay's.

    Args:
        chosen: the extensions that the gateway chooses.
        sha256: what the relay has offered.

    Raises:
        RemoteProtocolError: the gateway's words are malformed.
    """
    return CERTIFICATE in chosen and chosen[CERTIFICATE].text("sha256") != sha256.hex()
